"""The model card of a language model with a recursion, and the other files saved with its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llm_trm.choices import PromptForm
from llm_trm.files import read_json, write_json, write_text
from llm_trm.models.causal.reasoners import Reasoner
from llm_trm.models.loading import ARITHMETIC

#: Saved with the weights: the base model, the prompt form, settings and facts.
FACTS_FILE = "latent.json"
#: Saved with the weights: the results of ``llm-trm eval lm``, and which weights it measured.
EVALUATION_FILE = "evaluation.json"
CARD_FILE = "README.md"
#: At the end of a card that may be overwritten. A card without it or a template's text was edited by hand.
_MARK = "<!-- llm-trm overwrites this card when it saves the model; delete this line to keep your edits. -->"
#: Text of our older cards, and of the cards that transformers, peft, TRL and their trainers write.
_TEMPLATES = (
    "<!-- llm-trm writes this card anew whenever the model is saved",
    *("This model card has been automatically generated", "[More Information Needed]"),
    *("This model card has been generated automatically", "It has been trained using [TRL]"),
)
#: Settings of a TRMConfig that are saved with adapters: all that the decoder's own config lacks.
OWN_SETTINGS = (
    *("reasoner", "num_latents", "d_compressed", "soft_tokens", "n_layers", "n_heads", "compression_heads"),
    *("n_latent_steps", "n_deep_recursions", "supervision_steps", "dropout", "halting"),
    *("halting_loss_weight", "window", "think_token_id", "end_think_token_id"),
)
_OF_ONE_REASONER = {
    "latents": ("num_latents", "compression_heads"),
    "sequence": ("d_compressed", "soft_tokens"),
}
_REMEDY = "run llm-trm eval lm --write-card again"


@dataclass
class About:
    """Metadata that a model's weights and configuration do not contain.

    Attributes:
        base: Name or folder of the wrapped language model; None if unknown.
        prompt_form: Prompt form of the training; None for the tokenizer's default.
        facts: Settings and metrics of the training.
        evaluation: Results of ``llm-trm eval lm``, with ``reasoner``, the :func:`fingerprint` of the
            weights that it measured.
        prompts: :func:`~llm_trm.data.lessons.prompts_fingerprint` of the training's tokenizer; None if
            unknown.
    """

    base: str | None = None
    prompt_form: PromptForm | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    prompts: str | None = None


class CardMixin:
    """Pushes a transformers or peft model to the hub with our card instead of a template."""

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # The last step of every upload to the hub, after the template is written.
        write_about(self, Path(working_dir), name=repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]


def inner(model: Any) -> Any:
    """The ``TRMForCausalLM`` inside its adapters, if it has any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def about(model: Any) -> About:
    """Metadata of ``model``, a ``TRMForCausalLM`` or a ``PeftModel`` around one."""
    known = getattr(inner(model), "about", None)
    if isinstance(known, About):
        return known
    return About(base=getattr(model.config.text_config, "_name_or_path", None) or None)


def write_about(model: Any, folder: Path, *, name: str | None = None) -> None:
    """Write :data:`EVALUATION_FILE`, the card and, last, :data:`FACTS_FILE` into a folder of saved weights.

    Results that were measured on other weights are left out, and removed from the folder. A card edited by
    hand is kept.

    Args:
        model: The model that was saved.
        folder: An existing folder.
        name: Name of the model; by default the name of the folder.
    """
    known = about(model)
    evaluation = known.evaluation
    if evaluation is not None and evaluation.get("reasoner") != fingerprint(model):
        evaluation = None
    base = known.base
    # A folder may have the name of the bundled model.
    if base is not None and base != ARITHMETIC and Path(base).is_dir():
        base = str(Path(base).resolve())
    settings = {setting: getattr(model.config, setting) for setting in OWN_SETTINGS}
    if evaluation is None:
        (folder / EVALUATION_FILE).unlink(missing_ok=True)
    else:
        write_json(folder / EVALUATION_FILE, evaluation)
    write_card(model, folder, evaluation, name=name)
    write_json(
        folder / FACTS_FILE,
        {
            "base": base,
            "prompt_form": known.prompt_form,
            "prompts": known.prompts,
            "settings": settings,
            "facts": known.facts,
        },
    )


def write_evaluation(model: Any, folder: Path, evaluation: Mapping[str, Any]) -> bool:
    """Save the results of ``llm-trm eval lm`` with the weights and in the card.

    Returns:
        Whether the card was written; False if the existing card was edited by hand.
    """
    known = about(model)
    known.evaluation = {**evaluation, "reasoner": fingerprint(model)}
    inner(model).about = known
    write_json(folder / EVALUATION_FILE, known.evaluation)
    return write_card(model, folder, known.evaluation)


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Read the results that :func:`write_evaluation` saved; None if there are none."""
    path = folder / EVALUATION_FILE
    found = read_json(path, _REMEDY) if path.exists() else None
    return found if isinstance(found, dict) else None


def write_card(
    model: Any, folder: Path, evaluation: Mapping[str, Any] | None, *, name: str | None = None
) -> bool:
    """Write only the card. Returns False and does nothing if the existing card was edited by hand."""
    path = folder / CARD_FILE
    if path.exists() and not _replaceable(path.read_text(encoding="utf-8", errors="replace")):
        return False
    write_text(path, card(model, evaluation, name=name, folder=folder))
    return True


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """SHA-256 of the reasoner's weights, which every training changes, rounded to bfloat16.

    The rounding makes it independent of the precision of loading. It is the same with adapters and merged.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(_reasoner(model).state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def card(
    model: Any, evaluation: Mapping[str, Any] | None = None, *, name: str | None = None, folder: Path
) -> str:
    """The text of the card.

    Args:
        model: A ``TRMForCausalLM`` or a ``PeftModel`` around one.
        evaluation: Results as ``llm-trm eval lm -o`` writes them.
        name: Name of the model on the hub; None for a model in ``folder``.
        folder: Folder of the model.
    """
    known, config = about(model), model.config
    adapters = hasattr(model, "peft_config")
    base = _base_name(known.base)
    title = (name or folder.resolve().name).rpartition("/")[2]
    parts = [
        _front_matter(known.base, adapters=adapters),
        f"# {title}",
        f"{base} with a recursion. At `<think>` it does not write out its thinking. Instead, a small "
        "network reads the hidden states so far, refines its own state by recursion, and returns "
        f"{_soft_tokens(config)} to the language model, which continues from there.",
        _what_is_here(known, adapters=adapters),
        "## Use",
        _use(name or str(folder), adapters=adapters),
        "## Measured",
        _measured(evaluation),
        "## Settings",
        _settings(model, known),
    ]
    facts = {key: value for key, value in known.facts.items() if isinstance(value, (str, int, float, bool))}
    if facts:
        parts += ["## Training", _table(("", ""), [(key, _cell(value)) for key, value in facts.items()])]
    return "\n\n".join([*parts, _MARK]) + "\n"


def _replaceable(text: str) -> bool:
    return not text.strip() or _MARK in text or any(words in text for words in _TEMPLATES)


def _reasoner(model: Any) -> Reasoner:
    """The trained reasoner, not the original copy that peft keeps."""
    for name, module in model.named_modules():
        if isinstance(module, Reasoner) and "original_module" not in name:
            return module
    raise AssertionError("a model with a recursion has a reasoner")


def _on_hub(base: str | None) -> bool:
    return (
        base is not None
        and base.count("/") == 1
        and not base.startswith((".", "/", "~"))
        and not Path(base).exists()
    )


def _base_name(base: str | None) -> str:
    if base is None:
        return "A language model"
    return (
        f"[{base}](https://huggingface.co/{base})"
        if _on_hub(base)
        else f"The language model `{Path(base).name}`"
    )


def _front_matter(base: str | None, *, adapters: bool) -> str:
    lines = ["---", "library_name: llm-trm", "pipeline_tag: text-generation"]
    # The hub rejects a base_model that is not a model on the hub.
    lines += [f"base_model: {base}"] if _on_hub(base) else []
    lines += [
        "tags:",
        "- latent-reasoning",
        "- tiny-recursive-model",
        *(["- lora"] if adapters else []),
        "---",
    ]
    return "\n".join(lines)


def _soft_tokens(config: Any) -> str:
    count = config.tokens_per_thought
    return "one soft token" if count == 1 else f"{count} soft tokens"


def _what_is_here(known: About, *, adapters: bool) -> str:
    if not adapters:
        return "The weights here are complete: they include the language model and the recursion."
    local = known.base is not None and not _on_hub(known.base)
    where = ", and must be in the folder that it was in for training" if local else ""
    return (
        f"The weights here are adapters (LoRA) and the recursion. The language model is also needed{where}."
    )


def _use(source: str, *, adapters: bool) -> str:
    lines = [
        "```sh",
        'pip install "llm-trm[train]"',
        f'llm-trm generate "3+4*2" --checkpoint {source}',
        "```",
        "",
        "```python",
        "from llm_trm.data.lessons import encode_prompts, question_prompt",
        "from llm_trm.models.causal.loading import load_latent_model",
        "",
        f'latent = load_latent_model("{source}")  # device="cuda" for a GPU',
        "model, tokenizer, form = latent.model, latent.tokenizer, latent.prompt_form",
        "",
        'prompt = question_prompt(tokenizer, "3+4*2", form)',
        "inputs = encode_prompts(tokenizer, [prompt], form).to(model.device)",
        "written = model.generate(**inputs, max_new_tokens=256, do_sample=False)",
        'print(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
        "",
        "`generate` and `forward` with `use_trm=False` run the language model without the recursion. "
        + (
            "`with model.disable_adapter():` also turns off the adapters."
            if adapters
            else "`AutoModelForCausalLM` also loads this model once `llm_trm.models.causal` is imported."
        ),
    ]
    return "\n".join(lines)


def _measured(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return (
            "Nothing yet. `llm-trm eval lm --checkpoint FOLDER --write-card` evaluates the model and writes "
            "the results here."
        )
    modes = evaluation["modes"]
    rows = []
    for mode, scores in modes.items():
        low, high = scores["interval"]
        rows.append(
            (
                mode,
                f"{scores['accuracy']:.1%} [{100 * low:.1f}, {100 * high:.1f}]",
                f"{scores['tokens']:.1f}",
                f"{1000 * scores['seconds']:.1f}",
                f"{scores['steps']:.2f}",
                f"{scores['soft_tokens']:.1f}",
            )
        )
    header = ("", "exact match [95%]", "tokens", "ms per problem", "steps", "soft tokens")
    lines = [
        f"{next(iter(modes.values()))['problems']} problems of {evaluation['data_words']}, "
        f"batch size {evaluation['batch_size']}, at most {evaluation['max_new_tokens']} new tokens, greedy. "
        f"{evaluation['machine']['device']}; torch {evaluation['versions']['torch']}, "
        f"llm-trm {evaluation['versions']['llm-trm']}; {evaluation['time'][:10]}.",
        _table(header, rows),
        "`no-think` and `think` are the wrapped language model, which answers at once or after "
        "written-out thinking. `latent` is this model. Results on other data will differ.",
    ]
    ratios = evaluation.get("ratios")
    if ratios:
        closed = ratios["gap_closed"]
        gap = "" if closed is None else f" closes {closed:.1%} of the gap between the other two modes, and"
        lines.append(
            f"`latent`{gap} takes {ratios['tokens']:.1%} of the tokens of `think` and "
            f"{ratios['seconds']:.1%} of its time."
        )
    return "\n\n".join(lines)


def _settings(model: Any, known: About) -> str:
    config = model.config
    hidden = {name for kind, names in _OF_ONE_REASONER.items() if kind != config.reasoner for name in names}
    rows = [(name, _cell(getattr(config, name))) for name in OWN_SETTINGS if name not in hidden]
    rows.append(("parameters of the recursion", f"{sum(p.numel() for p in _reasoner(model).parameters()):,}"))
    if known.prompt_form is not None:
        rows.append(("prompt form", known.prompt_form))
    for adapters in getattr(model, "peft_config", {}).values():
        rows.append(("LoRA", f"r {adapters.r}, alpha {adapters.lora_alpha}, dropout {adapters.lora_dropout}"))
    return _table(("setting", "value"), rows)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines: list[tuple[str, ...]] = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
