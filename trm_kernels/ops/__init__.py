"""Triton kernels. One file an op: kernels, launcher, torch.library schema, fake, autograd."""

from __future__ import annotations

import importlib.util
import os

import torch

#: Whether Triton runs its kernels in Python, on CPU tensors. Read once: Triton reads it at import too.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _unavailable() -> str | None:
    """Why Triton kernels cannot run in this process, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if INTERPRET:
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm GPU is visible (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"the GPU has compute capability {major}.{minor}; the kernels need 8.0 or newer"
    return None


#: The answer, once: a constant that torch.compile can read while it traces.
UNAVAILABLE = _unavailable()
