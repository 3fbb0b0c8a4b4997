"""``llm-trm data maze`` and ``llm-trm data arc``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from llm_trm.cli.data.arc import arc
from llm_trm.cli.data.maze import maze
from llm_trm.data.puzzles.arc import FIRST_COLOUR
from llm_trm.data.puzzles.arc_folder import read_arc
from llm_trm.data.puzzles.dataset import read_info, read_split
from llm_trm.data.puzzles.maze import default_min_path, format_maze, shortest_path, solution_fault
from llm_trm.data.puzzles.maze_generation import generate_mazes
from llm_trm.errors import InputError


def run(command: Any, *arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def grids(folder: Path, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    info, puzzles = read_info(folder), read_split(folder, split)
    shape = (-1, info.rows, info.columns)
    return list(
        zip(puzzles.inputs.numpy().reshape(shape), puzzles.labels.numpy().reshape(shape), strict=True)
    )


def test_generated_mazes_fill_a_folder(tmp_path: Path) -> None:
    size = ("--size", 7, "--num-samples", 30, "--test-samples", 10)
    result = run(maze, *size, "-o", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert "30 mazes of 7 x 7 cells to train on, 10 held out; shortest paths of 6 to " in result.output
    info = read_info(tmp_path / "a")
    assert (info.task, info.rows, info.columns, info.vocab_size, info.num_puzzles) == ("maze", 7, 7, 6, 1)
    assert info.facts["min_path"] == default_min_path(7, 7) == 6
    for split, count in (("train", 30), ("test", 10)):
        drawn = grids(tmp_path / "a", split)
        assert len(drawn) == count
        assert all(solution_fault(*each) is None and shortest_path(each[0]) >= 6 for each in drawn)
    run(maze, *size, "--min-path", 9, "--seed", 1, "-o", tmp_path / "b")
    assert all(shortest_path(each) >= 9 for each, _ in grids(tmp_path / "b", "train"))
    run(maze, *size, "-o", tmp_path / "c")
    assert torch.equal(read_split(tmp_path / "a", "train").inputs, read_split(tmp_path / "c", "train").inputs)


def maze_file(path: Path, count: int) -> Path:
    mazes = generate_mazes(5, 5, {"train": count}, min_path=4)["train"]
    lines = [f"{each},{answer}" for each, answer in (map(one_line, pair) for pair in mazes)]
    path.write_text("\n".join(["question,answer", *lines, lines[0]]) + "\n")
    return path


def one_line(grid: np.ndarray) -> str:
    return format_maze(grid).replace("\n", "")


def test_mazes_of_a_file_are_held_out_once(tmp_path: Path) -> None:
    path = maze_file(tmp_path / "mazes.csv", 12)
    result = run(maze, "--input", path, "--test-samples", 4, "-o", tmp_path / "a")
    assert result.exit_code == 0, result.output
    texts = {
        split: [format_maze(each) for each, _ in grids(tmp_path / "a", split)] for split in ("train", "test")
    }
    assert (len(texts["train"]), len(texts["test"])) == (8, 4)
    # The repeated row is in only one split, once.
    assert len({*texts["train"], *texts["test"]}) == 12
    few = ("--input", path, "--test-samples", 4, "--num-samples", 5, "--seed", 1, "-o", tmp_path / "b")
    run(maze, *few)
    assert len(grids(tmp_path / "b", "train")) == 5
    assert [format_maze(each) for each, _ in grids(tmp_path / "b", "test")] != texts["test"]
    result = run(maze, "--input", path, "--test-samples", 12, "-o", tmp_path / "c")
    assert result.exit_code == 2 and "12 different mazes, and 12 are to be held out" in result.output


def test_mazes_of_the_hub_keep_their_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    drawn = generate_mazes(5, 5, {"test": 3, "train": 6}, min_path=4)

    def load_dataset(name: str, split: str, streaming: bool) -> Any:
        assert name == "some/mazes" and streaming
        return iter(
            [{"question": one_line(each), "answer": one_line(answer)} for each, answer in drawn[split]]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    result = run(maze, "--dataset", "some/mazes", "--num-samples", 4, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert read_info(tmp_path).facts["source"] == "some/mazes"
    held_out = {format_maze(each) for each, _ in grids(tmp_path, "test")}
    assert len(grids(tmp_path, "train")) == 4
    assert held_out == {format_maze(each) for each, _ in drawn["test"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "a.csv", "--dataset", "b"), "--input and --dataset cannot be used together"),
        (
            ("--input", "a.csv", "--size", "9"),
            "--size applies only to generated mazes, not to those of --input",
        ),
        (
            ("--dataset", "b", "--min-path", "9"),
            "--min-path applies only to generated mazes, not to those of --dataset",
        ),
        (("--size", "2"), "must be at least 3, not 2"),
    ],
)
def test_incompatible_options(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = run(maze, *arguments, "-o", tmp_path / "a")
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (tmp_path / "a").exists()


def task(*questions: int, solved: bool = True) -> dict[str, Any]:
    train, *test = [
        {"input": [[number, 0], [1, 1]], "output": [[1, number]]}
        if solved or place == 0
        else {"input": [[number]]}
        for place, number in enumerate(questions)
    ]
    return {"train": [train], "test": test}


def tasks(folder: Path, **named: Any) -> Path:
    folder.mkdir()
    for name, content in named.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_arc_tasks_fill_a_folder(tmp_path: Path) -> None:
    learned = tasks(tmp_path / "learned", a=task(2, 3), both=task(4, 5, 6))
    tested = tasks(tmp_path / "tested", both=task(4, 5, 6), b=task(7, 8))
    output = tmp_path / "out"
    result = run(arc, learned, "--evaluation", tested, "--augment", 4, "-o", output)
    assert result.exit_code == 0, result.output
    assert "held out, since --evaluation has them too: 1 of PATH" in result.output
    # a: two pairs; both and b: one training pair each, and two and one test pairs; 5 symmetries.
    assert "tasks: 3, with their symmetries 15; 20 pairs to train on, 15 held out; 0.0 GB" in result.output
    info, key = read_info(output), read_arc(output)
    assert (info.task, info.vocab_size, info.num_puzzles, info.seq_len) == ("arc", 12, 16, 900)
    assert info.facts["augment"] == 4
    assert sorted(key.tests) == ["b", "both"]
    trained, held_out = read_split(output, "train"), read_split(output, "test")
    assert (len(trained), len(held_out)) == (20, 15)
    names = {key.identifiers[number][0] for number in held_out.puzzles.tolist()}
    assert names == {"b", "both"}
    # The test questions are never trained on: the colours 5 and 6 of "both" under the identity.
    (identity,) = (
        number
        for number, entry in enumerate(key.identifiers)
        if entry and entry[0] == "both" and entry[1].dihedral == 0 and entry[1].colours == tuple(range(10))
    )
    rows = trained.inputs[trained.puzzles == identity]
    assert len(rows) == 1 and 6 in rows and 7 not in rows and 8 not in rows


def test_arc_without_evaluation_holds_out_the_tests_of_all(tmp_path: Path) -> None:
    folder = tasks(tmp_path / "tasks", a=task(2, 3), b=task(4, 5))
    result = run(arc, folder, folder, "--augment", 0, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "tasks: 2, with their symmetries 2; 2 pairs to train on, 2 held out" in result.output


def learned_questions(folder: Path) -> set[int]:
    """The numbers of :func:`task` in the training data, for tasks without symmetries."""
    found = read_split(folder, "train").inputs
    return {number for number in range(2, 10) if bool((found == number + FIRST_COLOUR).any())}


def shuffled(content: dict[str, Any]) -> dict[str, Any]:
    """The same task with a test pair among the demonstrations, and a demonstration among the tests."""
    pairs = [*content["train"], *content["test"]]
    return {"train": pairs[-1:], "test": pairs[:-1]}


@pytest.mark.parametrize(
    "twin",
    [
        lambda content: content,
        shuffled,
        # Its tests differ, but it is still the held-out task.
        lambda content: {**content, "test": task(9, 9)["test"]},
        # It has one test in common with it.
        lambda content: {**task(9, 9), "test": content["test"][-1:]},
    ],
    ids=["same", "shuffled", "other tests", "one test"],
)
@pytest.mark.parametrize("solved", [True, False])
def test_arc_holds_out_a_task_under_another_name(twin: Any, solved: bool, tmp_path: Path) -> None:
    asked = task(4, 5, 6)
    learned = tasks(tmp_path / "learned", a=task(2, 3), copy=twin(asked))
    if not solved:
        asked["test"] = [{"input": pair["input"]} for pair in asked["test"]]
    tested = tasks(tmp_path / "tested", original=asked)
    result = run(arc, learned, "--evaluation", tested, "--augment", 0, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    words = "held out, since --evaluation has them under other names: 1, such as copy (original)"
    assert words in result.stderr
    assert learned_questions(tmp_path / "out") == {2, 3, 4}
    assert {entry[0] for entry in read_arc(tmp_path / "out").identifiers if entry} == {"a", "original"}


def test_arc_trains_on_no_test_of_another_task(tmp_path: Path) -> None:
    folder = tasks(tmp_path / "tasks", a=task(2, 3), b=shuffled(task(2, 3)), c=task(7, 8))
    result = run(arc, folder, "--augment", 0, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "demonstrations left out, since they are tests of another task: 2, such as a (b)" in result.stderr
    assert learned_questions(tmp_path / "out") == {7}
    assert len(read_split(tmp_path / "out", "test")) == 3


@pytest.mark.parametrize("solved", [True, False])
def test_arc_trains_on_no_test_of_the_same_task(solved: bool, tmp_path: Path) -> None:
    own = task(2, 2, 3)
    if not solved:
        own["test"] = [{"input": pair["input"]} for pair in own["test"]]
    folder = tasks(tmp_path / "tasks", a=own, c=task(7, 8, solved=solved))
    result = run(arc, folder, "--augment", 0, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "demonstrations left out, since they are tests of their own task: 1, such as a\n" in result.stderr
    assert learned_questions(tmp_path / "out") == {7}
    assert len(read_split(tmp_path / "out", "test")) == 3


@pytest.mark.parametrize(
    "named", [{"a": task(2, 3), "b": task(3, 2)}, {"a": task(2, 2)}, {"a": task(2, 2), "b": task(3, 3, 4)}]
)
def test_arc_with_nothing_to_train_on(named: dict[str, Any], tmp_path: Path) -> None:
    folder = tasks(tmp_path / "tasks", **named)
    with pytest.raises(InputError, match="no pairs are left to train on"):
        run(arc, folder, "--augment", 0, "-o", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_mazes_of_a_data_set_that_are_held_out_are_not_trained_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    drawn = generate_mazes(5, 5, {"test": 3, "train": 4}, min_path=3)
    twin = [(np.rot90(each), np.rot90(answer)) for each, answer in drawn["test"][:2]]
    splits = {"test": drawn["test"], "train": [*twin, *drawn["train"]]}

    def load_dataset(name: str, split: str, streaming: bool) -> Any:
        return iter([{"question": one_line(each), "answer": one_line(way)} for each, way in splits[split]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    result = run(maze, "--dataset", "some/mazes", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "not trained on, since they are held out: 2 mazes" in result.stderr
    trained = {format_maze(each) for each, _ in grids(tmp_path / "out", "train")}
    assert trained == {format_maze(each) for each, _ in drawn["train"]}
    splits["train"] = twin
    with pytest.raises(InputError, match="every training maze of some/mazes is held out"):
        run(maze, "--dataset", "some/mazes", "-o", tmp_path / "other")


def test_arc_reports_missing_augmentations(tmp_path: Path) -> None:
    folder = tasks(tmp_path / "tasks", a=task(2, 3, solved=False))
    black = {"input": [[0]], "output": [[0]]}
    flat = tasks(tmp_path / "flat", flat={"train": [black], "test": [black]})
    result = run(arc, folder, flat, "--augment", 3, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "held out without solutions: 1, such as a; their labels are 0" in result.output
    assert "tasks with fewer than 3 different symmetries: 1" in result.output
    assert not read_split(tmp_path / "out", "test").labels[:4].any()


def test_arc_refuses_broken_tasks(tmp_path: Path) -> None:
    folder = tasks(tmp_path / "tasks", bad={"train": []})
    with pytest.raises(InputError, match=r"bad\.json, task bad has no train pairs"):
        run(arc, folder, "-o", tmp_path / "out")
    assert run(arc, "-o", tmp_path / "out").exit_code == 2


@pytest.mark.parametrize("command", [maze, arc])
def test_help_has_examples(command: Any) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and f"llm-trm data {command.name}" in result.output
