"""Tests of ``llm-trm solve``: its input, its output and its errors."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from torch import Tensor

from llm_trm.cli import main
from llm_trm.cli.solve_screen import Screen
from llm_trm.data.puzzles.maze import parse_maze
from llm_trm.evaluate.questions import read_questions
from llm_trm.evaluate.solving import Attempt, Step
from llm_trm.models.puzzle.paper import PuzzleTRM, PuzzleTRMConfig, save_puzzle_model

MAX_STEPS = 4
PUZZLE, SOLUTION = "1... ..3. .4.. ...2", "1324423124133142"
#: Solves the same grid except for one cell that is not a clue.
WRONG = SOLUTION[:-2] + "3" + SOLUTION[-1]
MAZE, SOLVED_MAZE = "#####\n#S  #\n# #G#\n#####", "#####\n#Soo#\n# #G#\n#####"
#: The paths from S to G through the upper and lower row have the same length.
ROUND, OVER, UNDER = "  S\n # \nG  ", "ooS\no# \nG  ", "  S\n #o\nGoo"


def save(folder: Path, cells: int, *, vocab_size: int = 6, **facts: Any) -> Path:
    torch.manual_seed(0)
    config = PuzzleTRMConfig(
        vocab_size=vocab_size,
        seq_len=cells,
        d_model=8,
        n_layers=1,
        n_heads=1,
        puzzle_len=0,
        puzzle_dim=0,
        n_latent_steps=1,
        n_deep_recursions=1,
        max_steps=MAX_STEPS,
    )
    folder.mkdir(parents=True)
    save_puzzle_model(PuzzleTRM(config), folder, **facts)
    return folder


@pytest.fixture(scope="module")
def sudoku(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("runs") / "sudoku", 16, task="sudoku", rows=4, columns=4)


def run(*arguments: str | Path, input: str | bytes | None = None) -> Result:
    command = ["solve", "--device", "cpu", *map(str, arguments)]
    return CliRunner().invoke(main, command, prog_name="llm-trm", input=input)


def tokens(text: str) -> Tensor:
    return read_questions(text, "test")[0].tokens.long()


def answer_tokens(text: str) -> Tensor:
    """Tokens of a Sudoku, or of a maze with its path."""
    return torch.from_numpy(parse_maze(text)).flatten().long() if "S" in text else tokens(text)


def answering(monkeypatch: pytest.MonkeyPatch, *tries: Sequence[tuple[str, float]]) -> list[float]:
    """Replace the models' answers and halting logits by step. Returns a list that records the noise."""
    noises: list[float] = []

    def trace(
        self: PuzzleTRM, asked: Tensor, puzzles: Tensor | None = None, *, noise: float = 0.0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        steps = tries[len(noises) % len(tries)]
        noises.append(noise)
        for answer, logit in steps:
            yield answer_tokens(answer)[None], torch.tensor([logit])
        pytest.fail("more steps were taken than there are")

    monkeypatch.setattr(PuzzleTRM, "trace", trace)
    return noises


def test_a_valid_answer(monkeypatch: pytest.MonkeyPatch, sudoku: Path) -> None:
    answering(monkeypatch, [(PUZZLE, -3.0), (SOLUTION, 2.0)])
    result = run(PUZZLE, "--checkpoint", sudoku)
    assert result.exit_code == 0, result.output
    # 1 / (1 + exp(-2)) = 0.881
    assert result.stdout == (
        "+-----+-----+\n| 1 3 | 2 4 |\n| 4 2 | 3 1 |\n"
        "+-----+-----+\n| 2 4 | 1 3 |\n| 3 1 | 4 2 |\n+-----+-----+\n"
        "Valid; step 2 of at most 4, halting confidence 88.1%.\n"
    )


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (WRONG, "row 4 contains 3 twice"),
        (SOLUTION[:-1] + "1", "cell (4, 4) contradicts its clue"),
        (PUZZLE, "cell (1, 2) is blank"),
    ],
)
def test_a_wrong_answer(monkeypatch: pytest.MonkeyPatch, sudoku: Path, answer: str, fault: str) -> None:
    answering(monkeypatch, [(answer, -2.0)] * MAX_STEPS)
    result = run(PUZZLE, "--checkpoint", sudoku)
    assert result.exit_code == 1
    assert f"Not valid: {fault}; step 4 of at most 4, halting confidence 11.9%." in result.stdout
    assert not result.stderr


def test_an_untrained_model_is_wrong_and_no_error(sudoku: Path) -> None:
    result = run(PUZZLE, "--checkpoint", sudoku, "--max-steps", "6", "--tries", "2")
    assert result.exit_code == 1
    assert "step 6 of at most 6, try 1 of 2, halting confidence 0.7%" in result.stdout


def test_the_surest_try_counts(monkeypatch: pytest.MonkeyPatch, sudoku: Path) -> None:
    noises = answering(
        monkeypatch, [(WRONG, -1.0)] * MAX_STEPS, [(WRONG, -1.0), (SOLUTION, 4.0)], [(WRONG, 1.0)]
    )
    result = run(PUZZLE, "--checkpoint", sudoku, "--tries", "3", "--noise", "0.5")
    assert result.exit_code == 0, result.output
    assert "Valid; step 2 of at most 4, try 2 of 3" in result.stdout
    assert noises == [0.0, 0.5, 0.5]


@pytest.mark.parametrize(
    "text",
    [
        "1.....3..4.....2",
        "1000 0030 0400 0002",
        "1_-*\n..3.\n.4..\n...2\n",
        "1.\t..\r\n\r\n..3.\r\n\r\n.4..\r\n...2\r\n",
    ],
)
def test_ways_to_write_a_sudoku(text: str) -> None:
    (question,) = read_questions(text, "test")
    assert question.tokens.tolist() == [2, 1, 1, 1, 1, 1, 4, 1, 1, 5, 1, 1, 1, 1, 1, 3]
    assert (question.task, question.rows, question.columns) == ("sudoku", 4, 4)


def test_ways_to_write_several() -> None:
    rows = "1...\n..3.\n.4..\n...2"
    for text in (f"{PUZZLE}\n\n{PUZZLE}\n", f"{rows}\n\n{rows}\n", f"{rows}\n\n{PUZZLE}"):
        assert [question.tokens.tolist() for question in read_questions(text, "test")] == 2 * [
            tokens(PUZZLE).tolist()
        ]
    mazes = read_questions(f"\n{MAZE}\n\n\n{ROUND}\n", "test")
    assert [(maze.rows, maze.columns) for maze in mazes] == [(4, 5), (3, 3)]
    assert mazes[1].tokens.tolist() == [2, 2, 3, 2, 1, 2, 4, 2, 2]


def test_sizes_of_sudoku() -> None:
    for cells, size in ((16, 4), (36, 6), (81, 9)):
        (question,) = read_questions("." * cells, "test")
        assert (question.rows, len(question.tokens)) == (size, cells)


def test_a_file_of_puzzles(monkeypatch: pytest.MonkeyPatch, sudoku: Path, tmp_path: Path) -> None:
    answering(monkeypatch, [(SOLUTION, 1.0)], [(WRONG, 1.0)])
    file = tmp_path / "puzzles.txt"
    file.write_text(f"\ufeff{PUZZLE}\n{PUZZLE}\n", encoding="utf-8")
    result = run("--input", file, "--checkpoint", sudoku)
    assert result.exit_code == 1
    assert result.stdout.endswith("1 of 2 answers are valid.\n")


def test_standard_input_and_the_default_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save(tmp_path / "runs" / "maze", 20, task="maze", rows=4, columns=5)
    monkeypatch.chdir(tmp_path)
    answering(monkeypatch, [(SOLVED_MAZE, 1.0)])
    result = run("--input", "-", input=MAZE)
    assert result.exit_code == 0, result.output
    # In piped output, a maze can be read again.
    assert result.stdout.startswith(SOLVED_MAZE + "\nValid; step 1 of")


@pytest.mark.parametrize("answer", [OVER, UNDER])
def test_any_shortest_path_is_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str) -> None:
    answering(monkeypatch, [(answer, 1.0)])
    result = run(ROUND, "--checkpoint", save(tmp_path / "run", 9, task="maze", rows=3, columns=3))
    assert result.exit_code == 0, result.output
    assert "Note: the maze has several shortest paths" in result.stdout


@pytest.mark.parametrize(
    ("puzzle", "note"),
    [
        ("11" + "." * 14, "the puzzle has no solution: row 1 contains 1 twice"),
        # No digit occurs twice, but none is left for the end of row 1.
        ("123...4.........", "the puzzle has no solution"),
        ("." * 16, "the puzzle has several solutions"),
        ("1234............", "the puzzle has several solutions"),
        ("#####\n#S#G#\n#####", "there is no path from the start to the goal"),
        (PUZZLE, None),
    ],
)
def test_notes_about_the_puzzle(puzzle: str, note: str | None) -> None:
    (question,) = read_questions(puzzle, "test")
    if note is None:
        assert question.note() is None
    else:
        assert note in str(question.note())


def test_a_puzzle_without_a_solution_is_tried(monkeypatch: pytest.MonkeyPatch, sudoku: Path) -> None:
    answering(monkeypatch, [(SOLUTION, 1.0)])
    result = run("11" + "." * 14, "--checkpoint", sudoku)
    assert result.exit_code == 1
    assert result.stdout.startswith("Note: the puzzle has no solution: row 1 contains 1 twice.\n")


def test_counting_solutions_gives_up_after_too_many_guesses() -> None:
    """For a puzzle whose search for a solution takes minutes."""
    (question,) = read_questions(
        ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4.........", "test"
    )
    since = time.process_time()
    assert question.note() is None
    assert time.process_time() - since < 10


def test_the_animation(monkeypatch: pytest.MonkeyPatch, sudoku: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    # Two steps with the same answer are still two frames, since the captions differ.
    answering(monkeypatch, [(WRONG, -1.0), (WRONG, -1.0), (SOLUTION, 2.0)])
    file = tmp_path / "solved.gif"
    file.write_text("an older file")
    result = run(PUZZLE, "--checkpoint", sudoku, "--gif", file, "--delay", "0.2", "--overwrite")
    assert result.exit_code == 0, result.output
    assert f"The animation is in {file}.\n" in result.stdout
    assert list(tmp_path.iterdir()) == [file]
    with image.open(file) as animation:
        assert animation.format == "GIF" and animation.n_frames == 4
        durations, frames = [], []
        for frame in range(4):
            animation.seek(frame)
            durations.append(animation.info["duration"])
            frames.append(animation.convert("RGB"))
    assert durations == [200, 200, 200, 2500]
    assert {frame.size for frame in frames} == {(464, 496)}
    # Left of the digit in the cell before the last: white, filled in, unchanged, changed again.
    colours = [frame.getpixel((16 + 2 * 108 + 12, 16 + 3 * 108 + 54)) for frame in frames]
    assert colours[0] == colours[2] != colours[1] == colours[3]


def test_the_animation_of_a_maze(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    answering(monkeypatch, [(SOLVED_MAZE, 1.0)])
    file = tmp_path / "maze.gif"
    folder = save(tmp_path / "run", 20, task="maze", rows=4, columns=5)
    assert run(MAZE, "--checkpoint", folder, "--gif", file).exit_code == 0
    with image.open(file) as animation:
        assert animation.n_frames == 2
        cell = (16 + 2 * 86 + 43, 16 + 1 * 86 + 43)
        before = animation.convert("RGB").getpixel(cell)
        animation.seek(1)
        assert before == (255, 255, 255) != animation.convert("RGB").getpixel(cell)


def test_an_animation_needs_pillow(monkeypatch: pytest.MonkeyPatch, sudoku: Path, tmp_path: Path) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "PIL" else known(name, *rest)
    )
    refused(run(PUZZLE, "--checkpoint", sudoku, "--gif", tmp_path / "x.gif"), "PIL", "llm-trm[plot]")


class Watched:
    """The output of an attempt in a terminal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, puzzle: str, attempt: Attempt, tries: int) -> None:
        self.slept: list[float] = []
        monkeypatch.setattr(time, "sleep", self.slept.append)
        console = Console(force_terminal=True, width=80, color_system="standard")
        question = read_questions(puzzle, "test")[0]
        with console.capture() as shown, Screen(console, question, MAX_STEPS, tries, 0.3) as screen:
            for step in attempt.steps:
                screen.show(attempt.number, step)
            screen.finish(attempt)
        self.text = shown.get()


def attempt_of(*answers: str, number: int = 1) -> Attempt:
    steps = (Step(place, answer_tokens(answer), -2.0) for place, answer in enumerate(answers, 1))
    return Attempt(number, tuple(steps))


def test_a_terminal_shows_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Watched(monkeypatch, PUZZLE, attempt_of(WRONG, SOLUTION, number=2), tries=3)
    assert seen.slept == [0.3, 0.3, 0.3]
    for caption in ("the puzzle", "try 2 of 3, step 1 of at most 4, halting confidence 11.9%", "step 2 of"):
        assert caption in seen.text
    first, second, last = seen.text.split("confidence 11.9%")
    # Bold clues; black on yellow for the cells that changed: all but the clues, then one, then none.
    assert "\x1b[1m3\x1b[0m" in last
    assert first.count("\x1b[30;43m") == 12
    assert second.count("\x1b[30;43m") == 1
    assert last.count("\x1b[30;43m") == 0


def test_a_terminal_marks_what_contradicts_a_clue(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Watched(monkeypatch, PUZZLE, attempt_of("2" + SOLUTION[1:]), tries=1)
    assert "\x1b[1;37;41m2\x1b[0m" in seen.text
    assert "try" not in seen.text


def test_a_terminal_shows_mazes_in_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Watched(monkeypatch, MAZE, attempt_of(SOLVED_MAZE, SOLVED_MAZE), tries=1)
    # The path is marked as new at first, and then has its own colour.
    assert seen.text.count("\x1b[30;43moo\x1b[0m") == 2
    assert "\x1b[1;36moo\x1b[0m" in seen.text
    assert "\x1b[1;37;42mSS\x1b[0m" in seen.text


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("llm-trm: error: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("puzzle", "words"),
    [
        ("hello", ["PUZZLE: 'h' is neither a digit nor a blank"]),
        ("", ["PUZZLE contains no puzzle"]),
        ("\ufeff \n\ufeff", ["PUZZLE contains no puzzle"]),
        ("1...2", ["PUZZLE: the puzzle has 5 cells", "16, 36 or 81"]),
        ("1...\n..3\n.4..\n...2", ["PUZZLE, line 1: the puzzle has 4 cells"]),
        ("15" + "." * 14, ["cell (1, 2) is 5", "digits 1 to 4"]),
        (f"{PUZZLE}\n{PUZZLE[:-1]}", ["PUZZLE, line 2: the puzzle has 15 cells"]),
        ('{"train": []}', ["ARC", "llm-trm eval puzzle"]),
        ("#S#\n#G", ["PUZZLE, line 1: the grid is ragged: line 2 has 2 cells"]),
        ("#S1\n#G#", ["unknown character '1'"]),
        ("#S \n###", ["the maze has no goal", "one S, one G"]),
        ("SSG\n###", ["the maze has 2 starts"]),
        ("SoG\n###", ["cells other than"]),
    ],
)
def test_rejects_invalid_puzzles(sudoku: Path, puzzle: str, words: list[str]) -> None:
    refused(run(puzzle, "--checkpoint", sudoku), *words)


def test_refuses_puzzles_of_another_kind(sudoku: Path, tmp_path: Path) -> None:
    refused(run("." * 81, "--checkpoint", sudoku), "is a sudoku of 9x9", "solves sudoku puzzles of 4x4")
    refused(run(MAZE, "--checkpoint", sudoku), "is a maze of 4x5", "sudoku puzzles of 4x4", "--checkpoint")
    # A file with two sizes.
    file = tmp_path / "puzzles.txt"
    file.write_text(f"{PUZZLE}\n{'.' * 36}\n")
    refused(run("--input", file, "--checkpoint", sudoku), "is a sudoku of 6x6")
    # A puzzle that matches only in the number of cells.
    wide = save(tmp_path / "wide", 20, task="maze", rows=2, columns=10)
    refused(run(MAZE, "--checkpoint", wide), "maze puzzles of 2x10")
    arc = save(tmp_path / "arc", 900, task="arc", rows=30, columns=30)
    refused(run(PUZZLE, "--checkpoint", arc), "ARC tasks, which only work with `llm-trm eval puzzle`")
    unnamed = save(tmp_path / "unnamed", 81)
    refused(run(PUZZLE, "--checkpoint", unnamed), "81 cells")
    narrow = save(tmp_path / "narrow", 16, vocab_size=4)
    refused(run(PUZZLE, "--checkpoint", narrow), "tokens that the model", "does not know")


def test_refuses_without_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run(PUZZLE), "no model in runs/sudoku", "`llm-trm train puzzle --task sudoku` first")
    refused(run(MAZE), "no model in runs/maze", "`llm-trm train puzzle --task maze` first")
    refused(run(PUZZLE, "--checkpoint", tmp_path), "does not exist", "llm-trm train puzzle")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("TRM_BACKEND", "foo", "TRM_BACKEND: unknown backend 'foo': choose from auto, "),
        ("TRM_BACKEND", "x" * 100_000, "TRM_BACKEND: unknown backend 'xxxx"),
        ("TRM_BACKEND", "triton", "choose another backend with TRM_BACKEND"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the triton backend works")
def test_a_wrong_environment_variable_is_one_line(sudoku: Path, name: str, value: str, words: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "llm_trm", "solve", PUZZLE, "--checkpoint", str(sudoku)],
        env={**environment, name: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.startswith("llm-trm: error: ") and len(done.stderr) < 500
    assert done.stderr.count("\n") == 1


def test_refusals_about_options(sudoku: Path, tmp_path: Path) -> None:
    file = tmp_path / "puzzles.txt"
    refused(run("--checkpoint", sudoku), "give a PUZZLE, or a file")
    refused(run(PUZZLE, "--input", file), "give a PUZZLE, or a file")
    refused(run("--input", file), "does not exist")
    file.write_bytes(b"\xff\xfe1234")
    refused(run("--input", file), "cannot be read")
    refused(run("--input", "-", input=b"\xff\xfe1234"), "standard input cannot be read")
    file.write_text(f"{PUZZLE}\n{PUZZLE}\n")
    gif = tmp_path / "x.gif"
    refused(run("--input", file, "--gif", gif, "--checkpoint", sudoku), "--gif shows one puzzle", "are 2")
    refused(run(PUZZLE, "--gif", tmp_path / "no" / "x.gif"), "does not exist")
    refused(run(PUZZLE, "--noise", "1", "--checkpoint", sudoku), "--noise needs --tries")
    assert not gif.exists()
