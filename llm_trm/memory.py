"""Asks for memory before it is taken: a process that takes more than there is gets killed without a word."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trm.errors import InputError

if TYPE_CHECKING:
    import torch

_MEMINFO = Path("/proc/meminfo")
#: What a container may take, by the second and the first version of control groups.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_FLOAT32 = 4
#: Numbers of a trained parameter: its weight, gradient, Adam's two moments, and its average.
_TRAINED = 5


def free_memory(device: torch.device | None = None) -> int | None:
    """Bytes that ``device``, by default the CPU, has left for this process; None where nobody says.

    On CUDA with those that PyTorch's allocator keeps unused. On a CPU what the system has available, swap
    included, as far as a container may take it; without /proc, all that there is.
    """
    if device is not None and device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [size for size in (_available(), *map(_limit, _LIMITS)) if size is not None]
    return min(found, default=None)


def require_memory(needed: int, what: str, remedy: str, device: torch.device | None = None) -> None:
    """Raise InputError, ending in ``remedy``, if ``what`` surely does not fit into memory.

    Args:
        needed: Bytes that it takes at least.
        device: Where it takes them; the CPU by default.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        kind = "GPU memory" if device is not None and device.type == "cuda" else "memory"
        raise InputError(
            f"{what} would take at least {in_words(needed)} of {kind}, and {in_words(free)} are free: "
            f"{remedy}"
        )


def require_training_memory(
    parameters: int, what: str, remedy: str, device: torch.device | None = None, *, besides: int = 0
) -> None:
    """:func:`require_memory` for the training of so many float32 ``parameters``, and bytes ``besides``."""
    require_memory(_TRAINED * _FLOAT32 * parameters + besides, what, remedy, device)


def require_room(needed: int, folder: Path, what: str, remedy: str) -> None:
    """Raise InputError, ending in ``remedy``, if the disk of ``folder`` has no ``needed`` bytes left."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{what} would take at least {in_words(needed)} of disk in {folder}, and {in_words(free)} are "
            f"free: {remedy}"
        )


def in_words(count: int) -> str:
    """Bytes with a unit: ``1.5 GiB``."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.1f} {units[0]}"


def _available() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        kibibytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        return 1024 * (kibibytes["MemAvailable"] + kibibytes["SwapFree"])
    except (OSError, ValueError, KeyError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _limit(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max" is no limit
        return None
