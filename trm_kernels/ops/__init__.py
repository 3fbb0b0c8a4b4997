"""Triton kernels. One file per op, with kernels, launcher, torch.library schema, fake and autograd."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

#: Whether Triton interprets its kernels in Python, on CPU tensors. Read once, because Triton also reads it at
#: import.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
#: Whether Triton's interpreter supports bfloat16. Unpatched, it multiplies bit patterns; our tests patch it.
INTERPRETS_BFLOAT16 = False


def _missing() -> str | None:
    """Return what Triton is missing to compile for a GPU in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    # Triton builds a small C module for the launcher of each kernel.
    if "CC" not in os.environ and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "triton needs a C compiler and found none of cc, gcc, clang (or set CC)"
    if torch.version.hip is None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major < 7:
            return f"the GPU has compute capability {major}.{minor}; triton needs 7.0 or newer"
    return None


def _unavailable() -> str | None:
    """Return why the kernels cannot run in this process, or None if they can."""
    if INTERPRET and importlib.util.find_spec("triton") is not None:
        return None
    if MISSING is not None:
        return MISSING
    if not torch.cuda.is_available():
        return "no CUDA or ROCm GPU is visible (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"the GPU has compute capability {major}.{minor}; the kernels need 8.0 or newer"
    return None


#: Why Triton cannot compile here, and why the kernels cannot run here. Evaluated once, so that torch.compile
#: reads constants when it traces.
MISSING = _missing()
UNAVAILABLE = _unavailable()
