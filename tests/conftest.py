"""Common test set-up: Triton's interpreter if there is no GPU, the device, seeds, hypothesis.

Triton and ``trm_kernels.ops`` read ``TRITON_INTERPRET`` at import, so it is set here, before any test module
is loaded. Code that needs the real compiler (the ahead-of-time checks) runs in a separate process with
:func:`compiler_environment` as its environment.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from tests import faster_interpreter, patched_interpreter

HAS_CUDA = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Where the package's dependencies include Triton, its absence is a failure and not a reason to skip.
EXPECTS_TRITON = platform.system() == "Linux" and platform.machine() == "x86_64"

#: Tests that depend on details of torch, Triton, transformers and others: marker ``upstream``. .ci/run
#: repeats them with the lowest versions that pyproject.toml allows, .ci/newest with the newest.
UPSTREAM = (
    "causal",
    "data",
    "evaluate",
    "ops",
    "puzzle",
    "train",
    "benchmark/test_command.py",
    "native/test_build.py",
    "test_ahead_of_time.py",
    "test_capture_safety.py",
    "test_cli.py",
    "test_compile.py",
    "test_compiled_gradients.py",
    "test_graphs.py",
    "test_packed_eager.py",
    "test_packing.py",
    "test_private_names.py",
)

if not HAS_CUDA:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set: the tests need it set")
    os.environ["TRITON_INTERPRET"] = "1"
    if HAS_TRITON:
        faster_interpreter.install()
        patched_interpreter.install()
# Triton 3.10 disables FP fusion by default, and 3.9 warns about it: use the same setting for all versions.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker per core: more threads per worker would only compete.
    torch.set_num_threads(1)

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let idle workers take tests from busy ones: some take minutes, and queues are assigned early."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_report_header() -> str:
    triton = "none"
    if HAS_TRITON:
        import triton as package

        triton = package.__version__
        if os.environ.get("TRITON_INTERPRET") == "1":
            triton += " (interpreter)"
    device = torch.cuda.get_device_name() if HAS_CUDA else f"cpu, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, triton {triton}, device: {device}"


@pytest.hookimpl(tryfirst=True)  # Before pytest selects by markers.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    upstream = [Path(__file__).parent / path for path in UPSTREAM]
    for item in items:
        if any(item.path.is_relative_to(path) for path in upstream) and not item.get_closest_marker("slow"):
            item.add_marker("upstream")
        if not HAS_CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if not (HAS_TRITON or EXPECTS_TRITON) and item.get_closest_marker("interpreter"):
            item.add_marker(pytest.mark.skip(reason="triton is not installed"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> str:
    """The device of test tensors: the GPU, or the CPU with Triton's interpreter."""
    return "cuda" if HAS_CUDA else "cpu"


@pytest.fixture
def compiler_environment() -> dict[str, str]:
    """The environment for a subprocess in which Triton compiles instead of interpreting."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
