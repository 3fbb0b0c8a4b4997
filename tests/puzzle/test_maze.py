"""Tests of mazes: generation, shortest paths, faults of answers, and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_trm.data.puzzles.maze import (
    GOAL,
    PATH,
    START,
    WALL,
    count_shortest_paths,
    default_min_path,
    format_maze,
    maze_fault,
    parse_maze,
    shortest_path,
    solution_fault,
)
from llm_trm.data.puzzles.maze_files import load_mazes, read_mazes
from llm_trm.data.puzzles.maze_generation import distinct, generate_mazes, symmetry_class
from llm_trm.errors import InputError

MAZE = "S #\n  #\n# G"
ANSWER = "So#\n o#\n#oG"


def paths_by_enumeration(maze: np.ndarray) -> list[int]:
    """Lengths of all paths that visit no cell twice, as independent ground truth for small mazes."""
    goal, found = tuple(np.argwhere(maze == GOAL)[0]), []

    def walk(row: int, column: int, visited: frozenset[tuple[int, int]]) -> None:
        if (row, column) == goal:
            found.append(len(visited) - 1)
            return
        for place in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            inside = 0 <= place[0] < maze.shape[0] and 0 <= place[1] < maze.shape[1]
            if inside and maze[place] != WALL and place not in visited:
                walk(*place, visited | {place})

    start = tuple(int(place) for place in np.argwhere(maze == START)[0])
    walk(*start, frozenset([start]))
    return found


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(2, 4), st.integers(2, 5), st.floats(0.4, 1))
def test_search_finds_and_counts_the_shortest_paths(seed: int, rows: int, columns: int, share: float) -> None:
    random = np.random.default_rng(seed)
    maze = np.where(random.random(rows * columns) < share, 2, WALL).astype(np.uint8)
    maze[random.choice(rows * columns, 2, replace=False)] = START, GOAL
    maze = maze.reshape(rows, columns)
    paths = paths_by_enumeration(maze)
    if not paths:
        assert maze_fault(maze) == "there is no path from the start to the goal"
        assert count_shortest_paths(maze) == 0
        with pytest.raises(ValueError, match="there is no path"):
            shortest_path(maze)
        return
    assert maze_fault(maze) is None
    assert shortest_path(maze) == min(paths)
    assert count_shortest_paths(maze, limit=1000) == paths.count(min(paths))
    assert count_shortest_paths(maze) == min(2, paths.count(min(paths)))


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.integers(5, 12), st.integers(5, 12))
def test_generated_mazes_have_one_shortest_path_which_is_the_answer(
    seed: int, rows: int, columns: int
) -> None:
    fewest = default_min_path(rows, columns)
    for maze, answer in generate_mazes(rows, columns, {"train": 3}, min_path=fewest, seed=seed)["train"]:
        assert maze.shape == answer.shape == (rows, columns) and maze.dtype == answer.dtype == np.uint8
        assert count_shortest_paths(maze) == 1
        assert solution_fault(maze, answer) is None
        assert (answer == PATH).sum() + 1 == shortest_path(maze) >= fewest


def test_hard_mazes_take_more_than_110_steps() -> None:
    mazes = generate_mazes(30, 30, {"train": 4}, min_path=default_min_path(30, 30))["train"]
    assert all(shortest_path(maze) > 110 and solution_fault(maze, answer) is None for maze, answer in mazes)
    # Some have loops; in a tree every path would be a shortest path.
    cells = [maze != WALL for maze, _ in mazes]
    edges = [(open_[1:] & open_[:-1]).sum() + (open_[:, 1:] & open_[:, :-1]).sum() for open_ in cells]
    assert any(edge >= open_.sum() for edge, open_ in zip(edges, cells, strict=True))


def test_mazes_are_distinct_under_symmetries_and_follow_the_seed() -> None:
    def drawn(train: int, seed: int) -> dict[str, list[Any]]:
        return generate_mazes(5, 5, {"test": 40, "train": train}, min_path=4, seed=seed)

    first = drawn(200, 0)
    classes = [symmetry_class(maze) for mazes in first.values() for maze, _ in mazes]
    assert len(set(classes)) == len(classes) == 240
    again, other = drawn(60, 0), drawn(60, 1)
    # Neither the held-out mazes nor the first training mazes depend on the number of training mazes.
    np.testing.assert_array_equal(again["test"], first["test"])
    np.testing.assert_array_equal(again["train"], first["train"][:60])
    assert not np.array_equal(other["test"], first["test"])


def test_symmetry_classes_and_distinct_mazes() -> None:
    maze = parse_maze("S  #\n  G#")
    turned = [np.rot90(grid, quarter) for grid in (maze, np.fliplr(maze)) for quarter in range(4)]
    assert {symmetry_class(grid) for grid in turned} == {symmetry_class(maze)}
    assert symmetry_class(maze.reshape(1, -1)) != symmetry_class(maze)
    other = parse_maze("S  #\n G #")
    assert [format_maze(grid) for grid, _ in distinct([(grid, grid) for grid in (*turned, other)])] == [
        format_maze(maze),
        format_maze(other),
    ]


def test_impossible_mazes_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"4 x 4 cells had no unique shortest path of at least 16 steps.*shorter"
    ):
        generate_mazes(4, 4, {"train": 1}, min_path=16)
    with pytest.raises(InputError, match=r"at least 3 x 3 cells, not 2 x 9"):
        generate_mazes(2, 9, {"train": 1}, min_path=2)
    with pytest.raises(InputError, match=r"at least 2 steps.*not 1"):
        generate_mazes(5, 5, {"train": 1}, min_path=1)
    with pytest.raises(InputError, match=r"3 x 3 cells repeat after \d+ different ones"):
        generate_mazes(3, 3, {"train": 10000}, min_path=2)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (ANSWER, None),
        ("S #\noo#\n#oG", None),
        (MAZE, "the path is broken: its cells do not lead"),
        ("So#\noo#\n#oG", "1 marked cell is not on the path"),
        ("So#\n oo\n#oG", "the path goes through a wall"),
        ("So#\n o#\n#oo", "the path covers the start or the goal"),
        ("oo#\n o#\n#oG", "the path covers the start or the goal"),
        ("So#\n oS\n#oG", "row 2, column 3 of the answer differs from the maze"),
        ("So \n o \n#oG", "row 1, column 3 of the answer differs from the maze"),
        ("So#\n o#", "the answer has 2 x 3 cells, the maze has 3 x 3"),
    ],
)
def test_faults_of_answers(answer: str, fault: str | None) -> None:
    found = solution_fault(parse_maze(MAZE), parse_maze(answer))
    assert (found is None) if fault is None else (found is not None and found.startswith(fault))


def test_detour_is_not_a_shortest_path() -> None:
    maze, detour = parse_maze("S G\n   "), parse_maze("S G\nooo")
    assert solution_fault(maze, detour) == "the path is not a shortest one: it takes 4 steps instead of 2"


@pytest.mark.parametrize(
    ("maze", "fault"),
    [
        ("  \n G", "the maze has no start"),
        ("S \nSG", "the maze has 2 starts"),
        ("S \n  ", "the maze has no goal"),
        ("SG\nGG", "the maze has 3 goals"),
        ("S#\n#G", "there is no path from the start to the goal"),
        ("So\n G", "the maze has cells other than walls, open cells, a start and a goal"),
    ],
)
def test_faults_of_mazes(maze: str, fault: str) -> None:
    assert maze_fault(parse_maze(maze)) == fault
    assert solution_fault(parse_maze(maze), parse_maze(maze)) == fault


def test_text_round_trips_and_tokens_are_the_official_ones() -> None:
    grid = parse_maze("# SGo    ")
    assert grid.tolist() == [[1, 2, 3], [4, 5, 2], [2, 2, 2]]
    np.testing.assert_array_equal(parse_maze(format_maze(grid)), grid)
    np.testing.assert_array_equal(parse_maze("# S\r\nGo \r\n   \r\n"), grid)
    assert format_maze(np.zeros((1, 2), dtype=np.uint8)) == "??"


def as_line(text: str) -> str:
    return text.replace("\n", "")


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    lines = [f'x,"{question}","{answer}",1' for question, answer in rows]
    path.write_text("\n".join(["source,question,answer,rating", *lines]) + "\n")
    return path


def test_files_of_both_kinds_are_read(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "mazes.csv", [(as_line(MAZE), as_line(ANSWER)), (MAZE, ANSWER)])
    lines = tmp_path / "mazes.jsonl"
    lines.write_text("\n" + json.dumps({"maze": MAZE, "solution": ANSWER}) + "\n\n")
    for maze, answer in [*read_mazes(table), *read_mazes(lines)]:
        assert (format_maze(maze), format_maze(answer)) == (MAZE, ANSWER)
    assert (len(read_mazes(table)), len(read_mazes(lines))) == (2, 1)


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        (MAZE + " ", ANSWER, r"row 2: the grid is ragged: line 3 has 4 cells, not 3: fix or remove the row"),
        (
            as_line(MAZE) + " ",
            as_line(ANSWER),
            r"row 2: the grid is ragged: 10 cells on one line do not form a square",
        ),
        (MAZE.replace("G", "X"), ANSWER, r"row 2: unknown character 'X': a cell must be one of '# SGo'"),
        (MAZE.replace("G", " "), ANSWER, r"row 2: the maze has no goal"),
        (MAZE.replace("G", "S"), ANSWER, r"row 2: the maze has 2 starts"),
        (MAZE, MAZE, r"row 2: the path is broken"),
        (
            "S G\n   \n   ",
            "S G\nooo\n   ",
            r"row 2: the path is not a shortest one: it takes 4 steps instead of 2",
        ),
        ("SG\n  ", "SG\n  ", r"row 2 has 2 x 2 cells, row 1 has 3 x 3: all mazes must have the same size"),
    ],
)
def test_broken_rows_are_refused_with_their_number(
    question: str, answer: str, message: str, tmp_path: Path
) -> None:
    path = write_csv(tmp_path / "mazes.csv", [(as_line(MAZE), as_line(ANSWER)), (question, answer)])
    with pytest.raises(InputError, match=rf"mazes\.csv, {message}"):
        read_mazes(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def refused(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_mazes(tmp_path / name)

    refused("a.txt", b"", r"a\.txt is neither a \.csv nor a \.jsonl file")
    refused("a.csv", b"", r"a\.csv has no mazes")
    refused("b.csv", b"a,b\n1,2\n", r"row 1 lacks a maze or its answer \(columns: 'a', 'b'\): it needs")
    refused("c.csv", b"question,answer\n\xe9,1\n", r"c\.csv is not UTF-8")
    refused("d.jsonl", b'{"maze": 1}\n', r"row 1 lacks a maze or its answer \(columns: 'maze'\)")
    refused("e.jsonl", b"[]\n", r"row 1 lacks a maze or its answer \(columns: none\)")
    refused("f.jsonl", b"{\n", r"row 1 is not JSON")
    with pytest.raises(InputError, match=r"missing\.csv does not exist"):
        read_mazes(tmp_path / "missing.csv")


def test_hub_data_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    # Uses the real file reader, including cells that are spaces; only the download is replaced.
    cache = str(tmp_path / "cache")
    path = write_csv(
        tmp_path / "test.csv", [(as_line(MAZE), as_line(ANSWER)), ("   \n   \nS G", "   \n   \nSoG")]
    )
    load_dataset = datasets.load_dataset

    def local(name: str, **options: Any) -> Any:
        assert (name, options) == ("sapientinc/maze-30x30-hard-1k", {"split": "test", "streaming": True})
        return load_dataset("csv", data_files={"test": str(path)}, cache_dir=cache, **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    mazes = load_mazes("sapientinc/maze-30x30-hard-1k", "test")
    assert [format_maze(answer) for _, answer in mazes] == [ANSWER, "   \n   \nSoG"]


def test_unreachable_or_invalid_hub_data(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"a/b, split train, cannot be loaded \(Couldn't reach the hub\)"):
        load_mazes("a/b", "train")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"question": MAZE, "answer": MAZE}]))
    with pytest.raises(InputError, match=r"a/b, split test, row 1: the path is broken"):
        load_mazes("a/b", "test")
