"""A simulated GPU: runs CUDA code on tensors without data and with a driver that does nothing.

``python -m bench.pretend MODULE ARGUMENTS...`` runs a module as ``python -m MODULE`` would on a machine with
an H100. Kernels go through Triton's own launch path: they are compiled for sm_90, stored in Triton's cache
and passed to a driver that launches nothing. Tensors have shapes but no data, so cases of any size take no
time. Values that are read from them are made up (1 for a number, 0 in float64, true for a comparison). The
output is not a result. It only shows that the code runs to completion and which kernels it launches, and it
fills a cache (:mod:`bench.precompile`).
"""

from __future__ import annotations

import os
import sys

#: Set in a process with the simulated GPU, for its child processes.
VARIABLE = "BENCH_PRETEND"
#: Command prefix that runs a module on the simulated GPU.
COMMAND = [sys.executable, "-m", "bench.pretend"]


def pretending() -> bool:
    """Whether this process runs on the simulated GPU, or was started by one that does."""
    return VARIABLE in os.environ


def python() -> list[str]:
    """Command prefix that runs a module, on the simulated GPU if this process does."""
    return COMMAND if pretending() else [sys.executable, "-m"]
