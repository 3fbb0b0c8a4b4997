"""Runs functions in processes forked from one that has imported everything.

A case then takes milliseconds, may use up its time or its memory, and leaves nothing behind. The server is a
process of its own: those of pytest have threads, which a fork does not survive, and TRITON_INTERPRET set.

``multiprocessing``'s forkserver is not used: a process has only one, and other tests start it with imports of
their own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Memory of a child in addition to what the server has mapped: huge sizes fail in it, not on the machine.
_MEMORY = 8 * 2**30
#: Seconds that a child has to end after SIGTERM.
_GRACE = 15.0
#: Bytes at the end of stdout and stderr that are kept.
_KEPT = 2**18


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        status: Exit code; negative for a signal; None if it had to be killed.
        stopped: Whether its time was up, so that it was sent SIGTERM.
        out, err: What it wrote.
        value: What its function returned, as JSON; None if it did not return.
        seconds: How long it took.
    """

    status: int | None
    stopped: bool
    out: str
    err: str
    value: Any
    seconds: float


class Children:
    """Starts the server, in which ``home`` is the home folder.

    Args:
        home: An empty folder for caches and results.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "HF_HOME": str(home / "hub"),
            "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "agg",
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
        }
        self._server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=Path(__file__).parents[2],
        )

    def close(self) -> None:
        """End the server."""
        self._server.communicate()

    def run(self, function: str, *arguments: Any, folder: Path, seconds: float = 20.0) -> Ended:
        """Call a function, ``"module:name"``, with JSON values, in a child that works in ``folder``."""
        request = {"function": function, "arguments": arguments, "folder": str(folder), "seconds": seconds}
        return Ended(**self._ask(request))

    def learn(self, modules: list[str]) -> None:
        """Import modules into the server, so that children need not."""
        self._ask({"modules": modules})

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def _serve(home: Path) -> None:
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        answer = _learn(request["modules"]) if "modules" in request else _fork(request, home)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _learn(modules: list[str]) -> None:
    for name in modules:
        # Some modules can be imported only by others.
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _fork(request: dict[str, Any], home: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=home) as name:
        place, started = Path(name), time.monotonic()
        child = os.fork()
        if child == 0:
            _be_child(request, place)
        status, stopped = _wait(child, request["seconds"]), False
        if status is None:
            stopped = True
            os.kill(child, signal.SIGTERM)
            status = _wait(child, _GRACE)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        value = place / "value"
        return {
            "status": status,
            "stopped": stopped,
            "out": _text(place / "out"),
            "err": _text(place / "err"),
            "value": json.loads(value.read_text()) if value.exists() else None,
            "seconds": time.monotonic() - started,
        }


def _be_child(request: dict[str, Any], place: Path) -> None:
    status = 70
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="strict", closefd=False)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + _MEMORY, mapped + _MEMORY))
        os.chdir(request["folder"])
        module, _, name = request["function"].partition(":")
        value = getattr(importlib.import_module(module), name)(*request["arguments"])
        (place / "value").write_text(json.dumps(value))
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(status)


def _wait(child: int, seconds: float) -> int | None:
    end, pause = time.monotonic() + seconds, 0.001
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(1.3 * pause, 0.05)
    return None


def _text(path: Path) -> str:
    if not path.exists():
        return ""
    return path.read_bytes()[-_KEPT:].decode(errors="backslashreplace")


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
