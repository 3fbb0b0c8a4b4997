"""Checks memory before allocating it: the system kills a process that runs out, without a message."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trm.errors import InputError

if TYPE_CHECKING:
    import torch

_MEMINFO = Path("/proc/meminfo")
#: A container's memory limit, in versions 2 and 1 of control groups.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_FLOAT32 = 4
#: Values per trained parameter: weight, gradient, Adam's two moments, and the weight average.
_TRAINED = 5


def free_memory(device: torch.device | None = None) -> int | None:
    """Bytes of memory available to this process on ``device``, by default the CPU; None if unknown.

    On CUDA this includes memory that PyTorch's allocator has reserved but does not use. On a CPU it is the
    system's available memory and swap, capped by the container's limit; without /proc, the total memory.
    """
    if device is not None and device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [size for size in (_available(), *map(_limit, _LIMITS)) if size is not None]
    return min(found, default=None)


def require_memory(needed: int, what: str, remedy: str, device: torch.device | None = None) -> None:
    """Raise InputError, ending in ``remedy``, if ``what`` cannot fit into memory.

    Args:
        needed: Lower bound of the memory that it needs, in bytes.
        device: Device whose memory it uses; the CPU by default.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        kind = "GPU memory" if device is not None and device.type == "cuda" else "memory"
        raise InputError(
            f"{what} needs at least {format_bytes(needed)} of {kind}, but only {format_bytes(free)} is free: "
            f"{remedy}"
        )


def require_training_memory(
    parameters: int, what: str, remedy: str, device: torch.device | None = None, *, extra: int = 0
) -> None:
    """:func:`require_memory` for training float32 ``parameters``, plus ``extra`` bytes of other memory."""
    require_memory(_TRAINED * _FLOAT32 * parameters + extra, what, remedy, device)


def require_disk_space(needed: int, folder: Path, what: str, remedy: str) -> None:
    """Raise InputError, ending in ``remedy``, if the disk of ``folder`` lacks ``needed`` free bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{what} needs at least {format_bytes(needed)} of disk space in {folder}, but only "
            f"{format_bytes(free)} is free: {remedy}"
        )


def format_bytes(count: int) -> str:
    """Format a number of bytes with a unit: ``1.5 GiB``."""
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
    except (OSError, ValueError):  # "max" means unlimited
        return None
