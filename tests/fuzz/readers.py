"""Every file that the product reads, damaged: it reads what was there, or refuses in one line."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.cases import Outcome, fault_of_message
from tests.fuzz.children import Children
from tests.fuzz.judging import judge, last_line, shown
from tests.fuzz.mutations import copy_of, mutate
from tests.fuzz.world import RESUMED, arguments, resolved


@dataclass(frozen=True)
class Reader:
    """What reads a file or a folder of the world.

    Attributes:
        source: The file or folder, below the world. It is copied to ``it``, with its suffix.
        by: A function of :mod:`tests.fuzz.readings`; or a command, with arguments that follow its valid ones.
        files: Which files of a folder are damaged.
        nan: Whether it may return NaN and infinity: a config file may contain any number.
    """

    source: str
    by: str
    files: str = "**/*"
    nan: bool = False


READERS = (
    Reader("sudoku", "puzzles"),
    Reader("arc", "arc"),
    Reader("pairs", "pairs"),
    Reader("phase1/1b", "compressor"),
    Reader("phase2", "phase2", "**/*.json"),
    Reader("phase2", "phase2", "**/*.safetensors"),
    Reader("phase2", "checkpoints", "index.json"),
    Reader("puzzle", "puzzle_model", "**/*"),
    Reader("puzzle", "checkpoints", "index.json"),
    Reader("lora", "latent_model", "*.json"),
    Reader("lora", "latent_model", "*"),
    Reader("merged", "latent_model", "*"),
    Reader("lm", "language_model", "*"),
    Reader("official/step_1", "official"),
    Reader("texts/questions.jsonl", "questions"),
    Reader("texts/questions.json", "questions"),
    Reader("texts/sudoku.csv", "sudoku"),
    Reader("texts/sudoku.jsonl", "sudoku"),
    Reader("texts/maze.csv", "mazes"),
    Reader("texts/sudoku.txt", "puzzle_text"),
    Reader("texts/maze.txt", "puzzle_text"),
    Reader("tasks/one.json", "tasks"),
    Reader("tasks", "tasks"),
    Reader("texts/config.toml", "config", nan=True),
    Reader("puzzle/config.json", "config", nan=True),
    Reader("tiles.json", "tiles"),
    Reader("bench.jsonl", "results"),
    Reader("texts/config.toml", "train puzzle --config it.toml"),
    Reader("puzzle/config.json", "train puzzle --config it.json"),
    Reader("lora/lora.json", "train lora --config it.json"),
    *(Reader(f"part/{name.split()[1]}", f"{name} --resume -o it", "**/*") for name in RESUMED),
    Reader("puzzle", "train puzzle --resume -o it"),
    Reader("phase2", "train phase2 --resume -o it"),
    Reader("lora", "train lora --resume -o it"),
    Reader("phase1", "train phase1 -o it"),
    Reader("phase1", "train phase1 -o it --seed 1 --overwrite"),
    Reader(
        "pairs", "datagen --num-samples 8 --operations 1 --max-operand 2 --shard-size 4 --device cpu -o it"
    ),
    Reader("phase1/1b", "train phase2 --compressor it"),
    Reader(
        "phase2",
        "train lora --trm it --data W/problems.jsonl --steps 1 --batch-size 4 --eval-samples 4 --device cpu",
    ),
    Reader("lora", "train phase3 --checkpoint it", "*"),
    Reader("lora", "generate --checkpoint it --max-new-tokens 4 1+1", "*"),
    Reader("lora", "eval lm --checkpoint it", "*"),
    Reader("phase2", "eval phase2 --checkpoint it"),
    Reader("pairs", "eval phase2 --data it"),
    Reader("sudoku", "eval puzzle --data it"),
    Reader("arc", "train puzzle --data it"),
    Reader("official", "import official it/step_1"),
    Reader("texts/questions.jsonl", "train lora --data it.jsonl"),
    Reader("texts/questions.jsonl", "train phase1 --traces it.jsonl"),
    Reader("texts/text.txt", "train phase1 --text it.txt"),
    Reader("texts/questions.jsonl", "datagen --data it.jsonl --num-samples 4 --device cpu"),
    Reader("texts/questions.jsonl", "generate --input it.jsonl --checkpoint W/lora"),
    Reader("texts/sudoku.csv", "data sudoku --input it.csv --test-samples 1"),
    Reader("texts/maze.csv", "data maze --input it.csv --test-samples 1"),
)


#: Commands whose valid arguments do not fit those of a reader.
_ALONE = ("import official", "data sudoku", "data maze", "generate", "datagen")


class Readers:
    """The part of the readers.

    Args:
        children: Server of the processes that readers run in.
        world: What they read, from :func:`tests.fuzz.world.make`.
        folder: Folder for the files of a case.
    """

    def __init__(self, children: Children, world: Path, folder: Path) -> None:
        self._children, self._world, self._folder = children, world, folder

    def __call__(self, number: int, chance: random.Random) -> Outcome:
        """Damage a file of each reader in turn, and let it read."""
        reader = READERS[number % len(READERS)]
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        it = self._folder / f"it{Path(reader.source).suffix}"
        copy_of(self._world / reader.source, it)
        files = [it] if it.is_file() else sorted(path for path in it.glob(reader.files) if path.is_file())
        # Pictures and cards are not read.
        path = chance.choice([path for path in files if path.suffix not in (".png", ".md")])
        how = f"{reader.source}/{path.relative_to(it) if path != it else ''}: {mutate(path, chance)}"
        how = how.encode(errors="backslashreplace").decode()
        if " " in reader.by:
            return self._command(reader, how)
        ended = self._children.run(
            "tests.fuzz.child:reading", f"tests.fuzz.readings:{reader.by}", it.name, folder=self._folder
        )
        what = f"{reader.by}, {how}"
        if ended.stopped:
            return Outcome(what, "hung", "it does not end")
        if ended.value is None:
            return Outcome(what, "traceback", f"an exception: {last_line(ended.err)}")
        if ended.value["code"] == 2:
            message = ended.value["message"]
            return Outcome(what, "refused", fault_of_message(message), message)
        return Outcome(what, "read", None if reader.nan else "; ".join(ended.value["faults"][:3]) or None)

    def _command(self, reader: Reader, how: str) -> Outcome:
        words = reader.by.split()
        name = " ".join(words[: 1 if words[0] in ("datagen", "generate") else 2])
        more = reader.by.removeprefix(name)
        if name in _ALONE or "--trm" in words:
            output = [] if "-o" in words or name == "generate" else ["-o", "out"]
            line = resolved([*words, *output], self._world)
        else:
            settings = RESUMED[name] if reader.source.startswith("part/") else ""
            line = arguments(name, self._world, f"{settings} {more}")
        ended = self._children.run("tests.fuzz.child:command", line, True, folder=self._folder)
        kind, fault = judge(name, ended, refuse=False)
        return Outcome(f"{how}; then llm-trm {shown(line)}", kind, fault, last_line(ended.err))
