"""Modes of answering of a language model: directly, after written-out thinking, or after a recursion."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llm_trm.choices import PromptForm
from llm_trm.data.lessons import encode_prompt, prompt_form, question_prompt
from llm_trm.data.tags import END_THINK, THINK
from llm_trm.data.templates import chat_template
from llm_trm.errors import InputError
from llm_trm.evaluate.answers import answer_tokens, own_answer, written_length
from llm_trm.evaluate.decoding import Decoding, Mode
from llm_trm.models.causal.card import inner
from llm_trm.models.causal.loading import ADAPTERS_FILE, LatentModel, load_latent_model
from llm_trm.models.causal.modeling import TRMForCausalLM
from llm_trm.models.causal.tokens import think_ids
from llm_trm.models.loading import language_model_source, pretrained, require_padding
from llm_trm.ranges import shown
from llm_trm.upstream import cache_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

#: Arguments of ``generate`` that disable repetition penalties. Without them the model's own settings would
#: apply, which many instruction-tuned models have.
UNPENALISED: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


@dataclass(frozen=True)
class Reply:
    """A model's reply.

    Attributes:
        text: The whole text, including thinking.
        answer: The text after the thinking; empty if the thinking never ended.
        tokens: Number of generated tokens, including the end token.
        finished: Whether the model ended the reply.
        steps: Supervision steps of each recursion; empty for the plain model.
    """

    text: str
    answer: str
    tokens: int
    finished: bool
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Responder:
    """A language model that answers questions in one mode.

    Attributes:
        mode: The mode.
        name: The name that the model was loaded by.
        model: The model in eval mode.
        tokenizer: The tokenizer for prompts of this mode.
        form: Prompt form.
        without_adapters: Whether to disable the adapters in ``model``.
    """

    mode: Mode
    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    form: PromptForm
    without_adapters: bool = False

    @property
    def context(self) -> int | None:
        """Size of the decoder's context in positions; None if its configuration does not give it."""
        config = getattr(self.model.config, "text_config", self.model.config)
        positions = getattr(config, "max_position_embeddings", None)
        return None if positions is None else int(positions)

    @property
    def soft_tokens(self) -> int:
        """Number of soft tokens per recursion."""
        return int(self.model.config.tokens_per_thought) if self.mode == "latent" else 0

    @property
    def ends(self) -> set[int]:
        """Ids of the tokens that end a generation."""
        return end_tokens(self.model, self.tokenizer)

    def encode(self, question: str) -> list[int]:
        """Encode the prompt for a question.

        Raises:
            InputError: The prompt does not fit the context; also see :func:`question_prompt` and
                :func:`encode_prompt`.
        """
        asked = question_prompt(
            self.tokenizer,
            question,
            self.form,
            thinking=self.mode != "no-think",
            recurs=self.mode == "latent",
        )
        prompt = encode_prompt(self.tokenizer, asked, self.form)
        if self.context is not None and len(prompt) >= self.context:
            raise InputError(
                f"the question {shown(question)} gives a prompt of {len(prompt)} tokens, but {self.name} "
                f"has a context of {self.context}: shorten the question"
            )
        return prompt

    @torch.no_grad()
    def reply(
        self, prompts: Sequence[list[int]], decoding: Decoding, streamer: BaseStreamer | None = None
    ) -> tuple[list[Reply], float]:
        """Answer a batch. Returns the replies and the generation time in seconds.

        Args:
            prompts: Prompts from :meth:`encode`.
            decoding: Decoding settings.
            streamer: Receives the tokens of a single prompt as they are generated.
        """
        model, device = self.model, self.model.device
        inputs = self.tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
        options: dict[str, Any] = {}
        if isinstance(inner(model), TRMForCausalLM):
            options["use_trm"] = self.mode == "latent"
        # Outside the timed block, because peft visits every layer to disable adapters.
        with model.disable_adapter() if self.without_adapters else nullcontext():
            inputs = inputs.to(device)
            with _timed(device) as clock:
                made = model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    generation_config=_generation_config(
                        decoding, int(self.tokenizer.pad_token_id), self.ends, self._unwritten()
                    ),
                    streamer=streamer,
                    **options,
                )
        written = made.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        steps = getattr(cache_of(made), "steps", None)
        thoughts: list[Any] = [[] for _ in written] if steps is None else steps.tolist()
        replies = [self._reply(*row) for row in zip(prompts, written, thoughts, strict=True)]
        return replies, clock[0]

    def _unwritten(self) -> list[int]:
        """``<think>``, if the model should answer directly but the prompt does not prevent thinking."""
        tags = _tags(self.tokenizer)
        if self.mode != "no-think" or tags is None:
            return []
        return [] if self.form == "chat" and chat_template(self.tokenizer).silences else [tags[0]]

    def _reply(self, prompt: list[int], written: list[int], steps: list[int]) -> Reply:
        length, finished = written_length(written, self.ends)
        written = written[:length]
        answer = answer_tokens(prompt, written, _tags(self.tokenizer), open_ended=self.form == "plain")
        text = self._decode(answer or [])
        if self.form == "plain":
            # A model that continues with its own question has finished answering ours.
            text, asked = own_answer(text)
            finished = finished or asked
        return Reply(
            self._decode(written), text.strip(), length, finished, tuple(step for step in steps if step)
        )

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def load_responders(
    modes: Sequence[Mode],
    checkpoint: str | Path | None,
    model: str | None,
    device: torch.device | str = "cpu",
    *,
    trust_remote_code: bool = False,
) -> tuple[dict[Mode, Responder], dict[Mode, str]]:
    """Load responders for the modes that can run, and the reasons why the others cannot.

    The plain language model is the checkpoint's model with its adapters disabled, if it has adapters, and
    otherwise the checkpoint's base. A given ``model`` is loaded separately. This needs additional memory but
    avoids the overhead of idle adapters, which took 1% (no-think) and 7% (think) of the arithmetic model's
    time on two busy cores, medians of 10 runs.

    Args:
        modes: Requested modes.
        checkpoint: A model with a recursion, see :func:`load_latent_model`.
        model: The plain language model; None for the checkpoint's.
        device: Device of the models.
        trust_remote_code: Allow a language model's own Python files to run if it needs them.

    Raises:
        InputError: A model cannot be loaded, or neither is given.
    """
    if checkpoint is None and model is None:
        raise InputError("name a model with a recursion with --checkpoint, or a plain one with --model")
    latent = None
    if checkpoint is not None:
        latent = load_latent_model(checkpoint, device, trust_remote_code=trust_remote_code)
    responders: dict[Mode, Responder] = {}
    missing: dict[Mode, str] = {}
    plain: Responder | str | None = None
    for mode in dict.fromkeys(modes):
        if mode == "latent":
            if latent is None:
                missing[mode] = (
                    f"{model} is a plain language model without a recursion: use --checkpoint to name one "
                    "that `llm-trm train lora` wrote"
                )
            else:
                responders[mode] = Responder(
                    mode, latent.name, latent.model, latent.tokenizer, latent.prompt_form
                )
            continue
        if plain is None:
            plain = _plain_responder(latent, model, device, trust_remote_code)
        reason = plain if isinstance(plain, str) else _thinking_fault(plain) if mode == "think" else None
        if reason is not None:
            missing[mode] = reason
        else:
            assert isinstance(plain, Responder)
            responders[mode] = replace(plain, mode=mode)
    return responders, missing


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the end tokens of ``model`` and of the tokenizer, which ends the answers in training."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    own = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return {int(end) for end in (*own, tokenizer.eos_token_id) if end is not None}


def _plain_responder(
    latent: LatentModel | None, name: str | None, device: torch.device | str, trust_remote_code: bool
) -> Responder | str:
    """The responder of the plain language model, or the reason why there is none."""
    if latent is not None and latent.has_adapters and name is None:
        assert latent.base is not None
        tokenizer = _tokenizer(latent.base, trust_remote_code)
        return Responder("no-think", latent.base, latent.model, tokenizer, prompt_form(tokenizer), True)
    name = name or (latent.base if latent is not None else None)
    if name is None:
        assert latent is not None
        return f"the base of {latent.name} is unknown: name it with --model"
    if (Path(name) / ADAPTERS_FILE).exists():
        raise InputError(f"--model {name} contains adapters, not a plain model: name it with --checkpoint")
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    tokenizer = _tokenizer(name, trust_remote_code)
    model = pretrained(
        AutoModelForCausalLM,
        name,
        language_model_source(name),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if isinstance(model, TRMForCausalLM):
        raise InputError(f"--model {name} is a model with a recursion: name it with --checkpoint")
    return Responder("no-think", name, model.to(device).eval(), tokenizer, prompt_form(tokenizer))


def _tokenizer(name: str, trust_remote_code: bool) -> Any:
    tokenizer = pretrained(
        AutoTokenizer, name, language_model_source(name), trust_remote_code=trust_remote_code
    )
    require_padding(name, tokenizer)
    return tokenizer


def _thinking_fault(plain: Responder) -> str | None:
    """The reason why a plain model cannot be prompted to think; None if it can."""
    if plain.form == "plain":
        return f"{plain.name} has no chat template, so it cannot be prompted to think"
    if _tags(plain.tokenizer) is None:
        return f"{plain.name} has no {THINK} and {END_THINK} tokens to think between"
    template = chat_template(plain.tokenizer)
    if not (template.switches or template.opens) or template.thinking.closes:
        return f"the chat template of {plain.name} does not turn thinking on or off (enable_thinking)"
    return None


def _tags(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    try:
        return think_ids(tokenizer)
    except InputError:
        return None


@contextmanager
def _timed(device: torch.device) -> Iterator[list[float]]:
    """Yield a list that contains the block's duration in seconds after it ends."""
    clock: list[float] = []
    _synchronize(device)
    start = time.perf_counter()
    yield clock
    _synchronize(device)
    clock.append(time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _generation_config(
    decoding: Decoding, pad: int, ends: set[int], never: Sequence[int] = ()
) -> GenerationConfig:
    """For ``generate``; sets everything, or the model's own settings would fill the gaps.

    Args:
        pad, ends: Ids of the padding token, and of tokens that end what is written.
        never: Ids of tokens that are not written.
    """
    drawn = decoding.temperature > 0
    # Only when sampling: otherwise transformers warns.
    options: dict[str, Any] = {"min_p": 0.0} if drawn else {}
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=drawn,
        num_beams=1,
        # Without sampling, the values that transformers considers neutral: it warns of any other.
        temperature=decoding.temperature if drawn else 1.0,
        top_p=decoding.top_p if drawn else 1.0,
        top_k=decoding.top_k if drawn else 50,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
        suppress_tokens=list(never) or None,
        return_dict_in_generate=True,
        **UNPENALISED,
        **options,
    )
