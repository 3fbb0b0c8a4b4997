"""A damaged checkpoint is recognised, and the run goes on from the newest one that is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trm.errors import InputError
from llm_trm.manifest import MANIFEST_FILE
from llm_trm.models.phase2 import load_phase2
from llm_trm.models.puzzle.loading import load_puzzle
from llm_trm.models.run_folder import model_folder
from llm_trm.train.phase2.progress import Progress
from llm_trm.train.phase2.trainer import TRMSequenceTrainer
from llm_trm.train.puzzle.progress import PuzzleProgress
from llm_trm.train.puzzle.trainer import PuzzleTrainer
from llm_trm.train.run.checkpoints import Checkpoints
from llm_trm.train.run.tracking import lines_until
from llm_trm.train.run.training_state import read_progress
from llm_trm.weights import read_tensors
from tests.puzzle import toy as puzzles
from tests.train import toy as contexts

Damage = Callable[[Path], object]


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def remove(path: Path) -> None:
    path.unlink()


class Own:
    """A training with its own loop, of two or more checkpoints."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        (puzzles if kind == "puzzle" else contexts).write_toy(folder)

    def train(self, run: str, **changes: Any) -> Path:
        output = self.folder / run
        if self.kind == "puzzle":
            PuzzleTrainer(puzzles.toy_config(self.folder, output=output, **changes)).train()
        else:
            TRMSequenceTrainer(contexts.toy_config(self.folder, output=output, **changes)).train()
        return output

    def content(self, run: str) -> Any:
        if self.kind == "puzzle":
            return puzzles.content_of(self.folder / run)
        last = Checkpoints(self.folder / run).last
        tensors = read_tensors(last / "state.safetensors", "")
        progress = json.loads((last / "state.json").read_text())
        return {name: tensor.tolist() for name, tensor in tensors.items()}, progress["history"]

    def load(self, run: str) -> Any:
        return (load_puzzle if self.kind == "puzzle" else load_phase2)(self.folder / run)


@pytest.fixture(scope="module", params=["puzzle", "phase2"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Own:
    """A finished run of two checkpoints in ``whole``."""
    own = Own(request.param, tmp_path_factory.mktemp(request.param))
    own.train("whole")
    return own


@pytest.fixture
def copied(trained: Own, tmp_path: Path) -> Own:
    shutil.copytree(trained.folder, tmp_path / "copy")
    found = object.__new__(Own)
    found.kind, found.folder = trained.kind, tmp_path / "copy"
    shutil.copytree(found.folder / "whole", found.folder / "run")
    return found


def all_checkpoints(output: Path) -> list[Path]:
    return sorted((output / "checkpoints").iterdir(), reverse=True)


@pytest.mark.parametrize(
    ("file", "damage", "old"),
    [
        ("state.safetensors", flip, False),
        ("state.safetensors", halve, True),
        ("state.safetensors", empty, True),
        ("state.safetensors", remove, True),
        ("state.json", flip, False),
        ("state.json", halve, True),
        ("state.json", remove, True),
        (MANIFEST_FILE, halve, False),
    ],
)
def test_the_checkpoint_before_is_taken(
    file: str, damage: Damage, old: bool, copied: Own, caplog: pytest.LogCaptureFixture
) -> None:
    """``old``: a run of an older version, without checksums."""
    checkpoints = all_checkpoints(copied.folder / "run")
    if old:
        for checkpoint in checkpoints:
            (checkpoint / MANIFEST_FILE).unlink()
    damage(checkpoints[0] / file)
    copied.train("run", resume=True)
    (line,) = caplog.messages
    assert str(checkpoints[0] / file) in line
    assert line.endswith(f": resuming from the checkpoint before it, {checkpoints[1].name}")
    assert copied.content("run") == copied.content("whole")
    caplog.clear()
    copied.train("run", resume=True)
    assert not caplog.messages
    # Neither: nothing to resume, and nothing is replaced.
    for checkpoint in all_checkpoints(copied.folder / "run"):
        if old:
            (checkpoint / MANIFEST_FILE).unlink(missing_ok=True)
        damage(checkpoint / file)
    before = (copied.folder / "run" / "index.json").read_text()
    with pytest.raises(InputError, match=rf"{file}.*start over with --overwrite$"):
        copied.train("run", resume=True)
    assert (copied.folder / "run" / "index.json").read_text() == before


def test_a_damaged_best_checkpoint_is_not_loaded(copied: Own) -> None:
    best = Checkpoints(copied.folder / "run").best
    assert best is not None
    model = next(path for path in best.rglob("*.safetensors") if path.name != "state.safetensors")
    kept = model.read_bytes()
    flip(model)
    with pytest.raises(InputError, match=rf"{model.name} has changed since it was written .*{MANIFEST_FILE}"):
        copied.load("run")
    # Evaluation needs no state of the training.
    model.write_bytes(kept)
    (best / "state.safetensors").unlink()
    empty(best / "state.json")
    assert copied.load("run")


#: Values of a wrong type or size for nearly any field.
NONSENSE: tuple[Any, ...] = (None, -1, 1e400, float("nan"), "x", [], {}, [5], {"a": "b"}, True, 10**400)


def fields(value: Any) -> list[tuple[Any, ...]]:
    """Paths to the values in nested JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(key, *rest) for key, inner in items for rest in [(), *fields(inner)]]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of nested JSON with another value at ``path``."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return copy


def try_nonsense(file: Path, use: Callable[[], object], values: Sequence[Any] = NONSENSE) -> int:
    """Put nonsense in each field of a JSON file: refused in one line, or harmless. Returns how often."""
    text, refused = file.read_text(), 0
    content = json.loads(text)
    for path in fields(content):
        for nonsense in values:
            try:
                file.write_text(json.dumps(put(content, path, nonsense)))
            except ValueError:  # Python writes no numbers of thousands of digits
                continue
            try:
                use()
            except InputError as error:
                assert "\n" not in str(error)
                refused += 1
    file.write_text(text)
    return refused


def test_wrong_types_in_a_run_get_one_line(copied: Own) -> None:
    run = copied.folder / "run"
    for checkpoint in all_checkpoints(run)[1:]:
        shutil.rmtree(checkpoint)
    (checkpoint,) = all_checkpoints(run)
    index = json.loads((run / "index.json").read_text())
    last = [entry for entry in index["kept"] if entry["name"] == index["last"]]
    (run / "index.json").write_text(json.dumps({**index, "best": index["last"], "kept": last}))
    (checkpoint / MANIFEST_FILE).unlink()

    def construct() -> None:
        if copied.kind == "puzzle":
            PuzzleTrainer(puzzles.toy_config(copied.folder, output=run, resume=True))
        else:
            TRMSequenceTrainer(contexts.toy_config(copied.folder, output=run, resume=True))

    construct()
    assert try_nonsense(run / "index.json", Checkpoints(run).newest_whole) > 30
    assert try_nonsense(run / "index.json", lambda: model_folder(run, "")) > 5
    progress = PuzzleProgress if copied.kind == "puzzle" else Progress
    assert try_nonsense(checkpoint / "state.json", lambda: read_progress(checkpoint, progress)) > 100
    # What the settings and the progress are used for.
    assert try_nonsense(checkpoint / "state.json", construct, [None, [5]]) > 40


def test_wrong_random_states_get_one_line(trained: Own, copied: Own) -> None:
    from safetensors.torch import load_file, save_file

    run = copied.folder / "run"
    for checkpoint in all_checkpoints(run):
        (checkpoint / MANIFEST_FILE).unlink()
        file = checkpoint / "state.safetensors"
        tensors = load_file(file)
        (name,) = (name for name in tensors if name.startswith("random.") and name.endswith("torch"))
        save_file({**tensors, name: torch.zeros(3)}, file)
    with pytest.raises(InputError, match="no states of the random number generators: start over"):
        copied.train("run", resume=True)


def test_broken_lines_of_metrics_are_dropped(tmp_path: Path) -> None:
    lines = ['{"step": 1}', '{"step": "x"}', '{"step": [1]}', "[1]", "3", '{"step": NaN}', "[" * 100_000]
    lines += ['{"step": 2}', '{"step": 3}', '{"st']
    (tmp_path / "m").write_text("\n".join(lines))
    assert lines_until(tmp_path / "m", 2) == '{"step": 1}\n{"step": 2}\n'


# --- runs on a Trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, problems, and finished runs of two checkpoints, ``lm`` and ``lora``."""
    pytest.importorskip("peft")
    from tests.causal.lora_world import write_language_model, write_rows

    folder = tmp_path_factory.mktemp("world")
    write_language_model(folder / "model")
    write_rows(folder / "problems.jsonl")
    for kind in ("lm", "lora"):
        train(kind, folder, folder / kind)
    return folder


def train(kind: str, world: Path, output: Path, **changes: Any) -> None:
    from llm_trm.data.arithmetic import World
    from llm_trm.models import tiny
    from llm_trm.train.lm.config import LanguageModelConfig
    from llm_trm.train.lm.train import train_language_model
    from llm_trm.train.lora.train import train_lora
    from tests.causal.lora_world import settings
    from tests.train.test_language_model import SMALL

    if kind == "lora":
        train_lora(
            settings(world, output=output, model=str(world / "model"), steps=4, eval_every=2, **changes)
        )
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.PRESETS, "tiny", SMALL)
        config = LanguageModelConfig(
            output, world=World(1, 1), steps=4, batch_size=8, save_every=2, device="cpu"
        )
        train_language_model(replace(config, **changes))


def interrupted_copy(kind: str, world: Path, output: Path, *, old: bool) -> Path:
    """A run whose model is not written yet; ``old`` as an older version left it, without checksums."""
    shutil.copytree(world / kind, output)
    for path in output.iterdir():
        if path.is_file() and path.name != f"{kind}.json":
            path.unlink()
    if old:
        for path in output.rglob(MANIFEST_FILE):
            path.unlink()
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def check(run: Path) -> Path:
    """The checkpoint that a run would resume from."""
    from llm_trm.train.run.checkpoints import newest_whole
    from llm_trm.train.run.trainer_checkpoints import complete_checkpoints, require_resumable

    return newest_whole(complete_checkpoints(run), require_resumable)


@pytest.mark.parametrize("kind", ["lm", "lora"])
@pytest.mark.parametrize(
    ("pattern", "damage", "old"),
    [
        ("optimizer.pt", remove, False),
        ("optimizer.pt", remove, True),
        ("optimizer.pt", empty, True),
        ("optimizer.pt", halve, True),
        ("optimizer.pt", flip, True),
        ("scheduler.pt", remove, True),
        ("scheduler.pt", empty, False),
        ("rng_state.pth", remove, True),
        ("rng_state.pth", halve, True),
        ("trainer_state.json", halve, True),
        ("*model.safetensors", flip, False),
        ("*model.safetensors", remove, True),
    ],
)
def test_a_trainer_takes_the_checkpoint_before(
    kind: str,
    pattern: str,
    damage: Damage,
    old: bool,
    world: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = interrupted_copy(kind, world, tmp_path / "run", old=old)
    damage(next((run / "checkpoint-4").glob(pattern)))
    assert check(run).name == "checkpoint-2"
    (line,) = caplog.messages
    assert f"{run}/checkpoint-4" in line
    assert line.endswith("resuming from the checkpoint before it, checkpoint-2")
    damage(next((run / "checkpoint-2").glob(pattern)))
    with pytest.raises(InputError, match=r"checkpoint-4.*start over with --overwrite$") as refused:
        check(run)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "pattern", "damage"),
    [("lm", "optimizer.pt", empty), ("lora", "adapter_model.safetensors", flip)],
)
def test_a_trainer_goes_on_as_if_undisturbed(
    kind: str, pattern: str, damage: Damage, world: Path, tmp_path: Path
) -> None:
    run = interrupted_copy(kind, world, tmp_path / "run", old=False)
    damage(run / "checkpoint-4" / pattern)
    train(kind, world, run, resume=True)
    found = weights(run)
    for name, weight in weights(world / kind).items():
        assert torch.equal(found[name], weight), name
    for number in (2, 4):
        damage(run / f"checkpoint-{number}" / pattern)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(InputError, match=r"checkpoint-4.*start over with --overwrite$"):
        train(kind, world, run, resume=True)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    train(kind, world, run, overwrite=True)


@pytest.mark.parametrize("kind", ["lm", "lora"])
def test_a_trainers_run_of_an_older_version_is_resumed(
    kind: str, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = interrupted_copy(kind, world, tmp_path / "run", old=True)
    shutil.rmtree(run / "checkpoint-4")
    train(kind, world, run, resume=True)
    assert not [message for message in caplog.messages if "resuming" in message]
    found = weights(run)
    for name, weight in weights(world / kind).items():
        assert torch.equal(found[name], weight), name


def test_a_damaged_best_checkpoint_is_not_written_at_the_end(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_trm.train.lora import trainer

    losses = iter((0.1, 0.2))
    monkeypatch.setattr(trainer, "summary", lambda measures: {"loss": next(losses)})
    run = tmp_path / "run"
    train("lora", world, run)
    (run / "latent.json").unlink()
    flip(run / "checkpoint-2" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"checkpoint-2/adapter_model.safetensors has changed"):
        train("lora", world, run, resume=True)


def test_a_damaged_checkpoint_with_a_recursion_is_not_loaded(world: Path, tmp_path: Path) -> None:
    from llm_trm.models.causal.loading import load_latent_model

    run = interrupted_copy("lora", world, tmp_path / "run", old=False)
    flip(run / "checkpoint-2" / "optimizer.pt")
    assert load_latent_model(run / "checkpoint-2")
    flip(run / "checkpoint-2" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=rf"adapter_model.safetensors has changed .*{MANIFEST_FILE}"):
        load_latent_model(run / "checkpoint-2")


@pytest.mark.parametrize("kind", ["lm", "lora"])
def test_wrong_types_in_a_trainers_run_get_one_line(kind: str, world: Path, tmp_path: Path) -> None:
    run = interrupted_copy(kind, world, tmp_path / "run", old=True)
    shutil.rmtree(run / "checkpoint-2")
    assert check(run).name == "checkpoint-4"
    assert try_nonsense(run / "checkpoint-4" / "trainer_state.json", lambda: check(run)) > 100
    settings = run / f"{kind}.json"
    content = json.loads(settings.read_text())
    for nonsense in ("[]", "3", "null", "{", '"x"', json.dumps({name: {"a": [1]} for name in content})):
        settings.write_text(nonsense)
        with pytest.raises(InputError) as refused:
            train(kind, world, run, resume=True)
        assert "\n" not in str(refused.value)


def spoil(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors in a safetensors file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def fill(tensors: dict[str, torch.Tensor]) -> None:
    tensors[max(tensors)].view(-1)[0] = torch.nan


@pytest.mark.parametrize("kind", ["lm", "lora"])
@pytest.mark.parametrize(
    ("pattern", "damage", "words"),
    [
        ("*model.safetensors", lambda path: spoil(path, fill), "NaN or infinity in"),
        ("*model.safetensors", halve, "incomplete"),
        ("*model.safetensors", lambda path: path.write_bytes(b"version https://git-lfs"), "git lfs pull"),
        ("optimizer.pt", lambda path: path.write_bytes(b"version https://git-lfs"), "git lfs pull"),
        ("optimizer.pt", lambda path: torch.save({"x": Path}, path), "could run code"),
        ("scheduler.pt", lambda path: torch.save([1, 2], path), "state of a Trainer"),
        ("rng_state.pth", lambda path: torch.save({"x": Path}, path), "could run code"),
    ],
)
def test_contents_of_a_trainers_checkpoint_are_checked(
    kind: str, pattern: str, damage: Damage, words: str, world: Path, tmp_path: Path
) -> None:
    run = interrupted_copy(kind, world, tmp_path / "run", old=True)
    shutil.rmtree(run / "checkpoint-2")
    path = next((run / "checkpoint-4").glob(pattern))
    damage(path)
    with pytest.raises(InputError, match=f"{path} .*{words}") as refused:
        train(kind, world, run, resume=True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["lm", "lora"])
@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_of_another_model_are_not_resumed(
    kind: str, change: str, world: Path, tmp_path: Path
) -> None:
    run = interrupted_copy(kind, world, tmp_path / "run", old=True)
    shutil.rmtree(run / "checkpoint-2")
    path = next((run / "checkpoint-4").glob("*model.safetensors"))

    def other(tensors: dict[str, torch.Tensor]) -> None:
        name = max(tensors)
        weight = tensors.pop(name)
        if change == "shape":
            tensors[name] = weight[:-1].clone()

    spoil(path, other)
    with pytest.raises(InputError, match=r"checkpoint.*start over with --overwrite") as refused:
        train(kind, world, run, resume=True)
    assert "\n" not in str(refused.value)
