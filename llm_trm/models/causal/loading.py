"""Saves and loads language models with a recursion: complete, or as adapters with the name of their base."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from llm_trm.choices import PromptForm
from llm_trm.data.lessons import prompt_form, prompts_fingerprint
from llm_trm.errors import InputError, one_line
from llm_trm.extras import require
from llm_trm.files import read_object
from llm_trm.manifest import require_same_model
from llm_trm.models.causal.card import EVALUATION_FILE, About, about, inner, read_evaluation, write_about
from llm_trm.models.causal.card import FACTS_FILE as FACTS_FILE
from llm_trm.models.causal.config import TRMConfig
from llm_trm.models.causal.modeling import TRMForCausalLM
from llm_trm.models.hub_code import require_own_kernels
from llm_trm.models.loading import language_model_source, pretrained, require_padding
from llm_trm.ranges import ADAPTER_RANK, SHARE_BELOW_ONE, VOCABULARY, WEIGHT, Range, Whole, require_in, shown

#: Only folders of adapters have this file.
ADAPTERS_FILE = "adapter_config.json"
_ADAPTERS: dict[str, Range] = {"r": ADAPTER_RANK, "lora_alpha": WEIGHT, "lora_dropout": SHARE_BELOW_ONE}
#: The same settings for single layers, by layer name.
_PATTERNS: dict[str, Range] = {"rank_pattern": ADAPTER_RANK, "alpha_pattern": WEIGHT}
_TOKEN = Whole(0, VOCABULARY.most)
_CONFIG_FILE = "config.json"
_PART = "[0-9]" * 5
_REMEDY = "name a folder that `llm-trm train lora` or `llm-trm train phase3` wrote"


@dataclass(frozen=True)
class LatentModel:
    """A language model that recurs at ``<think>``, and the prompt form it was trained with.

    Attributes:
        name: The name it was loaded by.
        model: A ``TRMForCausalLM``, or a ``PeftModel`` around one; in eval mode.
        tokenizer: The tokenizer, which pads on the left.
        base: Name or folder of the wrapped language model; None if unknown.
        prompt_form: Prompt form of the training.
        facts: Other saved metadata: settings and metrics.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    base: str | None
    prompt_form: PromptForm
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def has_adapters(self) -> bool:
        """Whether the model has adapters that can be turned off to get the base."""
        return hasattr(self.model, "disable_adapter")

    def push_to_hub(self, repo_id: str, **options: Any) -> None:
        """Upload the model, its card and its tokenizer with transformers' ``push_to_hub(**options)``."""
        self.model.push_to_hub(repo_id, **options)
        self.tokenizer.push_to_hub(repo_id, **options)

    @property
    def config(self) -> TRMConfig:
        """The model's configuration."""
        config: TRMConfig = self.model.config
        return config


def save_latent_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    base: str | None,
    prompt_form: PromptForm,
    merge: bool = False,
    state_dict: dict[str, Any] | None = None,
    **facts: Any,
) -> None:
    """Save a model for :func:`load_latent_model`.

    Args:
        model: A ``TRMForCausalLM``, which is saved completely, or a ``PeftModel`` around one, of which the
            adapters and the reasoner are saved.
        tokenizer: The tokenizer to save with the model.
        folder: Output folder, created if missing.
        base: Name or folder of the wrapped language model. Loading adapters needs it.
        prompt_form: Prompt form of the training.
        merge: Merge the adapters into the weights, and save all weights. ``model`` loses its adapters.
        state_dict: Weights gathered from the processes of a sharded run; by default the model's own.
        **facts: JSON values to save with the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if merge and hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    # The evaluation belongs to the model's own weights, not to a given state_dict.
    measured = about(model).evaluation if state_dict is None else None
    inner(model).about = About(
        base, prompt_form, facts, measured, prompts_fingerprint(tokenizer, prompt_form)
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder, **({} if state_dict is None else {"state_dict": state_dict}))
    write_about(model, folder)


def clear_model(folder: Path) -> None:
    """Remove the files that :func:`save_latent_model` wrote, and keep all others.

    Otherwise the adapters of an older model would be loaded instead of a complete model saved there later.
    """
    names = [FACTS_FILE, EVALUATION_FILE, ADAPTERS_FILE, "adapter_model.safetensors", _CONFIG_FILE]
    names += ["model.safetensors", "model.safetensors.index.json"]
    for path in (*(folder / name for name in names), *folder.glob(f"model-{_PART}-of-{_PART}.safetensors")):
        path.unlink(missing_ok=True)


def load_latent_model(
    name: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    trainable: bool = False,
    trust_remote_code: bool = False,
) -> LatentModel:
    """Load a model that :func:`save_latent_model` wrote, from a folder or the hub.

    Args:
        name: A folder, or the name of a model on the hub.
        device: Device to load the model onto.
        dtype: Dtype of the weights; by default bfloat16 on CUDA and float32 elsewhere.
        trainable: Enable gradients for the reasoner, and only for it.
        trust_remote_code: Allow the Python files of the base or the tokenizer to run if they are needed.

    Raises:
        InputError: The model does not exist, has no recursion, or has adapters whose base cannot be found.
    """
    source = _snapshot(str(name))
    require_same_model(source, _REMEDY)
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    known = _known(source / FACTS_FILE)
    tokenizer = pretrained(AutoTokenizer, str(name), str(source), trust_remote_code=trust_remote_code)
    tokenizer.padding_side = "left"
    require_padding(str(name), tokenizer)
    form = _form(str(name), tokenizer, known)
    _require_tags(known.get("settings"), tokenizer, f"{source / FACTS_FILE}: settings: ")
    if (source / ADAPTERS_FILE).exists():
        model = _with_adapters(source, known, tokenizer, device, dtype, trust_remote_code)
    else:
        config = read_object(source / _CONFIG_FILE, _REMEDY)
        kind = config.get("model_type")
        if kind != TRMConfig.model_type:
            raise InputError(
                f"{name} is a {kind} model without a recursion: train one with `llm-trm train lora --model "
                f"{name}`"
            )
        _require_tags(config, tokenizer, f"{source / _CONFIG_FILE}: ")
        model = pretrained(TRMForCausalLM, str(name), str(source), dtype=dtype).to(device)
    model.requires_grad_(False)
    if trainable:
        _train_reasoner(model)
    base, facts = known.get("base"), known.get("facts") or {}
    # Training will make the evaluation out of date.
    measured = None if trainable else read_evaluation(source)
    inner(model).about = About(base, form, facts, measured, known.get("prompts"))
    return LatentModel(str(name), model.eval(), tokenizer, base, form, facts)


def _known(path: Path) -> dict[str, Any]:
    """The facts that training saved with a model; empty if there are none."""
    known = read_object(path, _REMEDY, optional=True)
    for name, kind, what in (
        ("base", str, "a name"),
        ("prompt_form", str, "a name"),
        ("settings", dict, "an object"),
        ("facts", dict, "an object"),
    ):
        if not isinstance(known.get(name), kind | None):
            raise InputError(f"{path}: {name} must be {what}, not {shown(known[name])}: {_REMEDY}")
    return known


def _form(name: str, tokenizer: PreTrainedTokenizerBase, known: dict[str, Any]) -> PromptForm:
    """The training's prompt form. Raises InputError if the tokenizer no longer produces the same prompts."""
    try:
        form = prompt_form(tokenizer, known.get("prompt_form"))
        fault = "their tokens would differ"
        same = known.get("prompts") in (None, prompts_fingerprint(tokenizer, form))
    except InputError as error:
        same, fault = False, one_line(error)
    if not same:
        raise InputError(
            f"{name} was trained on prompts that its tokenizer no longer produces ({fault}): restore the "
            "tokenizer's files, or train again"
        )
    return form


def _with_adapters(
    folder: Path,
    known: dict[str, Any],
    tokenizer: Any,
    device: torch.device | str,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> Any:
    require("train", "peft")
    from llm_trm.models.causal.adapters import read_adapters

    if not known.get("base") or not known.get("settings"):
        raise InputError(f"{folder} contains adapters, but no {FACTS_FILE} that names their base: {_REMEDY}")
    _require_adapters(folder / ADAPTERS_FILE)
    base = known["base"]
    if not trust_remote_code:
        require_own_kernels(known["settings"], f"{folder / FACTS_FILE}: settings: ")
    language_model = pretrained(
        AutoModelForCausalLM,
        base,
        language_model_source(base),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    ).to(device)
    if len(tokenizer) > language_model.get_input_embeddings().weight.shape[0]:
        language_model.resize_token_embeddings(len(tokenizer))
    try:
        model = TRMForCausalLM.wrap(language_model, **known["settings"])
    except (InputError, TypeError) as error:
        raise InputError(f"{folder / FACTS_FILE}: {one_line(error)}: {_REMEDY}") from error
    return read_adapters(model, folder, base)


def _require_adapters(path: Path) -> None:
    """Raise InputError if a setting in a folder's ``adapter_config.json`` is invalid, or not supported."""
    adapters, where = read_object(path, _REMEDY), f"{path}: "
    if adapters.get("megatron_config"):
        # peft imports any module that megatron_core names.
        raise InputError(f"{path} describes Megatron adapters, which are not supported: {_REMEDY}")
    if (task := adapters.get("task_type")) != "CAUSAL_LM":
        raise InputError(f"{where}task_type must be 'CAUSAL_LM', not {shown(task)}: {_REMEDY}")
    for setting, within in _ADAPTERS.items():
        require_in(within, setting, adapters.get(setting), InputError, where)
    for setting, within in _PATTERNS.items():
        _require_pattern(within, setting, adapters.get(setting), where)
    # Otherwise peft would fail in the first forward pass.
    tokens = adapters.get("alora_invocation_tokens")
    tokens = [] if tokens is None else tokens
    if not isinstance(tokens, list) or any(_TOKEN.fault(token) for token in tokens):
        raise InputError(f"{where}alora_invocation_tokens must be a list of ids: {_REMEDY}")


def _require_pattern(within: Range, setting: str, values: Any, where: str) -> None:
    if values is not None and not isinstance(values, dict):
        raise InputError(f"{where}{setting} must be a mapping from layer names, not {shown(values)}")
    for layer, value in (values or {}).items():
        require_in(within, f"{setting}[{shown(layer)}]", value, InputError, where)


def _require_tags(settings: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise InputError, starting with ``where``, unless ``<think>`` and ``</think>`` have valid ids."""
    within = Whole(0, len(tokenizer) - 1, "the tokenizer has no more")
    for name in ("think_token_id", "end_think_token_id"):
        if isinstance(settings, dict) and settings.get(name) is not None:
            require_in(within, name, settings[name], InputError, where)


def _train_reasoner(model: Any) -> None:
    """Enable gradients for the reasoner; with adapters, for the copy that peft trains and saves."""
    copies = any("modules_to_save" in name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        untrained = "halt_head" in name and not model.config.trains_halting
        ours = ".reasoner.modules_to_save." in name if copies else ".reasoner." in name
        if ours and not untrained:
            parameter.requires_grad_(True)


def _snapshot(name: str) -> Path:
    """The folder ``name``, or the local snapshot of the hub model ``name``."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/")):
        raise InputError(f"{name} is not a folder: {_REMEDY}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except Exception as error:
        raise InputError(f"{name} is neither a folder nor a model available on the hub: {_REMEDY}") from error
