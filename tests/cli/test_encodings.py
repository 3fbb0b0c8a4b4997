"""No output ends in an error because the encoding of its stream lacks a character."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from llm_trm.cli import main

#: Characters outside cp1252 and ASCII, in names of files, in questions and in fields of records.
NAME, QUESTION, FIELD = "λ█", "1+π?", "— 中│"


class _Stream(io.TextIOWrapper):
    """A stream like those of a process: strict, and perhaps a terminal."""

    def __init__(self, encoding: str, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def written(self) -> bytes:
        self.flush()
        content = self.buffer
        assert isinstance(content, io.BytesIO)
        return content.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(NAME)
    rows = [{"question": f"{number}+1", "answer": QUESTION, "kind": FIELD} for number in range(4)]
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    (folder / f"{NAME}.jsonl").write_text(text, encoding="utf-8")
    return folder


#: Later commands use what earlier ones write; exit codes of 1 are wrong answers.
COMMANDS = [
    f"data sudoku --size 4 --num-samples 20 --test-samples 8 -o {NAME}",
    f"train puzzle --data {NAME} -o run-{NAME} --steps 2 --batch-size 8 --d-model 16 --heads 2 --layers 1",
    f"eval puzzle --checkpoint run-{NAME} --data {NAME} -o {NAME}.json",
    f"solve 1...|..3.|.4..|...2 --checkpoint run-{NAME} --delay 0",
    f"generate {QUESTION} --model arithmetic --mode think --max-new-tokens 4 -v",
    f"eval lm --data {NAME}.jsonl --model arithmetic --mode no-think --max-new-tokens 4 --by kind "
    f"--plot {NAME}.svg",
    "env --plan --model arithmetic --context 64",
    "--help",
]


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_narrow_encoding(
    encoding: str, terminal: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{NAME}.jsonl").symlink_to(folder / f"{NAME}.jsonl")
    for command in COMMANDS:
        out, err = _Stream(encoding, terminal), _Stream(encoding, terminal)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            main(command.split(), prog_name="llm-trm")
        assert end.value.code in (0, None) or command.startswith("solve"), (command, err.written())
        assert out.written(), command
        assert b"Traceback" not in err.written()
