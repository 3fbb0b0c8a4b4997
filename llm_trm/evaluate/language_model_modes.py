"""A language model's ways of answering: at once, after written-out thinking, or after a recursion."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llm_trm.choices import PromptForm
from llm_trm.data.lessons import encode_prompt, prompt_form, question_prompt
from llm_trm.data.tags import END_THINK, THINK
from llm_trm.data.templates import chat_template
from llm_trm.errors import InputError, shortened
from llm_trm.evaluate.answers import answer_tokens, own_answer, written_length
from llm_trm.models.causal.card import inner
from llm_trm.models.causal.loading import ADAPTERS_FILE, LatentModel, load_latent_model
from llm_trm.models.causal.modeling import TRMForCausalLM
from llm_trm.models.causal.tokens import think_ids
from llm_trm.models.loading import language_model_source, pretrained
from llm_trm.upstream import cache_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

#: ``no-think``: the plain language model answers at once. ``think``: it writes its thinking first.
#: ``latent``: the trained model recurs at ``<think>`` instead.
Mode = Literal["no-think", "think", "latent"]
MODES: tuple[Mode, ...] = get_args(Mode)

#: Of ``generate``: no token is less likely than the model says for having been written before. What is not
#: said here, the model's own settings say, as those of many instruction-tuned models do.
UNPENALISED: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Args:
        max_new_tokens: Where an answer that does not end is cut.
        temperature: 0 takes the likeliest token.
        top_p, top_k: Draw from the likeliest tokens, by their probability and by their number; 1 and 0 draw
            from all.

    Raises:
        InputError: A value outside of its range.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise InputError("--top-p must be over 0 and at most 1, and --top-k not negative")

    def config(self, pad: int, ends: set[int], never: Sequence[int] = ()) -> GenerationConfig:
        """For ``generate``; says everything, or the model's own settings would fill the gaps.

        Args:
            pad, ends: Ids of the padding token, and of tokens that end what is written.
            never: Ids of tokens that are not written.
        """
        drawn = self.temperature > 0
        # Only where something is drawn: transformers warns of it elsewhere.
        options: dict[str, Any] = {"min_p": 0.0} if drawn else {}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=drawn,
            num_beams=1,
            # Where nothing is drawn, what transformers holds for neutral: it warns of anything else.
            temperature=self.temperature if drawn else 1.0,
            top_p=self.top_p if drawn else 1.0,
            top_k=self.top_k if drawn else 50,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
            suppress_tokens=list(never) or None,
            return_dict_in_generate=True,
            **UNPENALISED,
            **options,
        )


@dataclass(frozen=True)
class Reply:
    """What a model wrote.

    Attributes:
        text: All of it, thinking included.
        answer: What stands behind the thinking; empty if that never ended.
        tokens: Written, the end token included.
        finished: Whether the model ended it.
        steps: Supervision steps of each recursion; none in the modes of the plain model.
    """

    text: str
    answer: str
    tokens: int
    finished: bool
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Speaker:
    """A language model in one of its modes.

    Attributes:
        mode: Which.
        name: What it was loaded by.
        model: In eval mode.
        tokenizer: Of the prompts of this mode.
        form: How it is asked.
        without_adapters: Whether the adapters in ``model`` are to be off.
    """

    mode: Mode
    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    form: PromptForm
    without_adapters: bool = False

    @property
    def context(self) -> int | None:
        """Positions of the decoder's context; None if its configuration does not say."""
        config = getattr(self.model.config, "text_config", self.model.config)
        positions = getattr(config, "max_position_embeddings", None)
        return None if positions is None else int(positions)

    @property
    def soft_tokens(self) -> int:
        """That one recursion appends."""
        return int(self.model.config.tokens_per_thought) if self.mode == "latent" else 0

    @property
    def ends(self) -> set[int]:
        """Ids that end what the model writes."""
        return end_tokens(self.model, self.tokenizer)

    def encode(self, question: str) -> list[int]:
        """The tokens of a prompt.

        Raises:
            InputError: They do not fit the context; or see :func:`question_prompt`, :func:`encode_prompt`.
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
                f"the question {shortened(question)} makes a prompt of {len(prompt)} tokens, and {self.name} "
                f"has a context of {self.context}: shorten it"
            )
        return prompt

    @torch.no_grad()
    def reply(
        self, prompts: Sequence[list[int]], decoding: Decoding, streamer: BaseStreamer | None = None
    ) -> tuple[list[Reply], float]:
        """Answer a batch; returns the replies and the seconds that the generation took.

        Args:
            prompts: As :meth:`encode` makes them.
            decoding: How tokens are chosen.
            streamer: Sees the tokens of a single prompt as they come.
        """
        model, device = self.model, self.model.device
        inputs = self.tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
        options: dict[str, Any] = {}
        if isinstance(inner(model), TRMForCausalLM):
            options["use_trm"] = self.mode == "latent"
        # Entered before the clock starts: peft looks at every layer for it.
        with model.disable_adapter() if self.without_adapters else nullcontext():
            inputs = inputs.to(device)
            with _timed(device) as clock:
                made = model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    generation_config=decoding.config(
                        int(self.tokenizer.pad_token_id), self.ends, self._unwritten()
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
        """``<think>``, where the model is to answer at once and the prompt does not keep it from thinking."""
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
            # Where a model goes on with a question of its own, it has answered ours.
            text, asked = own_answer(text)
            finished = finished or asked
        return Reply(
            self._decode(written), text.strip(), length, finished, tuple(step for step in steps if step)
        )

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def load_speakers(
    modes: Sequence[Mode],
    checkpoint: str | Path | None,
    model: str | None,
    device: torch.device | str = "cpu",
    *,
    trust_remote_code: bool = False,
) -> tuple[dict[Mode, Speaker], dict[Mode, str]]:
    """Models for the modes that can run, and why the others cannot.

    The plain language model is the checkpoint's own with its adapters off, where it has some, and otherwise
    the one that it names as its base. One that ``model`` names is loaded by itself: that takes its memory
    once more, and spares it the idle adapters, which took the arithmetic model 1% (no-think) and 7% (think)
    of its time on two busy cores, medians of 10 turns.

    Args:
        modes: Wanted.
        checkpoint: Of a model with a recursion, as :func:`load_latent_model` takes it.
        model: The plain language model; None for the checkpoint's.
        device: Where they run.
        trust_remote_code: Run the Python files that a language model brings, if it needs them.

    Raises:
        InputError: A model that cannot be loaded, or neither of the two.
    """
    if checkpoint is None and model is None:
        raise InputError("name a model with a recursion by --checkpoint, or a plain one by --model")
    latent = None
    if checkpoint is not None:
        latent = load_latent_model(checkpoint, device, trust_remote_code=trust_remote_code)
    speakers: dict[Mode, Speaker] = {}
    missing: dict[Mode, str] = {}
    plain: Speaker | str | None = None
    for mode in dict.fromkeys(modes):
        if mode == "latent":
            if latent is None:
                missing[mode] = (
                    f"{model} is a plain language model without a recursion: name one that `llm-trm train "
                    "lora` wrote by --checkpoint"
                )
            else:
                speakers[mode] = Speaker(
                    mode, latent.name, latent.model, latent.tokenizer, latent.prompt_form
                )
            continue
        if plain is None:
            plain = _plain_speaker(latent, model, device, trust_remote_code)
        reason = plain if isinstance(plain, str) else _why_not(plain) if mode == "think" else None
        if reason is not None:
            missing[mode] = reason
        else:
            assert isinstance(plain, Speaker)
            speakers[mode] = replace(plain, mode=mode)
    return speakers, missing


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end what ``model`` writes: its own and the tokenizer's, with which answers end in training."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    own = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return {int(end) for end in (*own, tokenizer.eos_token_id) if end is not None}


def _plain_speaker(
    latent: LatentModel | None, name: str | None, device: torch.device | str, trust_remote_code: bool
) -> Speaker | str:
    """The plain language model, or why there is none."""
    if latent is not None and latent.has_adapters and name is None:
        assert latent.base is not None
        tokenizer = _tokenizer(latent.base, trust_remote_code)
        return Speaker("no-think", latent.base, latent.model, tokenizer, prompt_form(tokenizer), True)
    name = name or (latent.base if latent is not None else None)
    if name is None:
        assert latent is not None
        return f"{latent.name} does not say what its base was: name it by --model"
    if (Path(name) / ADAPTERS_FILE).exists():
        raise InputError(f"--model {name} holds adapters, and no plain model: name it by --checkpoint")
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
        raise InputError(f"--model {name} is a model with a recursion: name it by --checkpoint")
    return Speaker("no-think", name, model.to(device).eval(), tokenizer, prompt_form(tokenizer))


def _tokenizer(name: str, trust_remote_code: bool) -> Any:
    tokenizer = pretrained(
        AutoTokenizer, name, language_model_source(name), trust_remote_code=trust_remote_code
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _why_not(plain: Speaker) -> str | None:
    """Why a plain model cannot be told to think; None if it can."""
    if plain.form == "plain":
        return f"{plain.name} has no chat template, and so no way to be told to think"
    if _tags(plain.tokenizer) is None:
        return f"{plain.name} has no {THINK} and {END_THINK}, between which it would think"
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
    """Gives a list that holds the seconds of the block when it has ended."""
    clock: list[float] = []
    _wait_for(device)
    begun = time.perf_counter()
    yield clock
    _wait_for(device)
    clock.append(time.perf_counter() - begun)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
