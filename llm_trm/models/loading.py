"""Loads a causal language model that thinks, by name, path, or as the one that ships with this package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_trm.data.lessons import encode_each, question_prompt
from llm_trm.data.passages import Passage, own_token
from llm_trm.data.tags import END_THINK, THINK
from llm_trm.data.templates import chat_template
from llm_trm.errors import InputError, one_line
from llm_trm.extras import require
from llm_trm.files import named_in, read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: ``--model arithmetic``: the language model of the arithmetic world, inside the package.
ARITHMETIC = "arithmetic"
_ARITHMETIC_FOLDER = Path(__file__).parent / "arithmetic"


class UntrustedCodeError(InputError):
    """A model needs Python code that it brings, and nobody has said that it may run."""


@dataclass(frozen=True)
class ThinkingModel:
    """A frozen causal language model, its tokenizer, and the tokens that its thinking lies between.

    Attributes:
        name: What it was loaded by.
        model: In eval mode, no parameter needs a gradient.
        tokenizer: Pads on the left.
        think, end_think: Ids of ``<think>`` and ``</think>``.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    think: int
    end_think: int

    @property
    def hidden_size(self) -> int:
        """Width D of its hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    def prompt(self, question: str, *, thinking: bool = True) -> Passage:
        """``question`` as the user's turn of a chat, up to where the model begins to write."""
        return question_prompt(self.tokenizer, question, "chat", thinking=thinking, recurs=False)

    def encode(self, questions: Sequence[str]) -> list[list[int]]:
        """Tokens of the :meth:`prompt` of each question.

        Raises:
            InputError: The chat template changes a question, or it names a token that cannot be written out.
        """
        return encode_each(self.tokenizer, [self.prompt(question) for question in questions], "chat")


def load_thinking_model(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> ThinkingModel:
    """Load a language model for reading its states.

    Args:
        name: ``"arithmetic"``, a folder in Hugging Face format, or a name on the hub, for instance
            ``"HuggingFaceTB/SmolLM3-3B"``.
        device: Where it runs.
        dtype: Of its weights; by default bfloat16 on CUDA and float32 elsewhere.
        trust_remote_code: Run the Python files that the model brings, if it needs them.

    Raises:
        InputError: No such model, or one without ``<think>`` and ``</think>`` tokens or without a chat
            template that holds the question and lets it think.
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
    """What transformers loads a language model of this name from."""
    return str(_ARITHMETIC_FOLDER) if name == ARITHMETIC else name


def pretrained(kind: Any, name: str, source: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """``kind.from_pretrained(source)``, quietly.

    Python files that come with a model run for ``trust_remote_code`` alone. transformers is always told:
    otherwise it asks on standard input, where the next question may stand, and takes a ``y`` for a yes.

    Raises:
        InputError: There is no such model, its numbers make no sense, or it fits no memory; ``name`` is what
            the user calls it.
        UntrustedCodeError: It needs code of its own. Kernels that it names on the hub are refused as well.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from llm_trm.models.decoder_numbers import require_buildable, require_numbers
    from llm_trm.models.hub_code import require_no_hub_kernels, without_hub_decoding

    folder = Path(source)
    if folder.is_dir():
        require_own_files(folder)
    builds = kind.__name__ in ("AutoModelForCausalLM", "TRMForCausalLM")
    options["trust_remote_code"] = trust_remote_code
    known = {key: options[key] for key in ("trust_remote_code", "revision") if key in options}
    try:
        with no_bars():
            described = _description(source, **known)
            if not trust_remote_code:
                require_no_hub_kernels(described, folder, f"model {name}: ")
            # What transformers would build until the process is killed is refused before.
            require_numbers(described, f"model {name}: config.json: ")
            if builds or (kind is not AutoConfig and described):
                # First, since a tokenizer would warn of a type that it does not know.
                config = AutoConfig.from_pretrained(source, **known)
                if builds:
                    require_buildable(name, config, options.get("dtype"), trust_remote_code=trust_remote_code)
            return without_hub_decoding(kind.from_pretrained(source, **options))
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError) as error:
        if isinstance(error, InputError) and name in str(error):
            raise  # it says all that there is to say
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise UntrustedCodeError(
                f"model {name} brings Python code of its own, which was not run: read its .py files, and "
                "pass --trust-remote-code if you trust them"
            ) from error
        if isinstance(error, ImportError):
            # Code of ours that does not import is no fault of the model.
            if (error.name or "").partition(".")[0] in ("llm_trm", "trm_kernels"):
                raise
            raise InputError(
                f"model {name} needs a package that is not here ({one_line(error)}): install it, or choose "
                "a model that needs none"
            ) from error
        raise InputError(
            f"model {name} cannot be loaded ({one_line(error)}): name a folder in Hugging Face format, a "
            f"model on the hub, or {ARITHMETIC!r}"
        ) from error


def _description(source: str, **options: Any) -> dict[str, Any]:
    """What ``config.json`` holds, before transformers makes an object of it; nothing where it is missing."""
    from transformers import PretrainedConfig

    try:
        described, _ = PretrainedConfig.get_config_dict(source, **options)
    except (OSError, ValueError):
        return {}  # whoever loads it says so
    return dict(described)


def require_own_files(folder: Path) -> None:
    """Check what the files of a model's folder name, which transformers follows wherever it leads.

    Raises:
        InputError: One is broken, or names a file outside the folder.
    """
    remedy = "load a model whose files all lie in its own folder"

    def entries(path: Path, key: str) -> Any:
        content = read_json(path, remedy) if path.exists() else {}
        if not isinstance(content, dict):
            raise InputError(f"{path} holds no JSON object: {remedy}")
        return content.get(key)

    named: list[tuple[Path, Any]] = []
    for path in sorted(folder.glob("*.index.json")):
        weights = entries(path, "weight_map")
        if not isinstance(weights, dict):
            raise InputError(f"{path} is no index of weights: {remedy}")
        named += [(path, name) for name in dict.fromkeys(map(str, weights.values()))]
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    if (name := entries(config, "transformers_weights")) is not None:
        named.append((config, name))
    named += [(tokenizer, name) for name in entries(tokenizer, "fast_tokenizer_files") or ()]
    for path, name in named:
        named_in(folder, name, path, remedy)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' bars, which are over in a blink and break the lines of what is printed next."""
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
            f"model {name}: {tag} is {f'{count} tokens' if count > 1 else 'no token'} of its vocabulary, not "
            f"one; use a model that thinks between {THINK} and {END_THINK}, for instance "
            "HuggingFaceTB/SmolLM3-3B"
        )
    return found
