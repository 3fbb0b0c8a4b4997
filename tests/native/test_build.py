"""The extension module: its OpenMP runtime, supported instruction sets, and argument checks."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
VECTORS = {"avx512": 16, "avx2": 8, "portable": 4}


@pytest.fixture(scope="session")
def native() -> ModuleType:
    return pytest.importorskip("trm_kernels._native", exc_type=ImportError)


def run(code: str) -> str:
    """Return the output of ``code`` in a separate Python process."""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_torch_and_the_module_share_one_openmp(native: ModuleType) -> None:
    loaded = run(
        """
import re, torch, trm_kernels._native as native
torch.randn(512, 512) @ torch.randn(512, 512)
native.fma_peak(0.01, 2)
print(*{line.split()[-1] for line in open("/proc/self/maps") if re.search(r"lib(gomp|i?omp\\d*)\\b", line)})
"""
    )
    assert len(loaded.split()) == 1, loaded


def test_the_module_has_no_openmp_of_its_own(native: ModuleType) -> None:
    assert native.__file__ is not None
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_native", {native.__file__!r})
try:
    importlib.util.module_from_spec(spec)
except ImportError as error:
    print(error)
"""
    assert re.search("omp", run(code), re.IGNORECASE)


def test_without_the_module_the_backend_reports_why() -> None:
    code = """
import sys
sys.modules["trm_kernels._native"] = None
import torch
from trm_kernels import BackendError, TinyRecursiveNetwork
x = torch.randn(1, 3, 32)
net = TinyRecursiveNetwork(32, 1, 4)
chosen = net.selected_backend(x)
print(chosen.name, chosen.passed_over["native"])
net(x)
try:
    TinyRecursiveNetwork(32, 1, 4, backend="native")(x)
except BackendError as error:
    print(error)
"""
    chosen, error = run(code).strip().splitlines()
    name, reason = chosen.split(" ", 1)
    assert name == "eager"
    assert reason and reason in error


def test_instruction_sets_are_those_of_the_machine(native: ModuleType) -> None:
    names = native.instruction_sets()
    assert names == [name for name in VECTORS if name in names]
    assert names[-1] == "portable"
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = set(next(line for line in lines if line.startswith("flags")).split())
        avx2 = {"avx2", "fma"}
        assert ("avx2" in names) == (avx2 <= flags)
        assert ("avx512" in names) == (avx2 | {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags)


def network(native: ModuleType, instruction_set: str | None = None) -> Any:
    return native.Network(8, 2, 16, 2, True, False, False, 1e-5, instruction_set=instruction_set)


def test_the_best_instruction_set_is_the_default(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRM_NATIVE_ISA", raising=False)
    best = native.instruction_sets()[0]
    assert native.default_instruction_set() == network(native).instruction_set == best
    for name in native.instruction_sets():
        chosen = network(native, name)
        assert (chosen.instruction_set, chosen.vector) == (name, VECTORS[name])
        assert native.fma_peak(0.001, 1, name) > 0
        assert native.tile_rate(0.001, 1, name) > 0


def test_the_environment_selects_the_instruction_set(
    native: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in native.instruction_sets():
        monkeypatch.setenv("TRM_NATIVE_ISA", name)
        assert native.default_instruction_set() == network(native).instruction_set == name
        assert network(native, "portable").instruction_set == "portable"
    monkeypatch.setenv("TRM_NATIVE_ISA", "sse9")
    for refused in (native.default_instruction_set, lambda: network(native)):
        with pytest.raises(
            ValueError, match=r"^TRM_NATIVE_ISA: instruction set 'sse9' is not supported here: .*portable"
        ):
            refused()
    assert network(native, "portable").instruction_set == "portable"
    monkeypatch.setenv("TRM_NATIVE_ISA", "")
    assert native.default_instruction_set() == native.instruction_sets()[0]


def test_wrong_arguments_are_refused(native: ModuleType) -> None:
    net = network(native)
    batch = native.Batch(0, 0, 0, 0, 0, 0)
    recursion = native.Recursion(0, 0, 0, 0, 0, -1.0, 0.0, 0, False)
    right, wrong = [0] * 20, [0] * 19
    with pytest.raises(ValueError, match="parameters must have one address per tensor"):
        net.pack(wrong, False, 0, 1)
    for lists, name in (((wrong, right), "parameters"), ((right, wrong), "gradients")):
        with pytest.raises(ValueError, match=name):
            net.backward(batch, recursion, lists[0], 0, 0, 0, 0, 0, 0, 0, 0, lists[1], 0, 1)
    for call in (
        lambda: net.pack(right, False, 0, 0),
        lambda: net.workspace_size(batch, recursion, False, 0),
        lambda: net.forward(batch, recursion, 0, 0, 0, 0, 0, 0),
        lambda: net.backward(batch, recursion, right, 0, 0, 0, 0, 0, 0, 0, 0, right, 0, -1),
        lambda: native.fma_peak(0.001, 0),
        lambda: native.tile_rate(0.001, 0),
    ):
        with pytest.raises(ValueError, match="threads"):
            call()
    for sizes, complaint in (
        ((8, 3, 16, 2, True, False, False, 1e-5), "heads must divide width"),
        ((8, 0, 16, 2, True, False, False, 1e-5), "at least 1"),
        ((0, 1, 16, 2, True, False, False, 1e-5), "at least 1"),
        ((9, 3, 16, 2, True, False, True, 1e-5), "even head size"),
    ):
        with pytest.raises(ValueError, match=complaint):
            native.Network(*sizes)
    with pytest.raises(ValueError, match="rows"):
        native.Batch(-1, 0, 0, 0, 0, 0)
    for dropout in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="dropout"):
            native.Recursion(0, 0, 0, 0, 0, -1.0, dropout, 0, False)
    with pytest.raises(TypeError):
        native.Recursion(0, torch.zeros(1), 0, 0, 0, -1.0, 0.0, 0, False)


def test_other_threads_run_while_the_kernels_do(native: ModuleType) -> None:
    busy = threading.Thread(target=native.fma_peak, args=(0.5, 1))
    busy.start()
    turns = 0
    while busy.is_alive():
        time.sleep(0.01)
        turns += 1
    assert turns >= 5


@pytest.mark.skipif(platform.machine() != "x86_64", reason="there is only one instruction set")
def test_instruction_sets_share_no_function(tmp_path: Path) -> None:
    """The linker could keep either copy of a function that is compiled for AVX-512 and for all machines."""
    compiler, nm = shutil.which("g++"), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("needs g++ and nm")
    # Without optimisation nothing is inlined, so every function that could be shared is a symbol.
    flags = ["-std=c++20", "-O0", "-fopenmp"]
    flags += [f"-m{feature}" for feature in ("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx2", "fma")]
    flags += ["-DTRM_ISA=avx512", "-DTRM_WIDTH=16", "-DTRM_TILE_ROWS=14"]
    compiled = tmp_path / "kernels.o"
    subprocess.run([compiler, *flags, "-c", ROOT / "csrc/kernels.cpp", "-o", compiled], check=True)
    listing = subprocess.run(
        [nm, "-C", "--defined-only", compiled], check=True, capture_output=True, text=True
    )
    symbols = [line.split(maxsplit=2)[1:] for line in listing.stdout.splitlines()]
    assert any(name == "trm::avx512::table" for _, name in symbols)
    assert [name for kind, name in symbols if kind in "TW" and "trm::avx512::" not in name] == []
    # Nor may any code run when the module loads.
    assert [name for _, name in symbols if "GLOBAL__sub_I" in name] == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 assembly")
@pytest.mark.parametrize(("name", "vectors"), [("avx512", 2), ("avx512", 4), ("avx2", 2), ("portable", 2)])
def test_the_micro_kernel_keeps_its_sums_in_registers(name: str, vectors: int, tmp_path: Path) -> None:
    """A sum that spills to the stack costs a fifth of the speed, which no test of results would reveal."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    lines = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(rf"add_kernels\(\s*{name} (\d+) (\d+)([^)]*)\)", lines)
    assert found is not None
    rows = 6 if vectors == 4 else int(found[2])
    lefts = ("kByRows", "kPacked") if vectors == 4 else ("kByRows", "kPacked", "kByColumns")
    source = tmp_path / "tile.cpp"
    source.write_text(
        f'#include "{ROOT}/csrc/micro_kernel.h"\n'
        + "".join(
            f"template void trm::{name}::tile<{rows}, {vectors}, trm::{name}::Left::{left}>(int64_t, "
            f"const float*, ptrdiff_t, trm::{name}::Right, float*, ptrdiff_t, bool, trm::{name}::Prefetch);\n"
            for left in lefts
        )
    )
    flags = ["-std=c++20", "-O3", "-ffp-contract=fast", "-Wno-psabi", *found[3].split()]
    flags += [f"-DTRM_ISA={name}", f"-DTRM_WIDTH={found[1]}", f"-DTRM_TILE_ROWS={found[2]}"]
    assembly = subprocess.run(
        [compiler, *flags, "-S", source, "-o", "-"], check=True, capture_output=True, text=True
    ).stdout
    assert len(re.findall("^_ZN3trm.*tile.*:$", assembly, re.MULTILINE)) == len(lefts)
    # Below the stack or frame pointer; rbp may also hold any other address.
    stack = r"\(%rsp\)|-\d+\(%rbp\)"
    spills = [line for line in assembly.splitlines() if re.search("[xyz]mm", line) and re.search(stack, line)]
    assert spills == []
