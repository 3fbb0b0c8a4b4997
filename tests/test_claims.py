"""Folders that one process at a time writes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_trm.claims import LOCK_FILE, claimed
from llm_trm.errors import InputError
from llm_trm.files import unfinished

_HOLD = """
import sys, time
from pathlib import Path
from llm_trm.claims import claimed
from llm_trm.files import unfinished
folder = Path(sys.argv[1])
with claimed(folder), unfinished(folder, "curves.png"):
    print("held", flush=True)
    time.sleep(600)
"""


def _holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with _holder(folder) as first:
        words = f"in use by process {first.pid} on .*choose another folder"
        with pytest.raises(InputError, match=words), claimed(folder):
            pytest.fail("two processes hold one folder")
        (left,) = folder.glob(".curves.png.*")
        # A killed process leaves its temporary files and the lock file, but no lock.
        first.kill()
        first.wait()
    assert (folder / LOCK_FILE).exists()
    with claimed(folder):
        assert not left.exists()
    assert not any(folder.iterdir())


def test_a_refused_call_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError), claimed(tmp_path / "a" / "b"):
        raise InputError("no")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_existed_or_has_files_stays(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with claimed(tmp_path / "old"):
        pass
    with claimed(tmp_path / "new"):
        (tmp_path / "new" / "weights").touch()
    assert [path.name for path in (tmp_path / "old").iterdir()] == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["weights"]


def test_only_own_leftovers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".mine").mkdir()
    (tmp_path / ".curves.png.abc").touch()
    other = tmp_path / "elsewhere"
    other.mkdir()
    (tmp_path / ".link.llm-trm-tmp").symlink_to(other)
    with claimed(tmp_path):
        pass
    kept = {".mine", ".curves.png.abc", "elsewhere", ".link.llm-trm-tmp"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_the_lock_survives_a_file_that_its_holder_removes(tmp_path: Path) -> None:
    for _ in range(3):
        with claimed(tmp_path):
            assert (tmp_path / LOCK_FILE).exists()
        assert not (tmp_path / LOCK_FILE).exists()


def test_a_refused_second_claim_touches_nothing(tmp_path: Path) -> None:
    with claimed(tmp_path), unfinished(tmp_path, "a") as temporary:
        with pytest.raises(InputError, match="in use"), claimed(tmp_path):
            pytest.fail("one folder is claimed twice")
        assert temporary.exists()
        assert (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gets_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / LOCK_FILE).write_text("a killed process\n")
    with unfinished(tmp_path, "a") as temporary:  # of a process that may still be alive
        with claimed(tmp_path):
            pass
        assert temporary.exists()
    assert f"{tmp_path}: its file system has no locks ({os.strerror(number)})" in caplog.text
    assert not any(tmp_path.iterdir())


def test_a_module_that_a_launcher_starts_is_named_as_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/site-packages/llm_trm/__main__.py", "datagen"])
    with claimed(tmp_path), pytest.raises(InputError, match=r"\(llm-trm datagen\)"), claimed(tmp_path):
        pass
