"""The compiled module of the ``native`` backend, or the reason why it is unavailable."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch

from trm_kernels.config import NetworkConfig

#: Maximum number of blocks that the kernels support (``kMaxBlocks`` in csrc/kernels.h).
MAX_BLOCKS = 64

_in_forked_child = False


def _note_fork() -> None:
    global _in_forked_child
    _in_forked_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    # torch is already loaded, and with it the OpenMP runtime that provides the module's symbols.
    try:
        module = importlib.import_module("trm_kernels._native")
        module.default_instruction_set()
    except ModuleNotFoundError:
        return (
            None,
            "the package was built without its C++ kernels: reinstall it with a C++ compiler available",
        )
    except (ImportError, ValueError) as error:
        return None, f"the C++ kernels failed to load: {error}"
    return module, None


def unavailable() -> str | None:
    """Return why the kernels cannot run in this process, or None."""
    # Test is_compiling before loading, because torch.compile would trace the import.
    return "torch.compile cannot trace the kernels" if torch.compiler.is_compiling() else _load()[1]


def module() -> ModuleType:
    """Return the compiled module.

    Raises:
        RuntimeError: If it is unavailable, with the reason of :func:`unavailable`.
    """
    found, reason = _load()
    if found is None:
        raise RuntimeError(reason)
    return found


@functools.lru_cache(maxsize=64)
def network(config: NetworkConfig) -> object:
    """Return the C++ description of a network."""
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


#: Rows per thread that justify the cost of starting and synchronising another thread.
_MIN_ROWS_PER_THREAD = 8


def threads(amount: int, minimum: int = _MIN_ROWS_PER_THREAD) -> int:
    """Return the number of threads for ``amount`` rows: torch's, with at least ``minimum`` rows per thread.

    A forked child gets one: torch's OpenMP threads stay in the parent, and waiting for them would hang.
    """
    if _in_forked_child:
        return 1
    return max(1, min(torch.get_num_threads(), amount // minimum))
