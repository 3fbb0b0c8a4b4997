"""Atomically written files."""

import os
import stat

import pytest
import torch

from llm_trm.errors import InputError
from llm_trm.files import (
    read_json,
    read_tensors,
    replacing,
    writable_folder,
    write_json,
    write_tensors,
    write_text,
)


def test_written_files_are_read_back(tmp_path) -> None:
    write_json(tmp_path / "a.json", {"b": [1, None]})
    assert read_json(tmp_path / "a.json", "") == {"b": [1, None]}
    write_tensors(tmp_path / "a.safetensors", {"t": torch.arange(6).view(2, 3).t()})
    assert torch.equal(read_tensors(tmp_path / "a.safetensors", "")["t"], torch.arange(6).view(2, 3).t())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_as_public_as_the_umask_allows(tmp_path) -> None:
    old = os.umask(0o022)
    try:
        write_text(tmp_path / "a", "")
        write_tensors(tmp_path / "b", {"t": torch.zeros(1)})
    finally:
        os.umask(old)
    for name in "ab":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o644


def test_errors_name_file_and_remedy(tmp_path) -> None:
    (tmp_path / "broken").write_text("{")
    for read in (read_json, read_tensors):
        with pytest.raises(InputError, match="missing does not exist: do this"):
            read(tmp_path / "missing", "do this")
        with pytest.raises(InputError, match=r"broken cannot be read .*: do this"):
            read(tmp_path / "broken", "do this")
    with pytest.raises(InputError, match="choose another folder"):
        writable_folder(tmp_path / "broken" / "inside")
