"""A language model with SmolLM3's architecture, small enough to train on two CPU cores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_trm.data.tags import END_THINK, THINK

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"

#: Concatenates the messages. As in SmolLM3's template, an empty trace in the prompt turns thinking off.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message.role + '|>' + message.content -}}
{%- if message.role == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think></think>' -}}{%- endif -%}
{%- endif -%}"""

#: Settings of ``transformers.SmolLM3Config`` by preset name.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, which can encode any text, six special tokens and a chat template.

    The template accepts ``enable_thinking`` as SmolLM3's does. By default or with True, the model should
    write ``<think>`` itself. With False, the prompt ends in an empty trace.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, USER, ASSISTANT, END)])
    # Not special, as in SmolLM3's tokenizer: the tags are part of the output and survive skip_special_tokens.
    tokenizer.add_tokens([AddedToken(token, special=False) for token in (THINK, END_THINK)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left"
    )
    wrapped.chat_template = _CHAT_TEMPLATE
    return wrapped


def tiny_language_model(
    tokenizer: PreTrainedTokenizerFast, preset: str = "tiny", seed: int = 0
) -> PreTrainedModel:
    """An untrained ``SmolLM3ForCausalLM`` with tied embeddings for ``tokenizer``, in float32."""
    import torch
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    config = SmolLM3Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        **PRESETS[preset],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmolLM3ForCausalLM(config)
