"""Atomically written files."""

import os
import stat
from pathlib import Path

import pytest
import torch

from llm_trm.errors import InputError
from llm_trm.files import (
    read_json,
    read_object,
    replacing,
    require_new,
    require_writable,
    writable_folder,
    write_json,
    write_text,
)
from llm_trm.weights import read_tensors, write_tensors


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


def test_a_link_stays_and_its_file_is_replaced(tmp_path) -> None:
    (tmp_path / "far").mkdir()
    write_text(tmp_path / "far" / "a.txt", "old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "far" / "a.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "far" / "a.txt").read_text() == "new"


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="no special files")
def test_a_special_file_is_written_and_not_replaced(tmp_path) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    require_new(tmp_path / "null", overwrite=False)
    write_text(tmp_path / "null", "gone")
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no names of open files")
def test_a_pipe_is_written_directly() -> None:
    reading, writing = os.pipe()
    try:
        write_text(Path(f"/dev/fd/{writing}"), "new")  # as /dev/stdout, if a command follows in a pipe
        assert os.read(reading, 10) == b"new"
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no streams by name")
def test_a_stream_into_a_file_is_written_directly(tmp_path) -> None:
    with (tmp_path / "a").open("w") as file:  # as `command -o /dev/stdout > a`
        stream = Path(f"/dev/fd/{file.fileno()}")
        require_new(stream, overwrite=False)
        write_text(stream, "new")
        assert (tmp_path / "a").samefile(stream)
    assert (tmp_path / "a").read_text() == "new"


def test_an_existing_file_is_only_replaced_on_request(tmp_path) -> None:
    require_new(tmp_path / "a", overwrite=False)
    (tmp_path / "a").touch()
    with pytest.raises(InputError, match=r"a already exists: replace it with --overwrite, .* another --gif"):
        require_new(tmp_path / "a", overwrite=False, option="--gif")
    require_new(tmp_path / "a", overwrite=True)


def test_a_folder_that_can_be_written_is_not_created(tmp_path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is not a folder"):
        require_writable(tmp_path / "file" / "b")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop is not a folder"):
        require_writable(tmp_path / "loop")


def test_an_object_is_required(tmp_path) -> None:
    path = tmp_path / "a.json"
    assert read_object(path, "do this", optional=True) == {}
    with pytest.raises(InputError, match=r"a\.json does not exist: do this"):
        read_object(path, "do this")
    path.write_text("[1]")
    for optional in (False, True):
        with pytest.raises(InputError, match=r"a\.json does not contain a JSON object: do this"):
            read_object(path, "do this", optional=optional)
    path.write_text('{"a": 1}')
    assert read_object(path, "do this", optional=True) == {"a": 1}
