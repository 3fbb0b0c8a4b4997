"""Every kernel configuration compiles for GPUs that are not present, within their limits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
#: All configurations of a target take 4 to 8 minutes on one core and are marked slow.
DEFAULT_TARGETS = ("sm_90+core",)

# Not marked `interpreter`: nothing is launched, so a GPU run need not spend this time.
TARGETS = pytest.importorskip("trm_kernels.ops._launch", reason="triton is not installed").TARGETS


def run_script(name: str, environment: dict[str, str], *arguments: str) -> list[Any]:
    """Run a script of this folder in a separate process and return the JSON lines that it prints."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / name), *arguments],
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def faults(row: dict[str, Any]) -> list[str]:
    found = []
    if row["spills_in_loop"] or row["stack"] > 16:
        found.append(f"spills {row['stack']} bytes at {row['registers']} registers")
    if row["shared_memory"] > row["limit"]:
        found.append(f"takes {row['shared_memory']} bytes of shared memory, over {row['limit']}")
    narrow = row["operand"] in ("torch.float16", "torch.bfloat16", "torch.float8_e4m3fn")
    if row["target"] == "sm_90" and row["product"] and narrow and not row["wgmma"]:
        found.append("has no wgmma")
    return found + row["hazards"]


@pytest.mark.parametrize(
    "target",
    [
        target if target in DEFAULT_TARGETS else pytest.param(target, marks=pytest.mark.slow)
        for target in (*DEFAULT_TARGETS, *TARGETS, "sm_80+tf32", "sm_90+tf32")
    ],
)
def test_every_configuration_compiles_within_limits(
    target: str, compiler_environment: dict[str, str]
) -> None:
    rows = run_script("ahead_of_time.py", compiler_environment, target)
    expected = {"gemm_kernel", "attention_kernel", "attention_backward_q_kernel"}
    if not target.endswith("+tf32"):
        expected.add("fold_kernel")  # multiplies no matrices, so TF32 does not apply
    assert expected <= {row["kernel"] for row in rows}
    wrong = [f"{row['configuration']}: {', '.join(faults(row))}" for row in rows if faults(row)]
    assert not wrong, "\n".join(wrong)


def test_a_fault_is_detected() -> None:
    good = {
        "target": "sm_90",
        "kernel": "gemm_kernel",
        "product": True,
        "operand": "torch.bfloat16",
        "shared_memory": 1,
        "limit": 2,
        "stack": 0,
        "spills_in_loop": False,
        "registers": 64,
        "wgmma": True,
        "hazards": [],
    }
    assert not faults(good)
    for change in ({"stack": 24}, {"spills_in_loop": True}, {"shared_memory": 3}, {"wgmma": False}):
        assert faults(good | change), change
    assert faults(good | {"hazards": ["a race"]})


def test_kernels_with_the_known_races_are_detected(compiler_environment: dict[str, str]) -> None:
    of_operand, of_store = run_script("hazardous.py", compiler_environment)
    assert len(of_operand) == 1 and "operand of a product" in of_operand[0]
    assert of_store and all("stores to" in line for line in of_store)
