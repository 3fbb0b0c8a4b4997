"""Tests of ARC: symmetries, tokens, files, splits and voting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llm_trm.data.puzzles.arc import ArcTask, Pair, Transform, crop, encode, invert, turn
from llm_trm.data.puzzles.arc_files import is_labelled, merged, read_tasks
from llm_trm.data.puzzles.arc_folder import ArcKey, read_arc, write_arc
from llm_trm.data.puzzles.arc_splits import ArcPlan, plan_tasks
from llm_trm.data.puzzles.arc_vote import ArcBallot, score, vote
from llm_trm.data.puzzles.dataset import read_info, read_split
from llm_trm.errors import InputError

SIDES = st.tuples(st.integers(1, 30), st.integers(1, 30))
GRIDS = SIDES.flatmap(lambda shape: arrays.arrays(np.uint8, shape, elements=st.integers(0, 9)))
TRANSFORMS = st.builds(Transform, st.integers(0, 7), st.permutations(range(10)).map(tuple))


def grid(text: str) -> np.ndarray:
    return np.array([[int(cell) for cell in row] for row in text.split()], dtype=np.uint8)


def canvas_of(colours: np.ndarray, row: int = 0, column: int = 0) -> np.ndarray:
    canvas = np.zeros((30, 30), dtype=np.uint8)
    encode(colours, canvas, row, column)
    return canvas


def pair(question: str, answer: str | None = None) -> Pair:
    return Pair(grid(question), None if answer is None else grid(answer))


RISE = ArcTask("rise", (pair("12 34", "21 43"), pair("123", "321")), (pair("1 2", "1 2"), pair("56", "65")))
FLAT = ArcTask("flat", (pair("0", "0"),), (pair("00", "00"),))


@given(GRIDS, TRANSFORMS)
def test_transforms_are_undone_bit_for_bit(colours: np.ndarray, transform: Transform) -> None:
    changed = transform.apply(colours)
    assert (changed.shape == colours.shape[::-1]) if transform.swaps_sides else changed.shape == colours.shape
    back = invert(changed, transform)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, colours)


def test_the_eight_symmetries_are_numbered_as_in_the_official_code() -> None:
    shape = np.arange(6, dtype=np.uint8).reshape(2, 3)
    official = [np.rot90(shape, quarter) for quarter in range(4)]
    official += [np.fliplr(shape), np.flipud(shape), shape.T, np.fliplr(np.rot90(shape))]
    for number, expected in enumerate(official):
        np.testing.assert_array_equal(turn(shape, number), expected)
    assert len({turn(shape, number).tobytes() + bytes(turn(shape, number).shape) for number in range(8)}) == 8


@pytest.mark.parametrize(
    "wrong", [(8, tuple(range(10))), (-1, tuple(range(10))), (0, (0,) * 10), (0, (0, 1))]
)
def test_invalid_symmetries(wrong: tuple[int, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="is not a symmetry"):
        Transform(*wrong)


def test_tokens_and_end_markers() -> None:
    canvas = canvas_of(grid("09 10"), 3, 4)
    assert canvas[3:6, 4:7].tolist() == [[2, 11, 1], [3, 2, 1], [1, 1, 0]]
    assert (canvas != 0).sum() == 8
    low = canvas_of(np.zeros((2, 30), dtype=np.uint8), 28, 0)
    assert (low[28:] == 2).all() and not low[:28].any()
    wide = canvas_of(np.zeros((2, 30), dtype=np.uint8), 27, 0)
    assert (wide[29] == 1).all()


@given(GRIDS)
def test_crop_inverts_encode_with_any_padding(colours: np.ndarray) -> None:
    canvas = canvas_of(colours)
    (found,) = crop(canvas[None])
    np.testing.assert_array_equal(found, colours)
    (flat,) = crop(canvas.reshape(1, 900).astype(np.int64))
    assert flat.dtype == np.uint8
    np.testing.assert_array_equal(flat, colours)
    # Padding is never trained, so a model may predict anything there; the end markers delimit the grid.
    garbage = np.where(canvas == 0, np.uint8(7), canvas)
    np.testing.assert_array_equal(crop(garbage)[0], colours)


def test_crop_takes_the_largest_rectangle() -> None:
    full = np.full((30, 30), 5, dtype=np.uint8)
    touching = full.copy()
    touching[29, 29] = 1
    empty = full.copy()
    empty[0, 0] = 0
    broken = full.copy()
    broken[0, 2], broken[10, 0] = 1, 0
    high = full.copy()
    high[2, 1:] = 12
    shapes = [found.shape for found in crop(np.stack([full, touching, empty, broken, high]))]
    # Of 29 x 30 and 30 x 29, the one with fewer rows.
    assert shapes == [(30, 30), (29, 30), (0, 0), (10, 2), (2, 30)]
    assert (crop(full)[0] == 3).all()


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def record(task: ArcTask, solved: bool = True) -> dict[str, Any]:
    def rows(pairs: tuple[Pair, ...], answers: bool) -> list[dict[str, Any]]:
        return [
            {"input": each.input.tolist()} | ({"output": each.output.tolist()} if answers else {})
            for each in pairs
        ]

    return {"train": rows(task.train, True), "test": rows(task.test, solved)}


def write_prize(folder: Path, tasks: list[ArcTask], solved: bool = True) -> Path:
    if solved:
        answers = {task.name: [each.output.tolist() for each in task.test] for task in tasks}
        write(folder / "set_solutions.json", answers)
    return write(folder / "set_challenges.json", {task.name: record(task, False) for task in tasks})


def as_json(tasks: list[ArcTask]) -> list[Any]:
    return [(task.name, record(task, is_labelled(task))) for task in tasks]


def test_both_layouts_give_the_same_tasks(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task in (RISE, FLAT):
        write(folder / f"{task.name}.json", record(task))
    challenges = write_prize(tmp_path, [RISE, FLAT])
    assert as_json(read_tasks(folder)) == as_json(read_tasks(challenges)) == as_json([FLAT, RISE])
    assert as_json(read_tasks(folder / "rise.json")) == as_json([RISE])
    assert len(merged([(folder, read_tasks(folder)), (challenges, read_tasks(challenges))])) == 2


def test_hidden_files_and_upper_case_endings(tmp_path: Path) -> None:
    one, two = FLAT, RISE
    write(tmp_path / f"{one.name}.JSON", record(one))
    write(tmp_path / f"{two.name}.json", record(two))
    (tmp_path / f"._{one.name}.json").write_bytes(b"\0\5\x16\7\0\2")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / f"{one.name}-checkpoint.json").write_text("{")
    (tmp_path / "old.json").mkdir()
    assert as_json(read_tasks(tmp_path)) == as_json([one, two])


def test_tasks_without_solutions(tmp_path: Path) -> None:
    tasks = read_tasks(write_prize(tmp_path, [RISE, FLAT], solved=False))
    assert not any(is_labelled(task) for task in tasks)
    split = plan_tasks(tasks, [], 0, 0).splits()["test"]
    assert split.inputs.any(1).all() and not split.labels.any()


def changed(**parts: Any) -> dict[str, Any]:
    return record(FLAT) | parts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"has no train pairs"),
        (changed(train=[]), r"has no train pairs"),
        (changed(test=None), r"has no test pairs"),
        (changed(train=[{"output": [[1]]}]), r"train pair 1 has no input"),
        (changed(train=[{"input": [[1]]}]), r"train pair 1 has no output"),
        (changed(test=[{"input": [[1]], "output": [[1]]}, {"input": [[2]]}]), r"test pair 2 has no solution"),
        (
            changed(test=[{"input": [[1, 2], [3]]}]),
            r"test pair 1, input: the grid is ragged: row 2 has 1 cells",
        ),
        (changed(test=[{"input": [[1], [10]]}]), r"test pair 1, input, row 2: 10 is not a colour"),
        (changed(test=[{"input": [[-1]]}]), r"-1 is not a colour"),
        (changed(test=[{"input": [[True]]}]), r"True is not a colour"),
        (changed(test=[{"input": [[1.0]]}]), r"1\.0 is not a colour"),
        (changed(test=[{"input": [[]]}]), r"input is not a grid"),
        (changed(test=[{"input": "1"}]), r"input is not a grid"),
        (changed(test=[{"input": [[0] * 31]}]), r"has 1 x 31 cells: the maximum is 30 x 30"),
    ],
)
def test_broken_tasks_are_refused_with_file_and_name(content: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(InputError, match=rf"bad\.json, task bad.* {message}"):
        read_tasks(path)


def test_broken_sources_are_refused(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_tasks(path)

    refused(tmp_path, r"has no \.json file")
    refused(tmp_path / "missing.json", r"missing\.json does not exist")
    challenges = write_prize(tmp_path, [RISE, FLAT])
    refused(tmp_path, r"contains sets of tasks: name one of them, such as .*set_challenges\.json")
    solutions = tmp_path / "set_solutions.json"
    write(solutions, {"rise": [[[1]]], "flat": [[[0]]]})
    refused(challenges, r"set_solutions\.json, task rise has 1 solution, but needs 2")
    write(solutions, {"rise": [[[1]], [[1, 2], [3]]], "flat": [[[0]]]})
    refused(challenges, r"set_solutions\.json, task rise, solution 2: the grid is ragged")
    write(solutions, {"rise": [[[1]], [[1]]]})
    refused(challenges, r"set_solutions\.json, task flat has no solution, but needs 1")
    write(solutions, [])
    refused(challenges, r"set_solutions\.json is not an object that maps names to tasks")
    other = ArcTask("flat", FLAT.train, RISE.test)
    with pytest.raises(InputError, match=r"task flat of b differs from the one in a"):
        merged([(Path("a"), [FLAT]), (Path("b"), [other])])
    # The order of pairs differs between the public sets, but the tasks are the same.
    turned_round = ArcTask("rise", RISE.train[::-1], RISE.test[::-1])
    assert merged([(Path("a"), [RISE]), (Path("b"), [turned_round])]) == [RISE]


def whole(task: ArcTask, transform: Transform) -> frozenset[Any]:
    return frozenset(
        (transform.apply(each.input).tolist().__repr__(), transform.apply(each.output).tolist().__repr__())
        for each in task.train + task.test
    )


def test_symmetries_are_distinct_and_depend_on_the_task_alone() -> None:
    plan = plan_tasks([RISE], [FLAT], 50, 0)
    rise, flat = plan.transforms
    assert rise[0] == flat[0] == Transform()
    assert len(rise) == 51 == len({whole(RISE, transform) for transform in rise})
    assert all(transform.colours[0] == 0 for transform in rise)
    assert {transform.dihedral for transform in rise} == set(range(8))
    # Black grids of 1 x 1 and 1 x 2 have only one other rotation.
    assert len(flat) == 2
    assert plan_tasks([FLAT, RISE], [], 50, 0).transforms == (flat, rise)
    assert plan_tasks([RISE], [FLAT], 50, 1).transforms[0] != rise
    assert plan.num_puzzles == 1 + 51 + 2 == len(plan.identifiers())
    assert plan.sizes == {"train": 51 * 2 + 2 * 2, "test": 51 * 2}


def decoded(tokens: np.ndarray) -> tuple[tuple[int, int], np.ndarray]:
    canvas = tokens.reshape(30, 30)
    row, column = (int(np.argwhere((canvas > 1).any(axis)).min()) for axis in (1, 0))
    return (row, column), crop(np.pad(canvas[row:, column:], ((0, row), (0, column))))[0]


def test_splits_bring_back_every_pair() -> None:
    plan = plan_tasks([RISE], [FLAT], 30, 0)
    splits, identifiers = plan.splits(), plan.identifiers()
    expected = {("train", "rise"): RISE.train, ("train", "flat"): FLAT.train + FLAT.test}
    expected["test", "rise"] = RISE.test
    corners: dict[tuple[str, int], list[tuple[int, int]]] = {}
    found: dict[tuple[str, int], list[tuple[Any, Any]]] = {}
    for name, split in splits.items():
        rows = zip(split.inputs.numpy(), split.labels.numpy(), split.puzzles.tolist(), strict=True)
        for question, answer, puzzle in rows:
            (corner, asked), (other, told) = decoded(question), decoded(answer)
            assert corner == other
            entry = identifiers[puzzle]
            assert entry is not None
            corners.setdefault((name, puzzle), []).append(corner)
            bits = tuple(invert(each, entry[1]).tolist() for each in (asked, told))
            found.setdefault((name, puzzle), []).append(bits)
    for (name, puzzle), pairs in found.items():
        entry = identifiers[puzzle]
        assert entry is not None
        assert pairs == [(each.input.tolist(), each.output.tolist()) for each in expected[name, entry[0]]]
    assert {puzzle for name, puzzle in found if name == "train"} == set(range(1, plan.num_puzzles))
    assert all(corner == (0, 0) for (name, _), each in corners.items() if name == "test" for corner in each)
    moved = [each for (name, _), each in corners.items() if name == "train"]
    assert all((0, 0) in each for each in moved)
    rows, columns = np.array([corner for each in moved for corner in each]).T
    assert min(rows.max(), columns.max()) >= 24 and len(set(rows)) > 12 and len(set(columns)) > 12


def test_large_grids_stay_on_the_canvas() -> None:
    large = ArcTask("large", tuple(pair("1" * 30, " ".join(["2"] * 29)) for _ in range(3)), FLAT.test)
    split = plan_tasks([large], [], 20, 0).splits()["train"]
    assert ((split.inputs > 1).sum(1) == 30).all() and ((split.labels > 1).sum(1) == 29).all()


def test_folder_round_trips(tmp_path: Path) -> None:
    plan = plan_tasks([RISE, ArcTask("open", RISE.train, (pair("7"),))], [FLAT], 5, 3)
    steps: list[int] = []
    info = write_arc(tmp_path, plan, {"augment": 5}, steps.append)
    assert (info.num_puzzles, info.vocab_size, info.seq_len) == (plan.num_puzzles, 12, 900)
    assert read_info(tmp_path) == info and sum(steps) == sum(plan.sizes.values())
    for name, split in plan.splits().items():
        np.testing.assert_array_equal(read_split(tmp_path, name).inputs, split.inputs)
    key = read_arc(tmp_path)
    assert key.identifiers == plan.identifiers()
    assert list(key.tests) == ["rise", "open"] and key.tests["open"][0].output is None
    np.testing.assert_array_equal(key.tests["rise"][1].output, grid("65"))


@pytest.mark.parametrize(
    "content",
    [[], {"identifiers": [["a", 9, "0123456789"]], "tests": {}}, {"identifiers": [None], "tests": []}],
)
def test_broken_keys_are_refused(content: Any, tmp_path: Path) -> None:
    write(tmp_path / "arc.json", content)
    with pytest.raises(InputError, match=r"arc\.json does not describe ARC puzzles"):
        read_arc(tmp_path)


def test_votes_count_first_and_probabilities_break_ties() -> None:
    one, two, three = grid("1"), grid("22"), grid("2 2")
    first, second = vote([(one, 0.99), (two, 0.1), (three, 0.4), (two, 0.3), (three, 0.2)])
    # 2 votes with a mean of 0.3, 2 with 0.2, and 1 with more; a grid and its transpose are two candidates.
    np.testing.assert_array_equal(first, three)
    np.testing.assert_array_equal(second, two)
    first, second = vote([(one, 0.5)])
    np.testing.assert_array_equal(first, one)
    np.testing.assert_array_equal(second, one)
    with pytest.raises(ValueError, match="no predictions"):
        vote([])
    assert score([(one, two), (two, three), None, (one, one)], [two, one, one, one]) == 0.5


def ballot_of(plan: ArcPlan) -> ArcBallot:
    tests = {task.name: task.test for task in plan.held_out}
    return ArcBallot(ArcKey(plan.identifiers(), tests))


def test_ballot_brings_predictions_back() -> None:
    twins = ArcTask("twins", FLAT.train, (pair("13", "31"), pair("13", "31"), pair("7")))
    plan = plan_tasks([RISE, twins], [FLAT], 12, 0)
    test = plan.splits()["test"]
    inputs, labels, puzzles = test.inputs.numpy(), test.labels.numpy().copy(), test.puzzles.numpy()
    rng = np.random.default_rng(0)
    # Wrong colours in four of ten predictions, but with a higher probability each time.
    wrong = rng.random(len(labels)) < 0.4
    labels[wrong] = np.where(labels[wrong] > 2, 13 - labels[wrong], labels[wrong])
    ballot = ballot_of(plan)
    assert ballot.score() is not None and ballot.score().inputs == 0
    assert ballot.submission()["rise"][0] == {"attempt_1": [[0]], "attempt_2": [[0]]}
    order = rng.permutation(len(labels))
    for part in np.array_split(order, 4):
        ballot.add(inputs[part], labels[part], puzzles[part], wrong[part] * 0.5 + 0.4)
    blank = np.zeros(1, dtype=np.int32)
    ballot.add(inputs[:1] * 0, labels[:1] * 0, blank, blank.astype(float))
    result = ballot.score()
    assert result is not None and (result.inputs, result.tasks, result.scored) == (1.0, 1.0, 4)
    submitted = ballot.submission()
    assert [each["attempt_1"] for each in submitted["rise"]] == [[[1], [2]], [[6, 5]]]
    assert [each["attempt_1"] for each in submitted["twins"][:2]] == [[[3, 1]], [[3, 1]]]
    with pytest.raises(ValueError, match="the question of puzzle 1 is not a test input of task rise"):
        ballot.add(labels[:1] * 0 + 2, labels[:1], puzzles[:1], np.ones(1))


def test_published_score_is_a_mean_over_tasks() -> None:
    single = ArcTask("single", FLAT.train, (pair("1", "2"),))
    three = ArcTask("three", FLAT.train, (pair("1", "2"), pair("3", "4"), pair("5", "6")))
    plan = plan_tasks([single, three], [], 0, 0)
    test, ballot = plan.splits()["test"], ballot_of(plan)
    inputs, labels, puzzles = test.inputs.numpy(), test.labels.numpy().copy(), test.puzzles.numpy()
    labels[1:3] = 5
    ballot.add(inputs, labels, puzzles, np.ones(4))
    result = ballot.score()
    assert result is not None and result.inputs == 0.5
    assert result.tasks == pytest.approx((1 + 1 / 3) / 2)
