"""Reads and writes ``all_config.yaml``, which the official code saves with its checkpoints."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, get_args

from llm_trm.choices import Task
from llm_trm.errors import InputError, one_line
from llm_trm.files import write_text
from llm_trm.models.puzzle.paper import PuzzleTRMConfig
from llm_trm.ranges import shown
from llm_trm.text import read_text

CONFIG_FILE = "all_config.yaml"

_ARCHITECTURE = "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1"
_EPS = 1e-5

#: Official names of fields of PuzzleTRMConfig.
_COUNTS = {
    "num_heads": "n_heads",
    "L_cycles": "n_latent_steps",
    "H_cycles": "n_deep_recursions",
    "halt_max_steps": "max_steps",
    "hidden_size": "d_model",
    "L_layers": "n_layers",
}

#: Additional entries of an exported configuration, which the official code ignores.
_OWN, _OWN_FIELDS = "llm_trm", ("seq_len", "task", "rows", "columns")


def read_config(checkpoint: Path) -> tuple[dict[str, Any], str]:
    """Read the configuration next to ``checkpoint``.

    Returns:
        The values that it has, by the names of :class:`PuzzleTRMConfig` and ``task``, ``rows`` and
        ``columns``; and a clause for an error message if PyYAML is missing, else an empty string.

    Raises:
        InputError: The file is invalid, or describes another architecture.
    """
    path = checkpoint.parent / CONFIG_FILE
    if not path.is_file():
        return {}, ""
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        return {}, f"; {path} may have them, but reading it needs PyYAML: pip install pyyaml"
    try:
        content = yaml.safe_load(read_text(path))
        architecture = dict(content["arch"])
        return {**_translate(architecture), **_own(content.get(_OWN) or {})}, ""
    except KeyError as error:
        raise InputError(f"{path} has no entry {error}: {_remedy(path)}") from None
    except RecursionError:
        raise InputError(f"{path} nests too deeply: {_remedy(path)}") from None
    except (OSError, TypeError, ValueError, OverflowError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be used ({one_line(error)}): {_remedy(path)}") from error


def _remedy(path: Path) -> str:
    return f"rename it from {path.name}, and pass the command's options instead"


def _translate(arch: dict[str, Any]) -> dict[str, Any]:
    """Fields of the official ``arch`` under our names. Raises ValueError for unsupported values."""
    if arch["name"].split("@")[0] != _ARCHITECTURE.split("@")[0]:
        raise ValueError(f"it describes {one_line(arch['name'])}, not {_ARCHITECTURE}")
    if float(arch.get("rms_norm_eps", _EPS)) != _EPS:
        raise ValueError(f"its norms have eps {one_line(arch['rms_norm_eps'])}, but only {_EPS} is supported")
    if not arch.get("no_ACT_continue", True):
        raise ValueError(
            "its halting compares two Q-values (no_ACT_continue: false), but only the first is supported"
        )
    found: dict[str, Any] = {ours: _count(arch, theirs) for theirs, ours in _COUNTS.items() if theirs in arch}
    # Any other value means no encoding, as in the official code.
    if "pos_encodings" in arch:
        positions = arch["pos_encodings"]
        found["positions"] = positions if positions in ("rope", "learned") else "none"
    if "forward_dtype" in arch:
        found["dtype"] = arch["forward_dtype"]
    found["rope_theta"] = float(arch.get("rope_theta", 10000.0))  # the default of the official class
    if "mlp_t" in arch:
        found["mixer"] = "tokens" if arch["mlp_t"] else "attention"
    if "puzzle_emb_ndim" in arch:
        found["puzzle_dim"] = _count(arch, "puzzle_emb_ndim", least=0)
    if "puzzle_emb_len" in arch:
        found["puzzle_len"] = _count(arch, "puzzle_emb_len", least=0)
        if found["puzzle_len"] == 0 and {"puzzle_emb_ndim", "hidden_size"} <= arch.keys():
            found["puzzle_len"] = -(-found["puzzle_dim"] // found["d_model"])  # the minimum
    return found


def _count(arch: dict[str, Any], name: str, least: int = 1) -> int:
    value = arch[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {shown(value)}, not an integer of at least {least}")
    return value


def _own(content: dict[str, Any]) -> dict[str, Any]:
    counts = {name: _count(content, name) for name in _OWN_FIELDS if name in content and name != "task"}
    if "task" not in content:
        return counts
    if content["task"] not in get_args(Task):
        raise ValueError(f"{shown(content['task'])} is not a task")
    return {**counts, "task": content["task"]}


def check_exportable(config: PuzzleTRMConfig) -> None:
    """Raise InputError for a model that the official code cannot run."""
    if config.puzzle_len and not config.puzzle_dim:
        raise InputError(
            f"the official code cannot run {config.puzzle_len} positions before the cells without a puzzle "
            "embedding: export a model with puzzle_dim above 0, or with puzzle_len 0"
        )


def write_config(checkpoint: Path, config: PuzzleTRMConfig, facts: dict[str, Any]) -> bool:
    """Write the configuration next to ``checkpoint`` if there is none. Returns whether it was written.

    It contains only what the model needs, without training settings.

    Raises:
        InputError: The folder has the configuration of another model, or the official code does not support
            the model.
    """
    check_exportable(config)
    path = checkpoint.parent / CONFIG_FILE
    text = _text(config, facts)
    if not path.exists():
        write_text(path, text)
        return True
    if path.read_bytes() == text.encode():
        return False
    found, unreadable = read_config(checkpoint)
    mine = {**vars(config), **facts}
    wrong = [name for name, value in found.items() if name in mine and mine[name] != value]
    # A token mixer has no heads and ignores position encodings.
    if config.mixer == "tokens":
        wrong = [name for name in wrong if name not in ("n_heads", "positions", "rope_theta")]
    if wrong or unreadable:
        what = f"describes another model ({', '.join(wrong)})" if wrong else "may describe another model"
        raise InputError(f"{path} {what}: export into another folder")
    return False


def _text(config: PuzzleTRMConfig, facts: dict[str, Any]) -> str:
    """The file's text, formatted here because PyYAML is only an optional dependency."""
    theirs = {
        "name": _ARCHITECTURE,
        **{name: getattr(config, ours) for name, ours in _COUNTS.items()},
        "H_layers": 0,
        "expansion": 4,
        "forward_dtype": config.dtype,
        "mlp_t": "true" if config.mixer == "tokens" else "false",
        "pos_encodings": config.positions,
        "puzzle_emb_len": config.puzzle_len,
        "puzzle_emb_ndim": config.puzzle_dim,
        "rope_theta": config.rope_theta,
    }
    own = {"seq_len": config.seq_len, **{name: facts[name] for name in _OWN_FIELDS if name in facts}}
    lines = ["arch:", *(f"  {name}: {value}" for name, value in theirs.items())]
    lines += [f"{_OWN}:", *(f"  {name}: {value}" for name, value in own.items())]
    return "\n".join(lines) + "\n"
