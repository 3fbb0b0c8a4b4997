"""A run removes what it wrote, and never what a user or another run keeps in the same place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trm.errors import InputError
from llm_trm.train.phase1.states import remove_states
from llm_trm.train.phase1.unfinished import FitProgress, Unfinished
from llm_trm.train.run.checkpoints import Checkpoints
from llm_trm.train.run.run import Progress
from llm_trm.train.run.training_state import write_state


def save(run: Checkpoints, step: int, loss: float | None = None) -> None:
    with run.new(f"step-{step:08d}", loss) as folder:
        write_checkpoint(folder)


def write_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_state(folder, Progress(sums={}, steps=0.0, history=[], settings={}), {})
    return folder


def content(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_folders_next_to_the_checkpoints_stay(tmp_path: Path) -> None:
    run, folder = Checkpoints(tmp_path / "run", keep=1), tmp_path / "run" / "checkpoints"
    save(run, 1)
    write_checkpoint(folder / "my-favourite")
    write_checkpoint(folder / "step-00000001-of-last-week")
    (folder / "step-00000090").mkdir()
    (folder / "step-00000090" / "notes.txt").touch()
    (folder / ".hidden").mkdir()
    (folder / "notes.txt").touch()
    write_checkpoint(tmp_path / "elsewhere")
    (folder / "step-00000091").symlink_to(tmp_path / "elsewhere")
    kept = content(folder) - {name for name in content(folder) if name.startswith("step-00000001/")}
    kept -= {"step-00000001"}
    save(run, 2)
    assert kept <= content(folder) and "step-00000001" not in content(folder)
    run.go_on_from(run.last)
    run.clear()
    assert content(folder) == kept
    assert (tmp_path / "elsewhere" / "state.json").exists()


def test_leftovers_of_killed_runs_go(tmp_path: Path) -> None:
    run, folder = Checkpoints(tmp_path), tmp_path / "checkpoints"
    save(run, 1)
    write_checkpoint(folder / "step-00000002")  # killed before it was in the index
    write_checkpoint(folder / ".step-00000003.abcd_123")  # of an older version, killed in writing
    write_checkpoint(folder / ".step-00000004.abcd_123.llm-trm-tmp")
    run.go_on_from(run.last)
    assert {path.name for path in folder.iterdir()} == {"step-00000001"}


def test_another_runs_checkpoints_behind_a_link_stay(tmp_path: Path) -> None:
    theirs = Checkpoints(tmp_path / "theirs")
    for step in (1, 3):
        save(theirs, step, float(step))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "checkpoints").symlink_to(tmp_path / "theirs" / "checkpoints")
    before = content(tmp_path / "theirs")
    ours = Checkpoints(tmp_path / "ours", keep=1)
    save(ours, 2)
    save(ours, 4)
    assert ours.last.exists() and not (ours.last.parent / "step-00000002").exists()
    ours.go_on_from(ours.last)
    with pytest.raises(InputError, match="step-00000003 is no checkpoint of this run: move it"):
        save(ours, 3)
    ours.clear()
    assert content(tmp_path / "theirs") == before


def test_a_users_folder_is_not_replaced(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path)
    save(run, 1)
    own = tmp_path / "checkpoints" / "step-00000002"
    own.mkdir()
    (own / "notes.txt").touch()
    with pytest.raises(InputError, match="step-00000002 is no checkpoint of this run: move it"):
        save(run, 2)
    assert content(own) == {"notes.txt"} and run.last.name == "step-00000001"


@pytest.mark.parametrize("index", ["{", "[]", '{"last": 3, "best": null, "kept": []}'])
def test_a_broken_index_does_not_stop_a_new_run(index: str, tmp_path: Path) -> None:
    run = Checkpoints(tmp_path)
    save(run, 1)
    write_checkpoint(tmp_path / "checkpoints" / "mine")
    (tmp_path / "index.json").write_text(index)
    run.clear()
    assert content(tmp_path / "checkpoints") == {"mine", "mine/state.json", "mine/state.safetensors"}


def test_phase1_removes_its_own_files_only(tmp_path: Path) -> None:
    states = tmp_path / "states" / "0123"
    states.mkdir(parents=True)
    for name in ("states.json", "states-00000.safetensors", "notes.txt"):
        (states / name).touch()
    remove_states(states)
    assert content(states) == {"notes.txt"}

    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    quality = {"mse": 0.5, "cosine_similarity": 0.5, "relative_error": 0.5}
    stage = Unfinished(tmp_path / "1a", {})
    best = [parameter.detach().clone() for parameter in module.parameters()]
    for step in (1, 2):  # the second replaces the first
        progress = FitProgress(step, 0, 0, quality, quality, {})
        stage.write(progress, module, best, optimizer)
        (stage.folder / "notes.txt").touch()
    assert stage.read(module, best, optimizer) == progress
    stage.remove()
    assert content(tmp_path / "1a") == {"unfinished", "unfinished/notes.txt"}
    assert stage.read(module, best, optimizer) is None


def test_a_model_that_is_replaced_leaves_the_users_files(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from llm_trm.models.causal.loading import clear_model

    own = (
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "latent.json",
    )
    users = ("model.safetensors.bak", "model-before.safetensors", "README.md")
    for name in (*own, *users):
        (tmp_path / name).touch()
    clear_model(tmp_path)
    assert content(tmp_path) == set(users)


def lm(output: Path, **changes: Any) -> None:
    pytest.importorskip("transformers")
    from dataclasses import replace

    from llm_trm.train.lm.train import train_language_model
    from tests.train.test_language_model import config

    train_language_model(replace(config(output.parent), output=output, **changes))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_trm.models import tiny
    from tests.train.test_language_model import SMALL

    monkeypatch.setitem(tiny.PRESETS, "tiny", SMALL)


def test_a_trainers_run_keeps_what_is_no_checkpoint_of_it(small: None, tmp_path: Path) -> None:
    run = tmp_path / "lm"
    lm(run, steps=2, save_every=1)
    for name in ("checkpoint-1-favourite", "checkpoint-favourite-1", "checkpoint-1-5"):
        shutil.copytree(run / "checkpoint-1", run / name)
    (run / "checkpoint-90").mkdir()
    (run / "checkpoint-90" / "tokenizer.json").touch()  # a model that the user copied there
    (tmp_path / "elsewhere" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "elsewhere" / "checkpoint-9" / "trainer_state.json").touch()
    for name in ("curves.png", "metrics.jsonl", ".tmpAbC123", "notes.txt"):
        (run / name).touch()
    own = {"checkpoint-1", "checkpoint-2"}
    kept = {path.name for path in run.glob("checkpoint-*")} - own | {"notes.txt"}
    lm(run, steps=4, save_every=1, overwrite=True)
    now = {path.name for path in run.iterdir()}
    assert kept <= now
    assert {name for name in now - kept if name.startswith("checkpoint-")} == {"checkpoint-3", "checkpoint-4"}
    assert not now & {"curves.png", "metrics.jsonl", ".tmpAbC123"}
    # Where the run would write a checkpoint, there is no other.
    (run / "checkpoint-5").symlink_to(tmp_path / "elsewhere" / "checkpoint-9")
    for _ in range(2):
        with pytest.raises(InputError, match="checkpoint-5 is no checkpoint of this run: move it"):
            lm(run, steps=6, save_every=1, overwrite=True)
        (run / "checkpoint-5").unlink()
        (run / "checkpoint-5").write_text("notes")
    assert (tmp_path / "elsewhere" / "checkpoint-9" / "trainer_state.json").exists()
