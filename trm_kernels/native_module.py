"""The compiled module of the ``native`` backend, or why there is none."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch

from trm_kernels.config import NetworkConfig

#: Blocks of the largest network that the kernels lay out (``kMostBlocks`` in csrc/kernels.h).
MOST_BLOCKS = 64

_in_forked_child = False


def _note_fork() -> None:
    global _in_forked_child
    _in_forked_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    # torch is loaded by now, and with it the OpenMP runtime that the module resolves its symbols in.
    try:
        module = importlib.import_module("trm_kernels._native")
        module.default_instruction_set()
    except ModuleNotFoundError:
        return None, "the package was built without its C++ kernels: install it where there is a C++ compiler"
    except (ImportError, ValueError) as error:
        return None, f"the C++ kernels do not load: {error}"
    return module, None


def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    # Asked first of all, and torch.compile would trace the import.
    return "torch.compile cannot trace the kernels" if torch.compiler.is_compiling() else _load()[1]


def module() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: There is none; :func:`unavailable` says why.
    """
    found, reason = _load()
    if found is None:
        raise RuntimeError(reason)
    return found


@functools.lru_cache(maxsize=64)
def network(config: NetworkConfig) -> object:
    """The kernels' view of a network."""
    tokens = config.mixer == "tokens"
    return module().Network(
        config.d_model,
        1 if tokens else config.n_heads,
        config.d_ff,
        config.n_layers,
        config.pre_norm,
        config.gated,
        config.rotary,
        config.norm_eps,
        config.seq_len if tokens else 0,
        config.token_ff if tokens else 0,
    )


#: Rows for which a further thread is worth its start and the barriers.
_FEWEST_ROWS = 8


def threads(amount: int, fewest: int = _FEWEST_ROWS) -> int:
    """Threads for a call on ``amount`` rows: those of torch, but each with ``fewest`` at least.

    One in a forked child: the threads of torch's OpenMP stay in the parent, and waiting for them never ends.
    """
    if _in_forked_child:
        return 1
    return max(1, min(torch.get_num_threads(), amount // fewest))
