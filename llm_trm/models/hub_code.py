"""Finds settings in a model's files that make transformers download code from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_trm.errors import InputError
from llm_trm.files import read_json
from llm_trm.ranges import shown

#: Settings of ``attn_implementation``, ``_attn_implementation``, ``experts_implementation`` and the like.
_KERNELS = ("_implementation", "_implementation_internal")
#: Settings that select decoding methods whose code transformers 5 keeps on the hub.
_DECODING = (
    "custom_generate",
    "penalty_alpha",
    "dola_layers",
    "num_beam_groups",
    "constraints",
    "force_words_ids",
)


def require_own_kernels(described: Any, where: str) -> None:
    """Raise InputError, starting with ``where``, if ``described`` names kernels on the hub, which are code.

    Args:
        described: JSON value of a configuration, which may contain other configurations.
        where: The file, for instance ``"config.json: "``.
    """
    for name, kernels in _kernels(described):
        raise InputError(
            f"{where}{name} {shown(kernels)} is code on the hub, which was not run: remove it from the file, "
            "or pass --trust-remote-code if you trust it"
        )


def require_no_hub_kernels(described: dict[str, Any], folder: Path, where: str) -> None:
    """Apply :func:`require_own_kernels` to a model's ``config.json`` and ``generation_config.json``.

    Args:
        described: Content of ``config.json``.
        folder: Folder of ``generation_config.json``, which may be missing.
        where: Start of the error message, before the name of the file.
    """
    require_own_kernels(described, f"{where}config.json: ")
    decoding = folder / "generation_config.json"
    if decoding.is_file():
        content = read_json(decoding, "fix or remove the file")
        require_own_kernels(content, f"{where}generation_config.json: ")


def without_hub_decoding(model: Any) -> Any:
    """Clear settings of ``model`` that select decoding code on the hub; commands choose the decoding."""
    config = getattr(model, "generation_config", None)
    for name in _DECODING:
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    return model


def _kernels(described: Any) -> Iterator[tuple[str, str]]:
    if isinstance(described, list):
        for part in described:
            yield from _kernels(part)
    if not isinstance(described, dict):
        return
    for name, value in described.items():
        if name.endswith(_KERNELS):
            # A dict names the kernels of each part of a model.
            named = value.values() if isinstance(value, dict) else (value,)
            yield from ((name, one) for one in named if isinstance(one, str) and "/" in one)
        else:
            yield from _kernels(value)
