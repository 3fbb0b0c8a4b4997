"""Records the machine, versions and commit of a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import llm_trm


def _output(*command: str) -> str | None:
    """Standard output of a short command, or None if it fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The device name in results: the GPU's name, or the processor and its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return name if device.type == "cpu" else f"{name}, {device.type}"


def commit() -> str | None:
    """The commit of this package's checkout, with ``+`` for local changes; None if installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    head = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if head and changes else head


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of all software that affects speed; None if not installed."""
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "llm-trm": llm_trm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _installed(name) for name in ("triton", "tiny-recursive-model", "liger-kernel")},
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": driver.splitlines()[0] if driver else None,
    }


def run_record(device: torch.device, commit_name: str | None = None) -> dict[str, Any]:
    """Metadata of the run for every line of a results file."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit_name or commit(),
        "versions": versions(),
        "machine": {
            "device": device_name(device),
            "device_type": device.type,
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "os": platform.platform(),
        },
    }
