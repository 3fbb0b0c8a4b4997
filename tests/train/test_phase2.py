"""The trainer of phase 2: what it learns, what it keeps, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_trm.cli.train.phase2_progress import ConsoleReport
from llm_trm.data.pairs import write_index
from llm_trm.errors import InputError
from llm_trm.evaluate.held_out import shared_problems
from llm_trm.manifest import MANIFEST_FILE
from llm_trm.models.compression import load_compressor
from llm_trm.models.phase2 import load_phase2
from llm_trm.train import TRMSequenceTrainer
from llm_trm.train.phase2.report import Phase2Result
from llm_trm.train.run.checkpoints import Checkpoints
from llm_trm.train.run.report import Report
from llm_trm.weights import read_tensors
from tests.train.toy import content_of, toy_config, write_compressor, write_pairs, write_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


class AtEachBatch(Report):
    def __init__(self, action: Callable[[int], None]) -> None:
        self.action, self.batches = action, 0

    def step(self, step: int) -> None:
        self.batches += 1
        self.action(self.batches)


def trainer(toy: Path, output: Path, report: Report | None = None, **options: Any) -> TRMSequenceTrainer:
    return TRMSequenceTrainer(toy_config(toy, output=output, **options), report)


def train(toy: Path, output: Path, **options: Any) -> Phase2Result:
    return trainer(toy, output, **options).train()


@pytest.mark.parametrize(
    "options",
    [{}, {"steps_per_update": 2}, {"halt_loss": "bce"}, {"halt_in_training": "sample"}, {"dropout": 0.1}],
    ids=str,
)
def test_every_parameter_gets_a_gradient(options: dict[str, Any], toy: Path, tmp_path: Path) -> None:
    run = trainer(toy, tmp_path, epochs=1, **options)
    run.train()
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    moments = {names[id(parameter)]: state["exp_avg"] for parameter, state in run.optimizer.state.items()}
    assert moments.keys() == dict(run.model.named_parameters()).keys()
    for name, moment in moments.items():
        assert moment.any(), name  # a mean of gradients, which is zero if all were
    assert run.updates == 8 // options.get("steps_per_update", 1)


def test_it_learns(toy: Path, tmp_path: Path) -> None:
    result = train(toy, tmp_path, epochs=12)
    first, last = result.history[0], result.history[-1]
    assert last["train"]["mse"] < 0.6 * first["train"]["mse"]
    assert last["validation"]["mse"] < 0.8 * first["validation"]["mse"]
    assert last["validation"]["cosine"] > first["validation"]["cosine"]
    assert result.skipped == 0 and not result.stopped_early
    assert [record["epoch"] for record in result.history] == list(range(1, 13))


def test_what_is_saved_is_the_average_and_is_validated(toy: Path, tmp_path: Path) -> None:
    weights: list[list[Tensor]] = []

    def remember(_: int) -> None:
        weights.append([parameter.detach().double() for parameter in run.model.parameters()])

    run = trainer(toy, tmp_path, AtEachBatch(remember), supervision_steps=1, epochs=2)
    average = [parameter.detach().double() for parameter in run.model.parameters()]
    result = run.train()
    assert len(weights) == 8
    for after in weights:
        average = [0.9 * mean + 0.1 * new for mean, new in zip(average, after, strict=True)]
    saved = read_tensors(run.run.checkpoints.last / "trm.safetensors", "")
    for (name, _), expected in zip(run.model.named_parameters(), average, strict=True):
        torch.testing.assert_close(saved[name].double(), expected, rtol=1e-6, atol=1e-7)

    model, compressor, facts = load_phase2(run.run.checkpoints.last)
    batch = run.inputs.held_out.batch(run.inputs.validated)
    state = model.reason(batch.context, batch.mask, max_steps=1, halting="none").state
    error = float((state - batch.target).square().mean())
    assert error == pytest.approx(result.history[-1]["validation"]["mse"], rel=1e-5)
    own = load_compressor(toy / "compressor")
    assert torch.equal(compressor.compress.weight, own.compress.weight)
    assert facts["max_steps"] == 1 and facts["halting"] == "sample" and facts["language_model"] == "toy"


def test_a_run_of_an_older_version_is_resumed_with_the_defaults_of_new_settings(
    toy: Path, tmp_path: Path
) -> None:
    train(toy, tmp_path, epochs=1)
    state = Checkpoints(tmp_path).last / "state.json"
    described = json.loads(state.read_text())
    del described["settings"]["dropout"]
    state.write_text(json.dumps(described))
    (state.parent / MANIFEST_FILE).unlink()
    with pytest.raises(InputError, match=r"dropout was 0.0 and is 0.5"):
        train(toy, tmp_path, epochs=1, resume=True, dropout=0.5)
    assert train(toy, tmp_path, epochs=1, resume=True).history


def test_best_of_a_run_is_loaded(toy: Path, tmp_path: Path) -> None:
    result = train(toy, tmp_path, epochs=3)
    losses = [record["validation"]["mse"] for record in result.history]
    assert load_phase2(tmp_path)[2]["validation"]["mse"] == min(losses)


def test_learning_rate_of_every_update(toy: Path, tmp_path: Path) -> None:
    rates: list[float] = []

    def remember(_: int) -> None:
        rates.append(float(run.optimizer.param_groups[0]["lr"]))

    run = trainer(toy, tmp_path, AtEachBatch(remember), supervision_steps=1, epochs=5, warmup_ratio=0.2)
    run.train()
    warmup = [1e-2 * step / 4 for step in (1, 2, 3, 4)]
    cosine = [1e-2 * 0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert rates == pytest.approx(warmup + cosine, rel=1e-5)


def test_threshold_follows_the_epoch_before(toy: Path, tmp_path: Path) -> None:
    history = train(toy, tmp_path / "a", epochs=3, halt_loss="bce").history
    assert history[0]["threshold"] == pytest.approx(0.7)
    for before, after in pairwise(history):
        assert after["threshold"] == pytest.approx(0.95 * before["train"]["cosine"])
    fixed = train(toy, tmp_path / "b", epochs=2, halt_loss="bce", adaptive_threshold=False).history
    assert fixed[1]["threshold"] == pytest.approx(0.7)


def test_patience(toy: Path, tmp_path: Path) -> None:
    """A learning rate that is far too small for the average to move: no epoch is better than the first."""
    result = train(toy, tmp_path, epochs=9, patience=2, learning_rate=1e-30, weight_decay=0.0)
    assert result.stopped_early
    assert len(result.history) == 3
    again = train(toy, tmp_path, epochs=9, patience=2, learning_rate=1e-30, weight_decay=0.0, resume=True)
    assert again.history == result.history


def test_updates_that_are_not_finite_are_skipped_and_counted(toy: Path, tmp_path: Path) -> None:
    def spoil(batch: int) -> None:
        if batch == 1:
            run.loss.weight = math.inf
            before.extend(parameter.detach().clone() for parameter in run.model.parameters())
        elif batch == 2:
            run.loss.weight = 0.5
            after.extend(parameter.detach().clone() for parameter in run.model.parameters())

    before: list[Tensor] = []
    after: list[Tensor] = []
    run = trainer(toy, tmp_path, AtEachBatch(spoil), epochs=1)
    result = run.train()
    assert result.skipped == 2  # two supervision steps of one batch
    assert all(map(torch.equal, before, after))
    assert result.history[0]["skipped"] == 2
    assert math.isfinite(result.history[0]["train"]["loss"])


def test_an_epoch_without_one_finite_gradient_ends_the_run(toy: Path, tmp_path: Path) -> None:
    run = trainer(toy, tmp_path)
    run.loss.weight = math.inf
    with pytest.raises(InputError, match="no gradient of epoch 1 was finite"):
        run.train()


@pytest.mark.parametrize("leaves", ["sample", "batch"])
def test_confident_samples_leave(leaves: str, toy: Path, tmp_path: Path) -> None:
    run = trainer(toy, tmp_path, halt_in_training=leaves, epochs=1, supervision_steps=4)
    with torch.no_grad():
        run.model.halt_head.bias.fill_(50.0)  # all are confident after one step
    result = run.train()
    assert run.updates == 4  # of 16
    assert result.history[0]["train"]["active"] == 1.0
    assert result.history[0]["validation"]["halt_steps"] == 1.0


def test_a_head_that_is_not_trained_is_not_asked(toy: Path, tmp_path: Path) -> None:
    run = trainer(toy, tmp_path, halt_loss="none", epochs=1)
    before = run.model.halt_head.weight.clone()
    run.train()
    assert torch.equal(run.model.halt_head.weight, before)
    assert load_phase2(tmp_path)[2]["halting"] == "none"


class Stopped(Exception):
    pass


DEMANDING = {
    "epochs": 2,
    "save_every": 3,
    "dropout": 0.1,
    "halt_loss": "bce",
    "halt_in_training": "sample",
    "track": "jsonl",
}


@pytest.fixture(scope="session")
def undisturbed(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    train(toy, output, **DEMANDING)
    return output


@pytest.mark.parametrize("stops", [(3,), (4,), (5, 1), (7,), (3, 1, 3)], ids=str)
def test_a_stopped_run_goes_on_bit_for_bit(
    stops: tuple[int, ...], toy: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """``stops``: batches after which each attempt is stopped; checkpoints are after 3, 4, 7 and 8."""
    for number, batches in enumerate(stops):

        def stop(batch: int, batches: int = batches) -> None:
            if batch == batches:
                raise Stopped

        resume = (tmp_path / "index.json").exists()
        assert resume == (number > 0 and stops[0] > 3)
        with pytest.raises(Stopped):
            trainer(toy, tmp_path, AtEachBatch(stop), resume=resume, **DEMANDING).train()
        torch.rand(7)  # whatever else happens to the generators
    resume = (tmp_path / "index.json").exists()
    train(toy, tmp_path, resume=resume, **DEMANDING)
    assert content_of(tmp_path) == content_of(undisturbed)


def test_a_finished_run_resumes_to_its_end(toy: Path, undisturbed: Path) -> None:
    before = content_of(undisturbed)
    result = train(toy, undisturbed, resume=True, **DEMANDING)
    assert len(result.history) == 2
    assert content_of(undisturbed) == before


def test_other_settings_do_not_resume(toy: Path, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        trainer(toy, undisturbed, resume=True, **{**DEMANDING, "learning_rate": 1e-3, "seed": 1})
    assert "learning_rate was 0.01 and is 0.001; seed was 0 and is 1" in str(caught.value)
    write_pairs(tmp_path / "pairs", seed=1)
    with pytest.raises(InputError, match="data was"):
        trainer(toy, undisturbed, resume=True, **DEMANDING, data=tmp_path / "pairs")


def test_pairs_that_are_held_out_by_name(toy: Path, tmp_path: Path) -> None:
    run = trainer(
        toy, tmp_path / "run", val_data=write_pairs(tmp_path / "held_out", count=10, seed=9), epochs=1
    )
    assert len(run.order.samples) == 40
    assert len(run.inputs.validated) == len(run.inputs.held_out) == 10
    run.train()


def test_blanks_make_no_other_problem() -> None:
    def pairs(*problems: str) -> Any:
        return SimpleNamespace(records=lambda: ({"problem": problem} for problem in problems), samples=3)

    assert shared_problems(pairs("1+1 ", "\t2  + 2", "3"), pairs("1+1", "2 + 2", "33")) == 2


def test_pairs_that_are_trained_on_are_not_held_out(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy / "pairs", tmp_path / "copy")
    # The same, and twenty more.
    write_pairs(tmp_path / "some", count=60)
    for folder, count in (("copy", 40), ("some", 40)):
        with pytest.raises(InputError, match=rf"{count} of its \d+ problems are in .*leave --val-data out"):
            trainer(toy, tmp_path / "run", val_data=tmp_path / folder)
    (tmp_path / "link").symlink_to(toy / "pairs")
    for folder in (toy / "pairs", tmp_path / "link"):
        with pytest.raises(InputError, match="trained on"):
            trainer(toy, tmp_path / "run", val_data=folder)
    assert not (tmp_path / "run").exists()


def test_problems_that_come_twice_are_told(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer(toy, tmp_path / "once")._plan().repeated == 0
    for path in write_pairs(tmp_path / "pairs").glob("*.jsonl"):
        records = [{**json.loads(line), "problem": "1+1"} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_index(tmp_path / "pairs", 2, model="toy", seed=0, settings={})  # the checksums
    plan = trainer(toy, tmp_path / "run", data=tmp_path / "pairs")._plan()
    assert plan.repeated == plan.held_out == 8
    with ConsoleReport() as report:
        report.begin(plan)
    said = " ".join(capsys.readouterr().out.split())
    assert "8 held-out samples are of problems that are also trained on" in said


@pytest.mark.parametrize(("width", "heads"), [(12, 1), (16, 2), (24, 2), (32, 4), (64, 8), (4, 1)])
def test_heads_that_fit(width: int, heads: int, toy: Path, tmp_path: Path) -> None:
    """As many of 8, 4, 2, 1 as divide D' and leave each head 8 dimensions."""
    write_pairs(tmp_path / "pairs", count=12, width=80)
    write_compressor(tmp_path / "compressor", 80, width)
    run = TRMSequenceTrainer(toy_config(tmp_path))
    assert run.model.config.n_heads == heads
