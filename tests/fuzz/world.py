"""One small, valid instance of everything that the commands read, made by the commands themselves."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

from tests.fuzz.children import Children

_PUZZLE_RUN = (
    "--steps 2 --batch-size 4 --d-model 8 --layers 1 --heads 2 -n 1 -T 1 --max-steps 2 --eval-every 1 "
    "--log-every 1 --device cpu"
)
_LORA_RUN = "--steps 1 --batch-size 4 --eval-every 1 --eval-samples 4 --device cpu"
_LATENTS = "--num-latents 2 --layers 1 -n 1 -T 1 --supervision-steps 1"

#: Valid arguments of every command, which take less than a second; W is the folder of the world.
BASES: dict[str, str] = {
    "data sudoku": "--size 4 --num-samples 12 --test-samples 6 -o out",
    "data maze": "--size 5 --min-path 2 --num-samples 8 --test-samples 4 -o out",
    "data arc": "W/tasks --augment 1 -o out",
    "data arithmetic": "--num-samples 30 --operations 2 -o out.jsonl",
    "datagen": "--num-samples 8 --operations 1 --max-operand 2 --shard-size 4 --device cpu -o out",
    "train puzzle": f"--data W/sudoku -o out {_PUZZLE_RUN}",
    "train lm": "-o out --steps 1 --batch-size 2 --eval-samples 2 --device cpu",
    "train phase1": "-o out --num-tokens 200 --epochs 1 --d-compressed 8 --device cpu",
    "train phase2": "--data W/pairs --compressor W/phase1/1b -o out --epochs 1 -n 1 -T 1 "
    "--supervision-steps 1 --layers 1 --batch-size 4 --device cpu",
    "train lora": f"--data W/problems.jsonl -o out {_LORA_RUN} {_LATENTS}",
    "train phase3": "--checkpoint W/lora -o out --steps 1 --batch-size 4 --group-size 2 --eval-samples 4 "
    "--eval-every 1 --max-new-tokens 4 --device cpu",
    "eval puzzle": "--checkpoint W/puzzle --device cpu",
    "eval phase2": "--checkpoint W/phase2 --data W/pairs --allow-training-data --device cpu",
    "eval lm": "--checkpoint W/lora --data W/problems.jsonl --num-samples 4 --max-new-tokens 4 --device cpu",
    "generate": "--checkpoint W/lora --max-new-tokens 4 --device cpu 1+1",
    "solve": "--checkpoint W/puzzle --device cpu '1... ..3. .4.. ...2'",
    "export official": "W/exportable -o step_1",
    "import official": "W/official/step_1 -o out",
    "env": "",
    "tune": "--dry-run --d-model 32",
    "bench": "--quick --d-model 8 --latents 4 --backends eager --budget 1 --mode forward --device cpu",
}

#: The commands that make the world, in order, and what they write.
_MADE = (
    ("data sudoku", "--size 4 -o W/sudoku"),
    ("data maze", "-o W/maze"),
    ("data arc", "-o W/arc"),
    ("data arithmetic", "-o W/problems.jsonl"),
    ("datagen", "-o W/pairs"),
    ("train puzzle", "-o W/puzzle"),
    ("train puzzle", "-o W/exportable --puzzle-len 0"),
    ("export official", "-o W/official/step_1"),
    ("train lm", "-o W/lm"),
    ("train phase1", "-o W/phase1"),
    ("train phase2", "-o W/phase2"),
    ("train lora", "-o W/lora"),
    ("train lora", "-o W/merged --merge"),
    ("train phase3", "-o W/phase3"),
    ("bench", "--json W/bench.jsonl"),
    # They write nothing, but import what the children need.
    ("eval puzzle", ""),
    ("eval phase2", ""),
    ("eval lm", ""),
    ("generate", ""),
    ("solve", ""),
    ("tune", ""),
    ("env", ""),
)

#: Runs that are interrupted after their first step: RESUMED, with the same settings, continues them.
RESUMED = {
    "train puzzle": "-o W/part/puzzle --steps 3",
    "train phase2": "-o W/part/phase2 --save-every 1",
    "train lora": "-o W/part/lora --steps 3",
    "train lm": "-o W/part/lm --steps 3",
    "train phase3": "-o W/part/phase3 --steps 3",
    "train phase1": "-o W/part/phase1 --batch-size 64 --epochs 2",
}

_TASK = {
    "train": [{"input": [[1, 2], [3, 4]], "output": [[4, 3], [2, 1]]}],
    "test": [{"input": [[1, 0]], "output": [[2, 0]]}],
}
_SUDOKUS = ("1234341221434321", "1234341243212143", "2143341212344321")
_MAZE = ("#####", "#S  #", "# # #", "###G#", "#####")
_MAZES = (
    (_MAZE, ("#####", "#Soo#", "# #o#", "###G#", "#####")),
    (("#####", "#S  #", "#   #", "#  G#", "#####"), ("#####", "#Soo#", "#  o#", "#  G#", "#####")),
)


def arguments(name: str, world: Path, more: str = "") -> list[str]:
    """The command line of a command with its valid arguments, and ``more`` of them."""
    return resolved([*name.split(), *shlex.split(BASES[name]), *shlex.split(more)], world)


def resolved(words: list[str], world: Path) -> list[str]:
    """``words`` with the path of the world for ``W``."""
    return [f"{world}{word.removeprefix('W')}" if word.startswith("W/") else word for word in words]


def make(world: Path, children: Children) -> None:
    """Make the world in the empty folder ``world``, and import into the server what that needed."""
    (world / "official").mkdir()
    (world / "tasks").mkdir()
    for name in ("one", "two"):
        (world / "tasks" / f"{name}.json").write_text(json.dumps(_TASK))
    _write_texts(world)
    lines = [arguments(name, world, more) for name, more in _MADE]
    ended = children.run("tests.fuzz.child:commands", lines, folder=world, seconds=300)
    if ended.value is None:
        raise RuntimeError(f"the world could not be made: {ended.err[-3000:]}")
    children.learn(ended.value)
    lines = [arguments(name, world, more) for name, more in RESUMED.items()]
    ended = children.run("tests.fuzz.child:interrupted", lines, folder=world, seconds=300)
    if ended.status != 0:
        raise RuntimeError(f"no run could be interrupted: {ended.err[-3000:]}")
    children.run("tests.fuzz.readings:write_tiles", str(world / "tiles.json"), folder=world)


def _write_texts(world: Path) -> None:
    folder = world / "texts"
    folder.mkdir()
    blanked = [f"{grid[:5]}...{grid[8:]}" for grid in _SUDOKUS]
    rows = "".join(f"{puzzle},{grid}\n" for puzzle, grid in zip(blanked, _SUDOKUS, strict=True))
    (folder / "sudoku.csv").write_text(f"puzzle,solution\n{rows}")
    (folder / "sudoku.jsonl").write_text(
        "".join(
            json.dumps({"puzzle": p, "solution": s, "rating": 1.5}) + "\n"
            for p, s in zip(blanked, _SUDOKUS, strict=True)
        )
    )
    (folder / "sudoku.txt").write_text("\n".join(blanked) + "\n")
    rows = "".join(f"{''.join(maze)},{''.join(solved)}\n" for maze, solved in _MAZES)
    (folder / "maze.csv").write_text(f"question,answer\n{rows}")
    (folder / "maze.txt").write_text("\n".join(_MAZE) + "\n")
    sums = [(1, 1), (2, 2), (3, 4), (2, 5)]
    questions = [
        {"question": f"{a}+{b}", "answer": str(a + b), "thinking": f"{a}+{b}={a + b}"} for a, b in sums
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "questions.json").write_text(json.dumps(questions))
    (folder / "text.txt").write_text("1+1=2\n\n2+2=4\n")
    (folder / "config.toml").write_text('steps = 2\nlearning_rate = 0.01\nprecision = "fp32"\n')


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file, which cases must leave as they are."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            state = os.stat(path)
            found[path] = (state.st_size, state.st_mtime_ns)
    return found
