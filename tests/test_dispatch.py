"""Tables of measured choices: precedence, buckets, and invalid tables."""

from __future__ import annotations

import json
import timeit
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from trm_kernels.ops import dispatch
from trm_kernels.ops._launch import TARGETS
from trm_kernels.ops.dispatch import Entry, Table, TableWarning, choose
from trm_kernels.ops.fingerprint import KERNELS, fingerprint
from trm_kernels.ops.tiles import Activation, Choice, Problem, Tile, flaw, heuristic

TARGET = replace(TARGETS["sm_90"], name="NVIDIA H100 80GB HBM3")
PROBLEM = Problem("gemm", 256, 768, 256, 1, Activation.NONE, torch.bfloat16, False)
OTHER = Choice("triton", Tile(32, 64, 64, 4, 2))


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder and the packaged one, both empty."""
    monkeypatch.setenv("TRM_TABLES", str(tmp_path / "user"))
    monkeypatch.delenv("TRM_DISPATCH", raising=False)
    monkeypatch.setattr(dispatch, "PACKAGED", tmp_path / "packaged")
    dispatch.refresh()
    yield tmp_path
    monkeypatch.undo()
    dispatch.refresh()


def write(path: Path, choice: Choice = OTHER, problem: Problem = PROBLEM) -> Path:
    entry = Entry(choice, 0.01, 0.02, problem, fingerprint(problem.kernel), "3.6.0")
    table = Table({"name": TARGET.name}, {"time": "2026-01-01"}, {dispatch.key(problem): entry})
    table.write(path)
    dispatch.refresh()
    return path


def test_without_tables_the_heuristic_decides() -> None:
    assert choose(PROBLEM, TARGET) == heuristic(PROBLEM, TARGET)


def test_the_users_table_precedes_the_packaged_one() -> None:
    packaged = Choice("triton", Tile(64, 64, 64, 4, 3))
    write(dispatch.packaged_path(TARGET.name), packaged)
    assert choose(PROBLEM, TARGET) == packaged
    write(dispatch.user_path(TARGET.name))
    assert choose(PROBLEM, TARGET) == OTHER
    # Per entry: entries missing in the user's table come from the packaged one.
    wider = PROBLEM._replace(N=512)
    write(dispatch.packaged_path(TARGET.name), packaged, wider)
    assert choose(wider, TARGET) == packaged
    assert choose(PROBLEM, TARGET) == OTHER


def test_the_environment_disables_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    write(dispatch.user_path(TARGET.name))
    monkeypatch.setenv("TRM_DISPATCH", "heuristic")
    dispatch.refresh()
    assert choose(PROBLEM, TARGET) == heuristic(PROBLEM, TARGET)
    assert "TRM_DISPATCH" in dispatch.describe()[0]
    monkeypatch.setenv("TRM_DISPATCH", "fastest")
    dispatch.refresh()
    with pytest.raises(ValueError, match="tables or heuristic"):
        choose(PROBLEM, TARGET)


def test_targets_that_are_only_compiled_for_use_no_table() -> None:
    write(dispatch.user_path(TARGET.name))
    assert choose(PROBLEM, TARGETS["sm_90"]) == heuristic(PROBLEM, TARGET)


def test_rows_and_batch_fall_into_buckets() -> None:
    write(dispatch.user_path(TARGET.name))
    for rows in (200, 256, 300):
        assert choose(PROBLEM._replace(M=rows), TARGET) == OTHER
    for change in ({"M": 500}, {"N": 769}, {"K": 128}, {"operand": torch.float16}):
        assert choose(PROBLEM._replace(**change), TARGET) != OTHER, change
    assert [dispatch.bucket(size) for size in (0, 1, 2, 3, 5, 6, 97, 74496)] == [1, 1, 2, 4, 4, 8, 128, 65536]
    gradient = PROBLEM._replace(kernel="weight_gradient", M=256, N=1024, K=1792)
    assert dispatch.key(gradient) == dispatch.key(gradient._replace(K=2048))
    assert dispatch.key(gradient) != dispatch.key(gradient._replace(M=255))
    # If transposed, M is the number of channels.
    tokens = PROBLEM._replace(transposed=True, M=512)
    assert dispatch.key(tokens) != dispatch.key(tokens._replace(M=513))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "not a table of format 1"),
        ('{"format": 2}', "not a table of format 1"),
        ('{"format": 1, "device": {}, "run": {}}', "has no device, run or entries"),
        ('{"format": 1, "device": {"name": "another"}, "run": {}, "entries": {}}', "measured on 'another'"),
        ("\udcff", "cannot be read"),
        ('{"run":' * 200_000, "nests too deeply"),
        (f'{{"format": "{"x" * 10_000}"}}', r"its format is 'x{99}\)"),
    ],
)
def test_an_unusable_table_warns_once(text: str, says: str) -> None:
    path = dispatch.user_path(TARGET.name)
    path.parent.mkdir()
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(TableWarning, match=says) as caught:
        assert choose(PROBLEM, TARGET) == heuristic(PROBLEM, TARGET)
        choose(PROBLEM._replace(N=512), TARGET)
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    assert "llm-trm tune" in str(caught[0].message)
    assert str(path) in dispatch.describe_target(TARGET)


def test_a_device_is_no_table() -> None:
    for path in (Path("/dev/zero"), Path("/")):
        with pytest.raises(dispatch.TableError, match="no regular file"):
            dispatch.read(path, TARGET)


@pytest.mark.parametrize(
    "change",
    [
        {"tile": {"m": 48, "n": 64, "k": 64, "warps": 4, "stages": 2}},
        {"tile": {"m": 8, "n": 64, "k": 64, "warps": 4, "stages": 2}},
        {"tile": {"m": 64, "n": 16, "k": 64, "warps": 4, "stages": 2}},
        {"tile": {"m": 64, "n": 64, "k": 64, "warps": 3, "stages": 2}},
        {"tile": {"m": 64, "n": 64, "k": 64, "warps": 4, "stages": 0}},
        {"tile": {"m": 256, "n": 256, "k": 256, "warps": 16, "stages": 4}},
        {"tile": {"m": 256, "n": 256, "k": 64, "warps": 1, "stages": 2}},
        {"tile": {"m": 64.0, "n": 64, "k": 64, "warps": 4, "stages": 2}},
        {"tile": {"m": 64}},
        {"tile": None},
        {"route": "magic"},
        {"splits": 2},
        {"measured": {"M": 256, "N": 512, "K": 256, "batch": 1}},
        {"ms": float("nan")},
        {"ms": 10**400},
        {"ms": "0.1"},
        {"heuristic_ms": float("inf")},
        {"heuristic_ms": -1.0},
    ],
)
def test_an_invalid_entry_is_ignored_and_the_others_are_used(change: dict[str, object]) -> None:
    path = write(dispatch.user_path(TARGET.name))
    content = json.loads(path.read_text())
    good = PROBLEM._replace(K=512)
    name = dispatch.key(PROBLEM)
    content["entries"][dispatch.key(good)] = {
        **content["entries"][name],
        "measured": {"M": 256, "N": 768, "K": 512, "batch": 1},
    }
    content["entries"][name].update(change)
    path.write_text(json.dumps(content))
    dispatch.refresh()
    with pytest.warns(TableWarning, match="1 entries are ignored"):
        assert choose(PROBLEM, TARGET) == heuristic(PROBLEM, TARGET)
    assert choose(good, TARGET) == OTHER


def test_writing_keeps_every_field() -> None:
    path = write(dispatch.user_path(TARGET.name))
    table = dispatch.read(path, TARGET)
    entry = table.entries[dispatch.key(PROBLEM)]
    assert (entry.choice, entry.ms, entry.heuristic_ms, entry.problem) == (OTHER, 0.01, 0.02, PROBLEM)
    assert table.run == {"time": "2026-01-01"}
    table.write(path)
    assert dispatch.read(path, TARGET) == table
    assert [file.name for file in path.parent.iterdir()] == ["nvidia-h100-80gb-hbm3.json"]


def test_entries_of_another_kernel_version_are_used_and_reported() -> None:
    path = write(dispatch.user_path(TARGET.name))
    content = json.loads(path.read_text())
    content["entries"][dispatch.key(PROBLEM)]["source"] = "0" * 12
    path.write_text(json.dumps(content))
    dispatch.refresh()
    assert choose(PROBLEM, TARGET) == OTHER
    assert "1 of them with another version" in dispatch.describe_target(TARGET)


def test_every_kernel_has_a_fingerprint() -> None:
    found = {kernel: fingerprint(kernel) for kernel in KERNELS}
    assert all(value is not None and len(value) == 12 for value in found.values()), found
    assert found["gemm"] == found["norm_gradient"] != found["weight_gradient"]


@pytest.mark.parametrize("target", [target for target in TARGETS.values() if target.kind == "cuda"])
@pytest.mark.parametrize("operand", [torch.bfloat16, torch.float32])
def test_the_heuristic_has_no_flaw(target: object, operand: torch.dtype) -> None:
    for kernel in KERNELS:
        for rows in (1, 97, 256, 8192, 74496):
            for activation in (Activation.NONE, Activation.SWIGLU):
                problem = Problem(kernel, rows, 1024, 512, 1, activation, operand, False)  # type: ignore[arg-type]
                assert flaw(problem, heuristic(problem, target), target) is None, problem  # type: ignore[arg-type]


def test_packaged_tables_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (Path(dispatch.__file__).parent / "tables").glob("*.json"):
        device = json.loads(path.read_text())["device"]
        target = type(TARGET)(**{name: device[name] for name in TARGET.__dataclass_fields__})
        assert not dispatch.read(path, target).flaws
        assert path.stem == dispatch.slug(device["name"])


def test_a_warm_lookup_is_cheap() -> None:
    choose(PROBLEM, TARGET)
    seconds = min(timeit.repeat(lambda: choose(PROBLEM, TARGET), number=2000, repeat=5)) / 2000
    assert seconds < 20e-6, f"{seconds * 1e6:.1f} us"  # measured 1 us; the margin is for loaded machines
