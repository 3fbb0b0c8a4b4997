"""Real processes: two in one folder, signals, and folders that cannot be written."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_trm.claims import LOCK_FILE
from tests.cli.test_outputs import content, refusal, run

DATAGEN = ("datagen", "--model", "arithmetic", "--device", "cpu", "--shard-size", "8", "--batch-size", "1")
#: Capabilities with which root writes in folders that their mode protects.
_DAC_OVERRIDE, _DAC_READ_SEARCH, _PR_CAPBSET_DROP = 1, 2, 24


def start(*arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "llm_trm", *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)


def test_datagen_is_alone_and_stops(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    first = start(*DATAGEN, "--num-samples", "2000", "--seed", "1", "-o", folder)
    wait_for(folder / "shard-00001.jsonl", first)
    second = run(*DATAGEN, "--num-samples", "20", "--seed", "2", "-o", folder)
    assert refusal(second).startswith(f"llm-trm: error: {folder} is in use by process {first.pid} on ")
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 143
    assert said.splitlines()[-1].startswith(
        "llm-trm: stopped: the same command continues after the last complete shard: llm-trm datagen --model "
    )
    assert not (folder / LOCK_FILE).exists()
    assert all(path.name.startswith(("shard-", "settings.json")) for path in folder.iterdir())


def test_one_process_writes_puzzles(tmp_path: Path) -> None:
    folder = tmp_path / "sudoku"
    long = start("data", "sudoku", "--num-samples", "100000", "-o", folder)
    wait_for(folder / LOCK_FILE, long)
    second = run("data", "maze", "--size", "5", "--num-samples", "2", "-o", folder)
    assert f"{folder} is in use by process {long.pid}" in refusal(second)
    long.send_signal(signal.SIGINT)
    _, said = long.communicate(timeout=60)
    assert long.returncode == 130
    assert said.splitlines()[-1] == "llm-trm: interrupted"
    assert not folder.exists()


def _without_overriding_modes() -> None:
    """Make root obey the modes of files, from the next exec on; other users always do."""
    for capability in (_DAC_OVERRIDE, _DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


_SCRIPT = """
import sys
from click.testing import CliRunner
from llm_trm.cli import main
folder = sys.argv[1]
arithmetic = ["--model", "arithmetic", "--device", "cpu"]
commands = [
    ["data", "arithmetic", "-o"],
    ["generate", "1+1", *arithmetic, "-o"],
    ["eval", "lm", *arithmetic, "-o"],
    ["eval", "lm", *arithmetic, "--plot"],
    ["eval", "puzzle", "--checkpoint", "x", "-o"],
    ["eval", "phase2", "--checkpoint", "x", "--data", "x", "-o"],
    ["solve", "1... ..3. .4.. ...2", "--gif"],
    ["bench", "--quick", "--plot"],
    ["bench", "--quick", "--json"],
    ["export", "official", "x", "-o"],
    ["data", "sudoku", "-o"],
    ["data", "maze", "-o"],
    ["data", "arc", "x", "-o"],
    ["import", "official", "x", "-o"],
    ["datagen", *arithmetic, "-o"],
]
for command in commands:
    for place in ("new", "old"):
        for more in ([], ["--overwrite"]):
            result = CliRunner().invoke(main, [*command, f"{folder}/{place}.png", *more], prog_name="llm-trm")
            said = " ".join(result.stderr.splitlines() or ["-"])
            print(result.exit_code, said, "|", *command, place, *more)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_read_only_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old.png").write_text("mine")
    folder.chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(folder)],
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=_without_overriding_modes,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    finally:
        folder.chmod(0o755)
    lines = done.stdout.splitlines()
    assert len(lines) == 60, done.stderr
    for line in lines:
        assert line.startswith("2 llm-trm: error: "), line
    assert content(folder) == {"old.png": b"mine"}
