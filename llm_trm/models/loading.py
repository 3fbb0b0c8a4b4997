"""Loads a causal language model that can think: a local folder, a hub model, or the bundled model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_trm.data.lessons import encode_each, question_prompt
from llm_trm.data.passages import Passage, own_token
from llm_trm.data.tags import END_THINK, THINK
from llm_trm.data.templates import chat_template
from llm_trm.errors import InputError, few, one_line
from llm_trm.extras import require
from llm_trm.manifest import require_same_model
from llm_trm.models.own_files import require_no_pointers, require_own_files, require_weights
from llm_trm.weights import RESTORE, require_finite

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: ``--model arithmetic``: the language model of the arithmetic world, inside the package.
ARITHMETIC = "arithmetic"
_ARITHMETIC_FOLDER = Path(__file__).parent / "arithmetic"


class UntrustedCodeError(InputError):
    """A model needs its own Python code, and the user has not allowed that code to run."""


@dataclass(frozen=True)
class ThinkingModel:
    """A frozen causal language model, its tokenizer, and the tokens that delimit its thinking.

    Attributes:
        name: The name it was loaded by.
        model: The model in eval mode. No parameter requires a gradient.
        tokenizer: The tokenizer, which pads on the left.
        think, end_think: Ids of ``<think>`` and ``</think>``.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    think: int
    end_think: int

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    def prompt(self, question: str, *, thinking: bool = True) -> Passage:
        """``question`` as the user's turn of a chat, up to where the model starts to write."""
        return question_prompt(self.tokenizer, question, "chat", thinking=thinking, recurs=False)

    def encode(self, questions: Sequence[str]) -> list[list[int]]:
        """Encode the :meth:`prompt` of each question.

        Raises:
            InputError: The chat template changes a question, or a question contains a special token that
                cannot be encoded as ordinary text.
        """
        return encode_each(self.tokenizer, [self.prompt(question) for question in questions], "chat")


def load_thinking_model(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> ThinkingModel:
    """Load a language model to read its hidden states.

    Args:
        name: ``"arithmetic"``, a folder in Hugging Face format, or the name of a model on the hub, for
            instance ``"HuggingFaceTB/SmolLM3-3B"``.
        device: Device to load the model onto.
        dtype: Dtype of the weights; by default bfloat16 on CUDA and float32 elsewhere.
        trust_remote_code: Allow the model's own Python files to run if it needs them.

    Raises:
        InputError: The model does not exist, lacks ``<think>`` and ``</think>`` tokens, or lacks a chat
            template that contains the question and supports thinking.
    """
    require("train", "transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = language_model_source(name)
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    trusted = {"trust_remote_code": trust_remote_code}
    tokenizer = pretrained(AutoTokenizer, name, source, **trusted)
    think, end_think = (_tag(tokenizer, tag, name) for tag in (THINK, END_THINK))
    if not tokenizer.chat_template:
        raise InputError(f"model {name}: its tokenizer has no chat template; use an instruction-tuned model")
    chat_template(tokenizer).require_thinking()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = pretrained(AutoModelForCausalLM, name, source, dtype=dtype, **trusted).to(device).eval()
    return ThinkingModel(name, model.requires_grad_(False), tokenizer, think, end_think)


def language_model_source(name: str) -> str:
    """The path or hub name from which transformers loads the language model ``name``."""
    return str(_ARITHMETIC_FOLDER) if name == ARITHMETIC else name


def pretrained(kind: Any, name: str, source: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Call ``kind.from_pretrained(source)`` without progress bars.

    A model's own Python files run only with ``trust_remote_code``. The option is always passed to
    transformers: otherwise it prompts on standard input, where the next question may be waiting, and reads
    a ``y`` as consent.

    Raises:
        InputError: The model does not exist, a file of it is missing or invalid, its weights are incomplete
            or contain NaN, or it does not fit into memory. The message calls it ``name``, as the user does.
        UntrustedCodeError: The model needs code of its own. Kernels on the hub are rejected as well.
    """
    import torch
    from transformers import AutoConfig

    from llm_trm.models.decoder_config import require_buildable, require_valid_decoding, require_valid_values
    from llm_trm.models.hub_code import require_no_hub_kernels, without_hub_decoding

    folder = Path(source)
    builds = kind.__name__ in ("AutoModelForCausalLM", "TRMForCausalLM")
    if folder.is_dir():
        require_own_files(folder)
        if builds:
            require_weights(folder)
            require_same_model(folder, RESTORE)
    options["trust_remote_code"] = trust_remote_code
    known = {key: options[key] for key in ("trust_remote_code", "revision") if key in options}
    try:
        with no_bars():
            described = _description(source, **known)
            if not trust_remote_code:
                require_no_hub_kernels(described, folder, f"model {name}: ")
            # Reject sizes for which transformers would allocate until the process is killed.
            require_valid_values(described, f"model {name}: config.json: ")
            if builds or (kind is not AutoConfig and described):
                # Load the config first: a tokenizer would warn about an unknown model type.
                config = AutoConfig.from_pretrained(source, **known)
            if not builds:
                return kind.from_pretrained(source, **options)
            require_valid_decoding(folder / "generation_config.json")
            require_buildable(name, config, options.get("dtype"), trust_remote_code=trust_remote_code)
            with _report_held_back():
                model, info = kind.from_pretrained(source, output_loading_info=True, **options)
                _require_complete(name, model, info)
            return without_hub_decoding(model)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # Code of transformers, and perhaps the model's own, on a user's files: any exception can result.
    except Exception as error:
        if isinstance(error, InputError) and (name in str(error) or source in str(error)):
            raise  # the message is complete
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise UntrustedCodeError(
                f"model {name} comes with Python code, which was not run: read its .py files, and "
                "pass --trust-remote-code if you trust them"
            ) from error
        if isinstance(error, ImportError):
            # A failing import in our own code is not the model's fault.
            if (error.name or "").partition(".")[0] in ("llm_trm", "trm_kernels"):
                raise
            raise InputError(
                f"model {name} needs a package that is not installed ({one_line(error)}): install it, or "
                "choose another model"
            ) from error
        if folder.is_dir():
            require_no_pointers(folder)
        if isinstance(error, RuntimeError) and "mismatch" in str(error):
            raise InputError(
                f"model {name}: the shapes of its weights do not match its config.json: {RESTORE}"
            ) from error
        raise InputError(
            f"model {name} cannot be loaded ({one_line(error)}): name a folder in Hugging Face format, a "
            f"model on the hub, or {ARITHMETIC!r}"
        ) from error


def _description(source: str, **options: Any) -> dict[str, Any]:
    """The content of ``config.json`` before transformers turns it into an object; empty if it is missing."""
    from transformers import PretrainedConfig

    try:
        described, _ = PretrainedConfig.get_config_dict(source, **options)
    except Exception:
        return {}  # loading the model reports the error
    return dict(described)


def require_padding(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad with the end token if a tokenizer has no padding token.

    Raises:
        InputError: It has neither.
    """
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"model {name}: its tokenizer has neither a padding nor an end token: set one in its "
            "tokenizer_config.json"
        )
    tokenizer.pad_token = tokenizer.eos_token


def _require_complete(name: str, model: Any, info: dict[str, Any]) -> None:
    """Raise InputError if a loaded model has weights that its files lack, or that contain NaN.

    transformers draws missing weights at random, and only prints a table of them.

    Args:
        info: What ``from_pretrained`` returned with ``output_loading_info``.
    """
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"model {name} lacks {len(missing)} of its weights ({few(missing)}): {RESTORE}")
    require_finite(model.named_parameters(), f"model {name}", RESTORE)


@contextmanager
def _report_held_back() -> Iterator[None]:
    """Hold back transformers' table of missing and unexpected weights, in case an error replaces it."""
    from transformers.utils.logging import get_logger

    held: list[logging.LogRecord] = []

    class Hold(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            held.append(record)
            return False

    logger, hold = get_logger("transformers.modeling_utils"), Hold()
    logger.addFilter(hold)
    try:
        yield
    finally:
        logger.removeFilter(hold)
    for record in held:
        logger.handle(record)


@contextmanager
def no_bars() -> Iterator[None]:
    """Disable transformers' progress bars, which finish at once and break the lines printed next."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tag(tokenizer: PreTrainedTokenizerBase, tag: str, name: str) -> int:
    found = own_token(tokenizer, tag)
    if found is None:
        count = len(tokenizer.encode(tag, add_special_tokens=False))
        raise InputError(
            f"model {name}: {tag} is {f'{count} tokens' if count > 1 else 'no token'} of its vocabulary, "
            f"instead of one; use a model that thinks between {THINK} and {END_THINK}, for instance "
            "HuggingFaceTB/SmolLM3-3B"
        )
    return found
