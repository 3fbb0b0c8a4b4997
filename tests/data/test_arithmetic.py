"""Tests of the arithmetic world: its problems, the command that writes them, and the bundled model."""

import json
import random
import re

import pytest
from click.testing import CliRunner

from llm_trm.cli import main
from llm_trm.data.arithmetic import World, held_out
from llm_trm.errors import InputError


def evaluated(question: str, modulus: int) -> int:
    """The answer computed independently, with Python's own arithmetic."""
    first, *rest = re.findall(r"\d+|[+*-]\d+", question)
    total = int(first)
    for step in rest:
        total = eval(f"({total}) {step[0]} {step[1:]}") % modulus
    return total


@pytest.mark.parametrize("world", [World(), World(2, 3, 100), World(4, 4, 10, max_operand=2)])
def test_answers_and_traces_are_right(world: World) -> None:
    for problem in world.problems(200, seed=3):
        assert int(problem.answer) == evaluated(problem.question, world.modulus)
        steps = problem.thinking.split(";")
        assert len(steps) == problem.operations
        assert world.min_operations <= problem.operations <= world.max_operations
        for step in steps:
            asked, total = step.split("=")
            assert int(total) == evaluated(asked, world.modulus)
        assert steps[-1].endswith(f"={problem.answer}")
        operands = [int(found) for found in re.findall(r"[+*-](\d+)", problem.question)]
        assert max(operands) <= (world.max_operand or world.modulus - 1) and min(operands) >= 1


def test_problems_are_a_function_of_split_seed_and_index() -> None:
    world = World()
    assert list(world.problems(20, seed=1)) == list(world.problems(20, seed=1))
    assert list(world.problems(20, seed=1)) != list(world.problems(20, seed=2))
    assert world.problem("test", 0, 7) == list(world.problems(8, "test"))[7]


def test_no_question_is_in_both_splits() -> None:
    world = World(1, 2)
    train = {problem.question for problem in world.problems(3000, "train")}
    test = {problem.question for problem in world.problems(3000, "test", seed=5)}
    assert train and test and not train & test
    assert not any(map(held_out, train)) and all(map(held_out, test))


def test_one_question_in_eight_is_held_out() -> None:
    chance = random.Random(0)
    world = World(4, 5)
    share = sum(held_out(world.draw(chance).question) for _ in range(4000)) / 4000
    assert 0.1 < share < 0.15


@pytest.mark.parametrize(
    "settings",
    [{"max_operations": 0}, {"min_operations": 4, "max_operations": 3}, {"modulus": 1}, {"max_operand": 10}],
)
def test_worlds_without_problems_are_rejected(settings: dict[str, int]) -> None:
    with pytest.raises(InputError):
        World(**settings)


def test_command_writes_the_records(tmp_path) -> None:
    path = tmp_path / "problems.jsonl"
    arguments = ["data", "arithmetic", "--num-samples", "30", "--operations", "3", "-o", str(path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == [problem.record() for problem in World(3, 3).problems(30)]
    assert CliRunner().invoke(main, arguments[:-2]).output == path.read_text()


def test_command_refuses_in_one_line(tmp_path) -> None:
    for arguments in (
        ["--operations", "2", "--min-operations", "3"],
        ["--max-operand", "10"],
        ["-o", str(tmp_path)],
        ["-o", str(tmp_path / "missing" / "problems.jsonl")],
    ):
        result = CliRunner().invoke(main, ["data", "arithmetic", *arguments])
        assert result.exit_code == 2
        assert result.stderr.startswith("llm-trm: error: ") and result.stderr.count("\n") == 1


def test_bundled_model_needs_to_think() -> None:
    pytest.importorskip("transformers")
    from llm_trm.evaluate.answers import accuracy
    from llm_trm.models import loading

    folder = loading._ARITHMETIC_FOLDER
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2_000_000
    thinker = loading.load_thinking_model("arithmetic")
    problems = list(World(5, 5).problems(200, "test", seed=11))
    with_thinking, without = (
        accuracy(thinker.model, thinker.tokenizer, problems, thinking=thinking, max_new_tokens=64)
        for thinking in (True, False)
    )
    assert with_thinking.share >= 0.95
    assert without.share <= 0.5
    assert with_thinking.generated > 30 > without.generated
