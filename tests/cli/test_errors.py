"""Every expected error is one line; the streams and signals of the process."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import click
import pytest
from click.testing import CliRunner
from safetensors import SafetensorError
from torch import OutOfMemoryError

from llm_trm.cli.group import Group
from llm_trm.errors import InputError, Interrupted
from trm_kernels.backends import BackendError


def fails_with(error: BaseException) -> click.Group:
    """A command that raises ``error``."""

    @click.group(cls=Group)
    def main() -> None:
        pass

    @main.command()
    def fail() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("a: b\nc"), "a: b c"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/a"),
            "out/a: No space left on device: free some",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "a file or standard output: No space left"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a"),
            "a: Permission denied: change its permissions",
        ),
        (OSError("the hub says no"), "the hub says no"),
        (
            SafetensorError("I/O error: File too large (os error 27)"),
            "raise the limit (ulimit -f), or choose",
        ),
        (Exception("No space left on device (os error 28)"), "free some space"),
        (SafetensorError("header too large"), "weights cannot be read or written (header too large)"),
        (RecursionError("maximum recursion depth exceeded"), "nests too deeply"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "surrogates not allowed"),
        (MemoryError(), "memory ran out"),
        (OutOfMemoryError("CUDA out of memory. Tried"), "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory ran out"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3"), "could not be written completely"),
        (RuntimeError("Symlink loop from '/a/loop'"), "a symbolic link leads back to itself"),
        (EOFError(), "the input ends too early (no more data)"),
        (OSError(), "error: OSError"),
        (ValueError("TRM_GRAPHS: 'x' is neither 0 nor 1"), "error: TRM_GRAPHS: 'x' is neither 0 nor 1"),
        (BackendError("backend 'triton' cannot"), "cannot: choose another backend with TRM_BACKEND"),
    ],
)
def test_an_expected_error_is_one_line(error: BaseException, words: str) -> None:
    done = CliRunner().invoke(fails_with(error), ["fail"])
    assert done.exit_code == 2
    assert done.stderr.startswith("llm-trm: error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (KeyboardInterrupt(), "interrupted", 130),
        (Interrupted(signal.SIGTERM, "stopped; to go on: again"), "stopped; to go on: again", 143),
    ],
)
def test_an_interruption_is_one_line(error: BaseException, words: str, code: int) -> None:
    done = CliRunner().invoke(fails_with(error), ["fail"])
    assert (done.exit_code, done.stderr) == (code, f"llm-trm: {words}\n")


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), KeyError("ours")])
def test_a_fault_of_ours_keeps_its_traceback(error: Exception) -> None:
    done = CliRunner().invoke(fails_with(error), ["fail"])
    assert done.exception is error


def test_a_message_of_megabytes_keeps_its_start_and_its_remedy() -> None:
    done = CliRunner().invoke(fails_with(InputError(f"file {'x' * 3_900_000}: correct it")), ["fail"])
    assert len(done.stderr) < 2000
    assert done.stderr.startswith("llm-trm: error: file xxx")
    assert done.stderr.endswith("xxx: correct it\n")
    done = CliRunner().invoke(fails_with(KeyError()), ["y" * 1_000_000])
    assert len(done.stderr) < 2000


def test_debugging_shows_the_traceback_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRM_DEBUG", "1")
    done = CliRunner().invoke(fails_with(OSError(errno.EIO, "Input/output error", "a")), ["fail"])
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert "raise error" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("llm-trm: error: a: Input/output error")


def _run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    given = {"stderr": subprocess.PIPE, "text": True, "check": False, **options}
    return subprocess.run([sys.executable, "-m", "llm_trm", *command], **given)  # type: ignore[call-overload, no-any-return]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("command", [("data", "arithmetic", "--num-samples", "3"), ("env",)])
def test_a_full_standard_output_is_one_line(command: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = _run(*command, stdout=full)
    assert done.returncode == 2
    assert "standard output: No space left on device: free some space" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX shell")
def test_a_closed_standard_output_is_no_traceback() -> None:
    command = f"{sys.executable} -m llm_trm data arithmetic --num-samples 3 >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="POSIX shell")
def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m llm_trm data arithmetic --num-samples 30000 | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_narrow_encoding_escapes_characters(encoding: str) -> None:
    # The errors of a table, a grid and a message would end in the middle of a run.
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = _run("bench", "--backends", "\u03c0", stdout=subprocess.PIPE, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("llm-trm: error: ")
    assert "\\u03c0" in done.stderr or "\u03c0" in done.stderr  # click writes UTF-8 in place of ASCII
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_while_modules_are_imported_is_one_line() -> None:
    code = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from llm_trm.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "llm-trm: interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_sigterm_ends_forked_workers_quietly() -> None:
    @click.group(cls=Group)
    def main() -> None:
        pass

    @main.command()
    def fork() -> None:
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        time.sleep(0.2)
        worker.terminate()
        worker.join()
        click.echo(worker.exitcode)

    done = CliRunner().invoke(main, ["fork"])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "143\n", "")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_sigterm_removes_what_is_half_written(tmp_path) -> None:
    output = tmp_path / "a.jsonl"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "llm_trm",
            "data",
            "arithmetic",
            "--num-samples",
            "3000000",
            "-o",
            str(output),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not any(tmp_path.iterdir()) and time.monotonic() < until:
        time.sleep(0.05)
    assert any(tmp_path.iterdir())
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (143, "llm-trm: terminated\n")
    assert not any(tmp_path.iterdir())
