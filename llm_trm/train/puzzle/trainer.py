"""Training on puzzles, by the paper's recipe (arXiv 2510.04871; ``pretrain.py`` of the official code)."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from llm_trm.data.puzzles.augment import augmentation
from llm_trm.data.puzzles.dataset import read_info, read_split, repeated
from llm_trm.device import resolve_device
from llm_trm.errors import InputError
from llm_trm.evaluate.puzzle import PuzzleScore, draw_puzzles, score, with_answers
from llm_trm.files import writable_folder, write_json
from llm_trm.memory import require_training_memory
from llm_trm.models.puzzle.losses import puzzle_loss
from llm_trm.models.puzzle.paper import PuzzleTRM, PuzzleTRMConfig, load_puzzle_model, save_puzzle_model
from llm_trm.train.puzzle.config import PuzzleConfig
from llm_trm.train.puzzle.feed import Feed
from llm_trm.train.puzzle.progress import PuzzleProgress
from llm_trm.train.puzzle.report import PuzzlePlan, PuzzleReport, PuzzleResult
from llm_trm.train.run.checkpoints import Checkpoints
from llm_trm.train.run.random_states import random_states, restore_random_states
from llm_trm.train.run.schedule import warmup_cosine
from llm_trm.train.run.training_state import (
    read_progress,
    require_same_settings,
    restore_training,
    training_tensors,
    write_state,
)
from trm_kernels import (
    JointOptimizer,
    ParameterAverage,
    SparseSignSGD,
    TrainingStep,
    capturable_adam_atan2,
    capturable_adamw,
)
from trm_kernels.metrics import MetricWindow

if TYPE_CHECKING:
    from accelerate import Accelerator

_CONFIG = "config.json"
_BETAS = (0.9, 0.95)


class PuzzleTrainer:
    """Trains a :class:`PuzzleTRM` with samples in flight: whoever halts makes room for a new puzzle.

    Each step is one supervision step of all samples in flight, with its own loss and update; on CUDA it is
    replayed as a graph. Every few steps the averaged weights are evaluated on some test puzzles, and a
    checkpoint is written from which a killed run goes on, on a CPU bit for bit.

    Args:
        config: Settings; data and an existing run in the output folder are checked here, before anything is
            written.
        report: Hears how it goes.

    Raises:
        InputError: Anything that the user can put right.
    """

    def __init__(self, config: PuzzleConfig, report: PuzzleReport | None = None) -> None:
        self.config = config
        self.report = report or PuzzleReport()
        self.checkpoints = Checkpoints(config.output, config.keep)
        self.checkpoints.permit(resume=config.resume, overwrite=config.overwrite)
        resumed = read_progress(self.checkpoints.last, PuzzleProgress) if config.resume else None
        self.device = resolve_device(config.device)
        if config.nograd_precision and not _has_fp8(self.device):
            raise InputError(
                "--nograd-precision fp8 needs a GPU of compute capability 9.0 or newer: leave it out"
            )
        self.info = read_info(config.data)
        self._read_data()
        self.settings = {**config.critical, "precision": self._precision(), "data": self._identity()}
        writable_folder(config.output)
        self.accelerator = self._accelerator(resumed.step if resumed else None)
        self._build()
        self.at, self.seconds = 0, 0.0
        self.sums: dict[str, float] = {}
        self.steps = 0.0
        self.history: list[dict[str, Any]] = []
        if resumed is not None:
            self._restore(resumed)

    def train(self) -> PuzzleResult:
        """Train to the end.

        Raises:
            InputError: No gradient since the last evaluation was finite.
        """
        config = self.config
        if config.overwrite:
            self.checkpoints.clear()
        elif config.resume:
            self.checkpoints.sweep()
        write_json(config.output / _CONFIG, config.record())
        if self.accelerator is not None:
            from llm_trm.train.run.tracking import start_tracking

            start_tracking(self.accelerator, "llm-trm-puzzle", config.record())
        self.report.begin(self._plan())
        self.model.train()
        since = time.perf_counter()
        while self.at < config.steps:
            self.take_step()
            metrics = self._take_metrics(self.step.poll())
            self.report.step(self.at, metrics)
            ends = self.at % config.eval_every == 0 or self.at == config.steps
            if ends or (config.save_every and self.at % config.save_every == 0):
                self._take_metrics(self.step.drain())
                self.seconds += time.perf_counter() - since
                self._end(evaluate=ends)
                since = time.perf_counter()
        if self.accelerator is not None:
            from llm_trm.train.run.tracking import finish_tracking

            finish_tracking(self.accelerator)
        return PuzzleResult(self.checkpoints.best or self.checkpoints.last, self.history)

    def take_step(self) -> None:
        """One supervision step of the samples in flight, and its update."""
        share = self._share()
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"].fill_(rate * share)
        self.step(*self.feed.batch(self.at))
        self.at += 1

    def _share(self) -> float:
        """Of the learning rates, at this step."""
        config = self.config
        if self.at < config.warmup_steps:
            return (self.at + 1) / config.warmup_steps
        return (
            1.0
            if config.schedule == "constant"
            else warmup_cosine(self.at, config.steps, config.warmup_steps)
        )

    def evaluate(self) -> PuzzleScore | None:
        """The averaged weights on the test puzzles, each for all of its steps; None without puzzles."""
        if not len(self.held_out):
            return None
        self.model.eval()
        with self.average.applied():
            found = score(
                lambda tokens, puzzles: self.model.predict(tokens, puzzles, halting=False),
                self.held_out,
                self.config.batch_size,
            )
        self.model.train()
        return found

    def _end(self, *, evaluate: bool) -> None:
        """Write a checkpoint, behind an evaluation perhaps."""
        found = None
        if evaluate:
            if not self.steps:
                raise InputError(
                    f"no gradient was finite up to step {self.at}: choose a lower --learning-rate than "
                    f"{self.config.learning_rate:g}, or --precision fp32"
                )
            train = {name: value / self.steps for name, value in self.sums.items()}
            found = self.evaluate()
            done = self.history[-1] if self.history else {"step": 0, "seconds": 0.0}
            taken = self.seconds - done["seconds"]
            train["samples_per_second"] = (self.at - done["step"]) * self.config.batch_size / taken
            record = {
                "step": self.at,
                "seconds": self.seconds,
                "train": train,
                "test": None if found is None else asdict(found),
            }
            self.history.append(record)
            self.sums, self.steps = {}, 0.0
            if found is not None:
                self._track({f"test/{name}": value for name, value in asdict(found).items()})
        self._save(found)
        if evaluate:
            self.report.evaluated(record)

    def _take_metrics(self, windows: Sequence[MetricWindow]) -> dict[str, float] | None:
        """Add up and log metrics that have arrived; gives the newest."""
        metrics = None
        for window in windows:
            if not all(map(math.isfinite, window.values.values())):
                continue  # its updates were skipped: they count for nothing
            for name, value in window.values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value * window.steps
            self.steps += window.steps
            metrics = window.values
            self._track({f"train/{name}": value for name, value in metrics.items()})
        return metrics

    def _track(self, values: Mapping[str, float]) -> None:
        if self.accelerator is not None:
            self.accelerator.log(dict(values), step=self.at)

    def _save(self, found: PuzzleScore | None) -> None:
        progress = PuzzleProgress(
            step=self.at,
            seconds=self.seconds,
            sums=self.sums,
            steps=self.steps,
            history=self.history,
            settings=self.settings,
        )
        facts = {
            **self._facts,
            "step": self.at,
            "test": None if found is None else asdict(found),
            "settings": self.settings,
        }
        with self.checkpoints.new(
            f"step-{self.at:08d}", None if found is None else 1.0 - found.exact
        ) as folder:
            with self.average.applied():
                save_puzzle_model(self.model, folder, **facts)
            write_state(
                folder,
                progress,
                {
                    **training_tensors(self.model, self.average, self.optimizer),
                    **{f"carry.{name}": value for name, value in self.step.carry.state_dict().items()},
                    **{f"random.{name}": value for name, value in random_states(self.device).items()},
                },
            )

    def _restore(self, progress: PuzzleProgress) -> None:
        if "train" not in progress.settings.get("data", {}):
            raise InputError(
                f"{self.config.output} was begun before checkpoints said what is in their data, and "
                f"{self.config.data} may hold other puzzles now: start over with --overwrite"
            )
        require_same_settings(self.config.output, progress.settings, self.settings)
        folder = self.checkpoints.last
        tensors = restore_training(folder, self.model, self.average, self.optimizer)

        def under(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
            }

        self.at, self.seconds = progress.step, progress.seconds
        self.sums, self.steps, self.history = progress.sums, progress.steps, progress.history
        carry = self.step.prepare(*self.feed.batch(self.at))
        try:
            with torch.no_grad():
                # The model's file holds averaged parameters, but the buffers themselves.
                saved = load_puzzle_model(folder)[0].state_dict()
                for name, buffer in self.model.named_buffers():
                    if name in saved:
                        buffer.copy_(saved[name])
            carry.load_state_dict(under("carry."))
            restore_random_states(under("random."), self.device)
        except (KeyError, RuntimeError) as error:
            raise InputError(
                f"{folder} holds another model than this run's: start over with --overwrite"
            ) from error

    def _read_data(self) -> None:
        config, data = self.config, self.config.data
        training, test = read_split(data, "train"), with_answers(read_split(data, "test"))
        if not len(training):
            raise InputError(
                f"{data} has no training puzzles: make some with `llm-trm data {self.info.task}`"
            )
        self._digests = {"train": training.digest(), "test": test.digest()}
        # `llm-trm data arc` sees to it that no test of ARC is learned; a question may come twice there.
        self._repeated = 0 if self.info.task == "arc" else repeated(test, training)
        # Not the first ones: those of ARC are the copies of one task. The same for every seed.
        held_out = draw_puzzles(test, config.eval_samples, seed=0)
        self.held_out = held_out.to(self.device)
        symmetries = augmentation(self.info) if config.augment else None
        self.feed = Feed(training.to(self.device), config.batch_size, config.seed, symmetries)

    def _identity(self) -> dict[str, Any]:
        """What a resumed run's data must share with the run's."""
        return {"task": self.info.task, "puzzles": len(self.feed.split), **self._digests}

    def _build(self) -> None:
        config, info = self.config, self.info
        torch.manual_seed(config.seed)
        sizes = PuzzleTRMConfig(
            vocab_size=info.vocab_size,
            seq_len=info.seq_len,
            num_puzzles=info.num_puzzles,
            d_model=config.d_model,
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            mixer=config.mixer,
            positions=config.positions,
            puzzle_len=config.puzzle_len,
            puzzle_dim=config.puzzle_dim,
            n_latent_steps=config.n_latent_steps,
            n_deep_recursions=config.n_deep_recursions,
            max_steps=config.max_steps,
            dtype="bfloat16" if self._precision() == "bf16" else "float32",
        )
        self._require_memory(sizes)
        self.model = PuzzleTRM(sizes).to(self.device)
        self._facts = {
            "task": info.task,
            "rows": info.rows,
            "columns": info.columns,
            "data": str(config.data.resolve()),
        }
        random.seed(config.seed + 1)
        torch.manual_seed(config.seed + 1)
        self.optimizer = self._optimizer()
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.average = ParameterAverage(self.model.parameters(), config.ema_decay)
        self.step = TrainingStep(
            self.model.net,
            self._loss,
            self.optimizer,
            n=config.n_latent_steps,
            T=config.n_deep_recursions,
            embed=lambda inputs, labels, puzzles: self.model.embed(inputs, puzzles),
            initial=self.model.initial,
            clip_norm=config.clip_norm,
            average=self.average,
            max_steps=config.max_steps,
            exploration=config.exploration if config.max_steps > 1 else 0.0,
            skip_nonfinite=True,
            read_every=config.log_every,
            modules=[self.model],
            capture=self.device.type == "cuda",
            precision="fp8-nograd" if config.nograd_precision == "fp8" else None,
        )

    def _require_memory(self, sizes: PuzzleTRMConfig) -> None:
        """Raise InputError if the model and the samples in flight surely do not fit."""
        item = getattr(torch, sizes.dtype).itemsize
        # x, y and z of each sample, and a logit of each token.
        numbers = sizes.length * sizes.d_model * 3 + sizes.seq_len * sizes.vocab_size
        require_training_memory(
            sizes.parameters,
            f"training {sizes.parameters:,} parameters on {self.config.batch_size:,} samples at once",
            "choose a lower --d-model, --layers or --batch-size",
            self.device,
            besides=self.config.batch_size * numbers * item + 4 * (sizes.numbers - sizes.parameters),
        )

    def _optimizer(self) -> Optimizer:
        """One optimizer for the parameters, and sign-SGD for the puzzle embeddings if there are any."""
        config = self.config
        build = capturable_adamw if config.optimizer == "adamw" else capturable_adam_atan2
        main = build(
            self.model.parameters(), config.learning_rate, betas=_BETAS, weight_decay=config.weight_decay
        )
        if not config.puzzle_dim:
            return main
        self.model.puzzle_emb.allocate(config.batch_size)
        rows = SparseSignSGD(
            [self.model.puzzle_emb],
            torch.tensor(config.puzzle_learning_rate, device=self.device),
            weight_decay=config.puzzle_weight_decay,
            capturable=self.device.type == "cuda",
        )
        return JointOptimizer([main, rows])

    def _loss(
        self, y: Tensor, z: Tensor, inputs: Tensor, labels: Tensor, puzzles: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        return puzzle_loss(*self.model.heads(y), labels, self.config.cell_loss)

    def _precision(self) -> str:
        if self.config.precision != "auto":
            return self.config.precision
        return "bf16" if self.device.type == "cuda" else "fp32"

    def _accelerator(self, resumed_at: int | None) -> Accelerator | None:
        """Only for its trackers: a run is one process."""
        if self.config.track is None:
            return None
        from llm_trm.train.run.tracking import new_accelerator

        return new_accelerator(
            self.config.track, self.config.output, device=self.device.type, resumed_at=resumed_at
        )

    def _plan(self) -> PuzzlePlan:
        return PuzzlePlan(
            task=self.info.task,
            grid=(self.info.rows, self.info.columns),
            training=len(self.feed.split),
            evaluated=len(self.held_out),
            repeated=self._repeated,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            steps=self.config.steps,
            batch_size=self.config.batch_size,
            start=self.at,
            device=f"{self.device}, {self._precision()}",
        )


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
