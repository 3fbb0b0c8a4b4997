"""A GPU that is not there: CUDA code, run on tensors without data and a driver that does nothing.

``python -m bench.pretend MODULE ARGUMENTS...`` runs a module as ``python -m MODULE`` would on a machine with
an H100. Kernels go through Triton's own launch path: they are compiled for sm_90, kept in Triton's cache and
handed to a driver that launches nothing. Tensors have shapes and no data, so that a case of any size takes no
time; what is read of them is made up (1 for a number, 0 in float64, true for a comparison). Nothing that
comes out is a result: it shows that code runs to its end and what it launches, and it fills a cache
(:mod:`bench.precompile`).
"""

from __future__ import annotations

import os
import sys

#: Set in a process on the pretended GPU, for those that it starts.
VARIABLE = "BENCH_PRETEND"
#: Runs a module whose name follows on it.
COMMAND = [sys.executable, "-m", "bench.pretend"]


def pretending() -> bool:
    """Whether this process runs on the pretended GPU, or was started by one that does."""
    return VARIABLE in os.environ


def python() -> list[str]:
    """The command that runs a module whose name follows, on the pretended GPU where this process is on it."""
    return COMMAND if pretending() else [sys.executable, "-m"]
