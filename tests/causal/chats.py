"""Tokenizers with the thinking-related parts of known models' chat templates."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.causal.tiny import tiny_decoder

#: The system prompt mentions the tags, which are tokens; ``enable_thinking=False`` gives an empty thought.
SMOLLM3 = """\
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{{- '<|im_start|>system\\nToday Date: ' ~ strftime_now('%d %B %Y') ~ '\\n' -}}
{%- if enable_thinking -%}
{{- 'Use the format: <think> Thought section </think> Solution section.' -}}
{%- else -%}{{- 'Be helpful.' -}}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if not enable_thinking -%}{{- '<think>\\n\\n</think>\\n' -}}{%- endif -%}
{%- endif -%}"""

QWEN3 = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}"""

#: Every prompt opens a thought, which cannot be turned off.
R1 = """\
{{- '<s>' -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{- '<|User|>' + message.content -}}{%- endif -%}
{%- if message.role == 'assistant' -%}
{{- '<|Assistant|>' + message.content.split('</think>')[-1] + '</s>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\\n' -}}{%- endif -%}"""

#: Opens a thought, or writes an empty one.
GLM = R1.replace(
    "{{- '<|Assistant|><think>\\n' -}}",
    "{{- '<|Assistant|><think>\\n' + ('\\n</think>\\n\\n' if enable_thinking is false else '') -}}",
)

#: Starts every text with ``<s>``, which the tokenizer also adds, and strips the question.
LLAMA3 = """\
{{- '<s>' -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
{{- message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""

#: Invalid templates, which must be rejected.
DROPS = "{{- '<|User|>Say something.<|Assistant|>' -}}"
REPEATS = "{{- '<|User|>' + messages[0].content + ' Again: ' + messages[0].content + '<|Assistant|>' -}}"
SHOUTS = "{{- '<|User|>' + messages[0].content | upper + '<|Assistant|>' -}}"
ESCAPES = "{{- '<|User|>' + messages[0].content | e + '<|Assistant|>' -}}"
BROKEN = "{{- raise_exception('no system prompt') -}}"
CLOSES = "{{- '<|User|>' + messages[0].content + '<|Assistant|></think>' -}}"

_SPECIAL = (
    *("<|pad|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)


def chat_tokenizer(
    template: str | None, *, begins: bool = False, ends: bool = False, thinks: bool = True
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, control tokens, and the added word ``COVID-19``.

    Args:
        template: One of the above.
        begins, ends: Whether the tokenizer adds ``<s>`` before a text, and ``</s>`` after it.
        thinks: Whether the tags are tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    backend.add_tokens(["COVID-19", *(("<think>", "</think>") if thinks else ())])
    if begins or ends:
        backend.post_processor = TemplateProcessing(
            single=f"{'<s> ' if begins else ''}$A{' </s>' if ends else ''}",
            special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "</s>")],
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.chat_template = template
    return wrapped


def save_chat_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a tiny random language model with this tokenizer."""
    decoder = tiny_decoder(
        "llama",
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=256,
    )
    decoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
