"""Tests of ``llm-trm eval puzzle``: its counts, its calls of the model, and its errors."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from llm_trm.cli import main
from llm_trm.data.puzzles.arc import VOCAB_SIZE, ArcTask, Pair
from llm_trm.data.puzzles.arc_folder import write_arc
from llm_trm.data.puzzles.arc_splits import plan_tasks
from llm_trm.data.puzzles.dataset import PuzzleSplit, read_info, read_split, write_puzzles
from llm_trm.data.puzzles.sudoku import SHAPES, generate
from llm_trm.data.puzzles.sudoku_splits import sudoku_info, sudoku_split
from llm_trm.evaluate.puzzle import draw_puzzles, with_answers
from llm_trm.models.puzzle.paper import Prediction, PuzzleTRM, PuzzleTRMConfig, save_puzzle_model
from tests.puzzle.toy import drawn_alike

PUZZLES, MAX_STEPS = 12, 4
#: For 9 solved puzzles of 12, from R's prop.test(9, 12, correct = FALSE).
INTERVAL_9_OF_12 = (0.4676947, 0.9110583)


def model(**sizes: Any) -> PuzzleTRM:
    torch.manual_seed(0)
    default: dict[str, Any] = dict(
        vocab_size=6,
        seq_len=16,
        d_model=8,
        n_layers=1,
        n_heads=1,
        puzzle_len=0,
        puzzle_dim=0,
        n_latent_steps=1,
        n_deep_recursions=1,
        max_steps=MAX_STEPS,
    )
    return PuzzleTRM(PuzzleTRMConfig(**default | sizes))


def save(network: PuzzleTRM, folder: Path, **facts: Any) -> Path:
    folder.mkdir()
    save_puzzle_model(network, folder, **facts)
    return folder


def write_sudokus(folder: Path, size: int = 4) -> Path:
    shape = SHAPES[size]
    made = list(generate(shape, PUZZLES, (size * size // 2, size * size // 2), seed=3))
    puzzles, solutions = (np.array(grids, dtype=np.uint8) for grids in zip(*made, strict=True))
    split = sudoku_split(puzzles, solutions)
    write_puzzles(folder, sudoku_info(shape, {}), {"train": split, "test": split})
    return folder


def run(*arguments: str | Path) -> Result:
    command = ["eval", "puzzle", "--device", "cpu", *map(str, arguments)]
    return CliRunner().invoke(main, command, prog_name="llm-trm")


def drop_checksums(folder: Path) -> None:
    """Make a folder of puzzles one of an older version, whose files may be changed."""
    info = json.loads((folder / "dataset.json").read_text())
    del info["sha256"]
    (folder / "dataset.json").write_text(json.dumps(info))


def figures(folder: Path, *arguments: str | Path) -> dict[str, Any]:
    output = folder / "figures.json"
    result = run(*arguments, "--output", output, "--overwrite")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(output.read_text())
    return found


Answer = Callable[[Tensor, dict[str, Any]], Prediction]


def answering(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> list[dict[str, Any]]:
    """Replace the models' answers. Returns a list that records the options and puzzles of every call."""
    calls: list[dict[str, Any]] = []

    def predict(self: PuzzleTRM, tokens: Tensor, puzzles: Tensor, **options: Any) -> Prediction:
        # A call of two steps only warms up.
        if options["max_steps"] != 2:
            calls.append({"puzzles": len(tokens), "ids": puzzles.tolist(), **options})
        return answer(tokens, options | {"ids": puzzles})

    monkeypatch.setattr(PuzzleTRM, "predict", predict)
    return calls


def solutions_of(split: PuzzleSplit) -> Callable[[Tensor], Tensor]:
    known = {bytes(row.tolist()): label for row, label in zip(split.inputs, split.labels, strict=True)}
    return lambda tokens: torch.stack([known[bytes(row.tolist())] for row in tokens]).long()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sudokus(tmp_path_factory.mktemp("data") / "sudoku")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sudoku"
    return save(model(), folder, task="sudoku", rows=4, columns=4, data=str(data))


def nine_of_twelve(split: PuzzleSplit) -> Answer:
    """Three puzzles get a wrong last cell; the halting head detects one of them."""
    solve = solutions_of(split)
    order = {bytes(row.tolist()): place for place, row in enumerate(split.inputs)}

    def answer(tokens: Tensor, options: dict[str, Any]) -> Prediction:
        places = torch.tensor([order[bytes(row.tolist())] for row in tokens])
        found = solve(tokens)
        found[places < 3, -1] = 0
        steps = torch.full((len(tokens),), 2 if options["halting"] else options["max_steps"])
        return Prediction(found, torch.where(places < 1, -1.0, 1.0), steps.int())

    return answer


def test_table_and_file_agree(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    answering(monkeypatch, nine_of_twelve(read_split(data, "test")))
    output = tmp_path / "figures.json"
    result = run("--checkpoint", checkpoint, "--batch-size", "5", "--output", output)
    assert result.exit_code == 0, result.output
    without, halting = json.loads(output.read_text())["modes"]
    for mode, steps in ((without, MAX_STEPS), (halting, 2)):
        assert mode["puzzles"] == PUZZLES
        assert mode["exact"] == pytest.approx(0.75)
        assert mode["exact_interval"] == pytest.approx(INTERVAL_9_OF_12, abs=1e-7)
        assert mode["cells"] == pytest.approx((9 + 3 * 15 / 16) / 12)
        assert mode["steps"] == steps
        assert mode["halted"] == pytest.approx(11 / 12)
        assert mode["halt_right"] == pytest.approx(10 / 12)
        assert mode["seconds_per_puzzle"] > 0
        assert mode["arc"] is None
    assert "12 sudoku puzzles of 4x4, at most 4 steps" in result.stdout
    assert "75.00% [46.77, 91.11]" in result.stdout
    assert "98.44%" in result.stdout and "91.7%" in result.stdout and "83.3%" in result.stdout
    assert "exact accuracy 75.00% with it, 75.00% without." in result.stdout


def test_speed_up_is_the_quotient_of_both_times(checkpoint: Path, tmp_path: Path) -> None:
    found = figures(tmp_path, "--checkpoint", checkpoint)
    without, halting = found["modes"]
    assert found["speedup"] == pytest.approx(without["seconds_per_puzzle"] / halting["seconds_per_puzzle"])


def test_a_sure_model_halts_at_once(data: Path, tmp_path: Path) -> None:
    sure = model()
    torch.nn.init.constant_(sure.q_head.bias, 5.0)
    folder = save(sure, tmp_path / "run", task="sudoku", rows=4, columns=4)
    without, halting = figures(tmp_path, "--checkpoint", folder, "--data", data)["modes"]
    assert (without["steps"], halting["steps"]) == (MAX_STEPS, 1)
    assert without["halted"] == halting["halted"] == 1


@pytest.mark.parametrize("option", ["--halting", "--no-halting"])
def test_one_mode_alone(checkpoint: Path, tmp_path: Path, option: str) -> None:
    found = figures(tmp_path, "--checkpoint", checkpoint, option, "--max-steps", "7")
    (mode,) = found["modes"]
    assert mode["halting"] is (option == "--halting")
    assert mode["max_steps"] == mode["steps"] == 7
    assert found["speedup"] is None


def test_all_attempts_except_the_first_have_noise(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    solve = solutions_of(read_split(data, "test"))
    tried: dict[int, int] = {}

    def answer(tokens: Tensor, options: dict[str, Any]) -> Prediction:
        number = tried[len(tokens)] = tried.get(len(tokens), 0) + 1
        # The second of three attempts is right and confident; the first call is a warm-up.
        is_right = number == 3
        found = solve(tokens) if is_right else torch.ones_like(tokens).long()
        logits = torch.full((len(tokens),), 3.0 if is_right else -number)
        return Prediction(found, logits, torch.full((len(tokens),), 2, dtype=torch.int32))

    calls = answering(monkeypatch, answer)
    found = figures(tmp_path, "--checkpoint", checkpoint, "--halting", "--tries", "3", "--noise", "0.5")
    assert [call["noise"] for call in calls] == [0.0, 0.5, 0.5]
    (mode,) = found["modes"]
    assert mode["exact"] == mode["halted"] == 1
    assert mode["steps"] == 6
    assert (mode["tries"], mode["noise"], mode["name"]) == (3, 0.5, "with halting, 3 tries")


def test_noise_of_tries_repeats_with_the_seed(data: Path, tmp_path: Path) -> None:
    undecided = drawn_alike(model(), seed=0)
    torch.nn.init.normal_(undecided.q_head.weight)
    folder = save(undecided, tmp_path / "run", task="sudoku", rows=4, columns=4, data=str(data))

    def of_seed(seed: int) -> float:
        options = ("--halting", "--tries", "4", "--noise", "3", "--seed", str(seed))
        return float(figures(tmp_path, "--checkpoint", folder, *options)["modes"][0]["cells"])

    assert of_seed(1) == of_seed(1) != of_seed(2)


def test_samples_are_drawn_with_the_seed(data: Path) -> None:
    split = replace(read_split(data, "test"), puzzles=torch.arange(PUZZLES, dtype=torch.int32))
    drawn = draw_puzzles(split, 5, seed=1)
    assert drawn.puzzles.tolist() == draw_puzzles(split, 5, seed=1).puzzles.tolist()
    assert drawn.puzzles.tolist() != draw_puzzles(split, 5, seed=2).puzzles.tolist()
    assert drawn.inputs.equal(split.inputs[drawn.puzzles.long()])
    assert len(draw_puzzles(split, 100, seed=0)) == PUZZLES


def test_samples_limit_the_puzzles(checkpoint: Path, tmp_path: Path) -> None:
    found = figures(tmp_path, "--checkpoint", checkpoint, "--halting", "--num-samples", "5")
    assert found["puzzles"] == found["modes"][0]["puzzles"] == 5


def test_puzzles_without_answers_do_not_count(data: Path) -> None:
    split = read_split(data, "test")
    split.labels[[2, 7]] = 0
    assert with_answers(split).inputs.equal(split.inputs[[0, 1, 3, 4, 5, 6, 8, 9, 10, 11]])


class Arc:
    """Three tasks with two tests each, under three more symmetries, and a model for them."""

    def __init__(self, folder: Path) -> None:
        rng = random.Random(0)

        def grid() -> Any:
            return np.array([[rng.randrange(1, 10) for _ in range(3)] for _ in range(2)], dtype=np.uint8)

        tasks = [
            ArcTask(name, (Pair(grid(), grid()),), (Pair(grid(), grid()), Pair(grid(), grid())))
            for name in ("a", "b", "c")
        ]
        self.plan = plan_tasks(tasks, [], augment=3, seed=0)
        self.data = folder / "arc"
        write_arc(self.data, self.plan, {})
        self.split = read_split(self.data, "test")
        network = model(vocab_size=VOCAB_SIZE, seq_len=900, num_puzzles=self.plan.num_puzzles)
        facts = {"task": "arc", "rows": 30, "columns": 30, "data": str(self.data)}
        self.checkpoint = save(network, folder / "run", **facts)

    def answer(self, tokens: Tensor, options: dict[str, Any]) -> Prediction:
        """Task a: right in half of the copies, and different answers in the rest. b: right once. c: never."""
        found = solutions_of(self.split)(tokens)
        for row, puzzle in enumerate(options["ids"].tolist()):
            name, copy = self.plan.identifiers()[puzzle][0], (puzzle - 1) % 4
            # A wrong answer with this many cells of a colour that no answer has there.
            if (name, copy) not in (("a", 0), ("a", 1), ("b", 3)):
                found[row] = 0
                found[row, : 1 if name == "b" else copy + 1] = 2
        return Prediction(found, torch.zeros(len(tokens)), torch.ones(len(tokens), dtype=torch.int32))


@pytest.fixture(scope="module")
def arc(tmp_path_factory: pytest.TempPathFactory) -> Arc:
    return Arc(tmp_path_factory.mktemp("arc"))


def test_copies_of_arc_tasks_vote(monkeypatch: pytest.MonkeyPatch, arc: Arc, tmp_path: Path) -> None:
    calls = answering(monkeypatch, arc.answer)
    found = figures(tmp_path, "--checkpoint", arc.checkpoint, "--halting", "--batch-size", "7")
    assert sum(call["puzzles"] for call in calls) == 3 * 2 * 4
    (mode,) = found["modes"]
    # For b, three copies agree on a wrong black cell, and the right answer is the second attempt.
    assert mode["arc"] == {"inputs": pytest.approx(2 / 3), "tasks": pytest.approx(2 / 3), "scored": 6}
    assert mode["exact"] == pytest.approx(3 / 12)
    result = run("--checkpoint", arc.checkpoint, "--halting")
    assert "two attempts" in result.stdout and "66.67%" in result.stdout and "(6 tests)" in result.stdout


def test_samples_of_arc_are_whole_tasks(monkeypatch: pytest.MonkeyPatch, arc: Arc, tmp_path: Path) -> None:
    calls = answering(monkeypatch, arc.answer)
    found = figures(
        tmp_path, "--checkpoint", arc.checkpoint, "--halting", "--num-samples", "2", "--seed", "3"
    )
    asked = sorted(number for call in calls for number in call["ids"])
    tasks = {arc.plan.identifiers()[number][0] for number in asked}
    assert len(tasks) == 2
    assert len(asked) == 2 * 2 * 4 and len(set(asked)) == 2 * 4
    assert found["modes"][0]["arc"]["scored"] == 4


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("llm-trm: error: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    assert not result.stdout


def test_refusals_about_the_checkpoint(data: Path, tmp_path: Path) -> None:
    refused(run("--data", data), "--checkpoint")
    refused(run("--checkpoint", tmp_path / "none", "--data", data), "does not exist", "llm-trm train puzzle")
    unknown = save(model(), tmp_path / "imported", task="sudoku", rows=4, columns=4)
    refused(run("--checkpoint", unknown), "does not say what it was trained on", "--data")
    gone = save(model(), tmp_path / "gone", task="sudoku", data=str(tmp_path / "data-that-was"))
    refused(run("--checkpoint", gone), "data-that-was, which is not there", "--data")


def test_refusals_about_the_data(checkpoint: Path, data: Path, arc: Arc, tmp_path: Path) -> None:
    six = write_sudokus(tmp_path / "six", 6)
    refused(run("--checkpoint", checkpoint, "--data", six), "sudoku puzzles of 6x6", "of 4x4", "--data")
    refused(run("--checkpoint", checkpoint, "--data", arc.data), "arc puzzles of 30x30", "sudoku puzzles")
    refused(run("--checkpoint", checkpoint, "--data", tmp_path), "dataset.json does not exist")
    wide = save(model(vocab_size=9), tmp_path / "wide", task="sudoku", rows=4, columns=4)
    refused(run("--checkpoint", wide, "--data", data), "6 tokens", "the model has 9")
    few = model(vocab_size=VOCAB_SIZE, seq_len=900, num_puzzles=5, puzzle_len=1, puzzle_dim=8)
    refused(run("--checkpoint", save(few, tmp_path / "few"), "--data", arc.data), "has 13 puzzle", "for 5")


def test_refuses_a_folder_without_answers(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    split = read_split(data, "test")
    split.labels.zero_()
    write_puzzles(tmp_path / "blank", read_info(data), {"train": split, "test": split})
    refused(run("--checkpoint", checkpoint, "--data", tmp_path / "blank"), "no test puzzles with answers")


def test_rejects_unknown_arc_identifiers(arc: Arc, tmp_path: Path) -> None:
    folder = Arc(tmp_path).data
    content = json.loads((folder / "arc.json").read_text())
    del content["tests"]["b"]
    (folder / "arc.json").write_text(json.dumps(content))
    drop_checksums(folder)
    refused(
        run("--checkpoint", arc.checkpoint, "--data", folder),
        "arc.json has no test for puzzle",
        "llm-trm data arc",
    )


def test_refusals_about_options(checkpoint: Path, tmp_path: Path) -> None:
    refused(run("--checkpoint", checkpoint, "--noise", "1"), "--noise needs --tries")
    refused(run("--checkpoint", checkpoint, "--output", tmp_path / "no" / "x.json"), "does not exist")
    refused(run("--checkpoint", checkpoint, "--tries", "0"), "--tries")
