"""Files of tensors that are missing, cut off, pointers, of another format, or that contain NaN."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save
from torch import Tensor

from llm_trm.errors import InputError
from llm_trm.weights import read_shapes, read_tensors, read_torch, require_finite

pytestmark = pytest.mark.upstream

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def pickled(content: Any, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


TENSORS = save({"a": torch.arange(100.0), "b": torch.ones(3, dtype=torch.int64)})
PICKLED = pickled({"a": torch.arange(100.0)})
FAULTS: list[tuple[bytes | None, str]] = [
    (None, "does not exist: do this"),
    (b"", r"\(the file is empty\): do this"),
    (POINTER, r"is a Git LFS pointer.*`git lfs pull`"),
    (bytes(range(256)) * 4, "cannot be read .*: do this"),
    (b"PK\3\4" + b"\0" * 100, "cannot be read .*: do this"),
]


def write(path: Path, content: bytes | None) -> Path:
    if content is not None:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("read", [read_tensors, read_shapes])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        *FAULTS,
        (TENSORS[:-1], r"\(the file is incomplete or damaged\): do this"),
        (TENSORS[: len(TENSORS) // 2], r"incomplete.*: do this"),
        (TENSORS[:4], "not a safetensors file"),
        (PICKLED, "not a safetensors file"),
    ],
    ids=itertools.count(),
)
def test_safetensors(read: Callable[..., Any], content: bytes | None, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", content)
    with pytest.raises(InputError, match=f"{path} .*{words}") as refused:
        read(path, "do this")
    assert "\n" not in str(refused.value)


def test_whole_files(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", TENSORS)
    assert torch.equal(read_tensors(path, "")["a"], torch.arange(100.0))
    assert read_shapes(path, "") == {"a": (100,), "b": (3,)}
    for content in (PICKLED, pickled({"a": torch.arange(100.0)}, zipped=False)):
        path = write(tmp_path / "x.pt", content)
        for mapped in (False, True):
            assert torch.equal(read_torch(path, "", mapped=mapped)["a"], torch.arange(100.0))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        *FAULTS,
        (PICKLED[: len(PICKLED) // 2], r"\(the file is incomplete or damaged\): do this"),
        (pickled([1], zipped=False)[:20], "cannot be read .*: do this"),
        (pickled({"x": CliRunner}), "objects other than tensors, which could run code: do this"),
        (pickled({"x": CliRunner}, zipped=False), "could run code: do this"),
        (b"step", "cannot be read .*: do this"),
        (b"\x80\x02]q\x00" + b"(" * 1000, "cannot be read .*: do this"),
    ],
    ids=itertools.count(),
)
def test_torch_files(mapped: bool, content: bytes | None, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "optimizer.pt", content)
    with pytest.raises(InputError, match=f"{path} .*{words}") as refused:
        read_torch(path, "do this", mapped=mapped)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    right = torch.randn(3, 70).to(dtype)
    wrong = right.clone()
    wrong[1, 66] = value
    path = write(tmp_path / "x.safetensors", save({"right": right, "wrong": wrong}))
    with pytest.raises(InputError, match=f"{path} contains NaN or infinity in wrong: do this"):
        read_tensors(path, "do this")
    with pytest.raises(InputError, match="in strided"):
        require_finite([("strided", wrong.t()[::2])], "x", "do this")
    assert load_file(path)["wrong"].dtype == dtype  # the file itself is whole


def test_values_that_are_fine() -> None:
    largest = torch.finfo(torch.float32).max
    tensors: dict[str, Tensor] = {
        "empty": torch.empty(0),
        "scalar": torch.tensor(1.0),
        "largest": torch.tensor([largest, -largest]),
        "whole": torch.tensor([2**62]),
        "flags": torch.tensor([True]),
        "meta": torch.empty(3, device="meta"),
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
    }
    require_finite(tensors.items(), "x", "")
    with pytest.raises(InputError, match="x contains NaN or infinity in fp8"):
        require_finite([("fp8", torch.tensor([torch.nan]).to(torch.float8_e4m3fn))], "x", "")
