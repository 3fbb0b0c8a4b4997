"""Training on puzzles, by the paper's recipe (arXiv 2510.04871; ``pretrain.py`` of the official code)."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from llm_trm.device import resolve_device
from llm_trm.errors import InputError
from llm_trm.evaluate.puzzle import PuzzleScore, score
from llm_trm.files import require_writable
from llm_trm.memory import require_training_memory
from llm_trm.models.puzzle.losses import puzzle_loss
from llm_trm.models.puzzle.paper import PuzzleTRM, PuzzleTRMConfig, load_puzzle_model, save_puzzle_model
from llm_trm.train.puzzle.config import PuzzleConfig
from llm_trm.train.puzzle.feed import Feed
from llm_trm.train.puzzle.inputs import read_inputs
from llm_trm.train.puzzle.progress import PuzzleProgress
from llm_trm.train.puzzle.report import PuzzlePlan, PuzzleResult
from llm_trm.train.run.random_states import random_states, restore_random_states
from llm_trm.train.run.report import Report
from llm_trm.train.run.run import Run
from llm_trm.train.run.schedule import warmup_cosine
from llm_trm.train.run.settings import START_OVER
from llm_trm.train.run.training_state import restore_training, training_tensors, under, write_state
from trm_kernels import (
    JointOptimizer,
    ParameterAverage,
    SparseSignSGD,
    TrainingStep,
    capturable_adam_atan2,
    capturable_adamw,
)
from trm_kernels.metrics import MetricWindow

_BETAS = (0.9, 0.95)


class PuzzleTrainer:
    """Trains a :class:`PuzzleTRM` with samples in flight: when a sample halts, a new puzzle takes its slot.

    Each step is one supervision step of all samples in flight, with its own loss and update; on CUDA it is
    replayed as a graph. At regular intervals the averaged weights are evaluated on some test puzzles, and a
    checkpoint is written from which an interrupted run resumes, on a CPU bit for bit.

    Args:
        config: Settings. Data and an existing run in the output folder are checked here, before anything is
            written.
        report: Follows the run.

    Raises:
        InputError: Anything that the user can correct.
    """

    def __init__(self, config: PuzzleConfig, report: Report | None = None) -> None:
        self.config = config
        self.run = Run(config, report, PuzzleProgress)
        resumed = self.run.resumed
        self.device = resolve_device(config.device)
        self._precision = "bf16" if config.bf16 else "fp32"
        if config.nograd_precision and not _has_fp8(self.device):
            raise InputError(
                "--nograd-precision fp8 needs a GPU of compute capability 9.0 or newer: leave it out"
            )
        self.inputs = read_inputs(config, self.device)
        self.feed = Feed(self.inputs.training, config.batch_size, config.seed, self.inputs.symmetries)
        self.settings = {**config.critical, "precision": self._precision, "data": self.inputs.identity}
        require_writable(config.output)
        if config.track is not None:  # only for the trackers: a run is one process, and needs no accelerate
            self.run.launch(resumed.step if resumed else None)
        self._build()
        self.seconds = 0.0
        if resumed is not None and self.run.checkpoint is not None:
            self._restore(self.run.checkpoint, resumed)

    def train(self) -> PuzzleResult:
        """Train to the end.

        Raises:
            InputError: No gradient since the last evaluation was finite, or another process writes in the
                output folder.
            Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        """
        with self.run.alone():
            return self._train()

    def _train(self) -> PuzzleResult:
        config = self.config
        self.run.start(self._plan())
        self.model.train()
        since = time.perf_counter()
        with self.run.interruption:
            while self.run.step < config.steps:
                self.take_step()
                stop = self.run.stepped(self._take_metrics(self.step.poll()))
                ends = self.run.step % config.eval_every == 0 or self.run.step == config.steps
                if ends or stop or (config.save_every and self.run.step % config.save_every == 0):
                    self._take_metrics(self.step.drain())
                    self.seconds += time.perf_counter() - since
                    self._end(evaluate=ends)
                    since = time.perf_counter()
                if stop:
                    raise self.run.interrupted()
        self.run.finish()
        return PuzzleResult(self.run.checkpoints.best or self.run.checkpoints.last, self.run.history)

    def take_step(self) -> None:
        """One supervision step of the samples in flight, and its update."""
        share = self._share()
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"].fill_(rate * share)
        self.step(*self.feed.batch(self.run.step))
        self.run.step += 1

    def _share(self) -> float:
        """The fraction of the learning rates at this step."""
        config, at = self.config, self.run.step
        if at < config.warmup_steps:
            return (at + 1) / config.warmup_steps
        return 1.0 if config.schedule == "constant" else warmup_cosine(at, config.steps, config.warmup_steps)

    def evaluate(self) -> PuzzleScore | None:
        """The averaged weights on the test puzzles, each for all of its steps; None without puzzles."""
        if not len(self.inputs.held_out):
            return None
        self.model.eval()
        with self.average.applied():
            found = score(
                lambda tokens, puzzles: self.model.predict(tokens, puzzles, halting=False),
                self.inputs.held_out,
                self.config.batch_size,
            )
        self.model.train()
        return found

    def _end(self, *, evaluate: bool) -> None:
        """Write a checkpoint, after an evaluation if it is time for one."""
        if not evaluate:
            self._save(None)
            return
        at = self.run.step
        self.run.require_updates(f"up to step {at}")
        train = self.run.metrics.means()
        found = self.evaluate()
        done = self.run.history[-1] if self.run.history else {"step": 0, "seconds": 0.0}
        taken = self.seconds - done["seconds"]
        train["samples_per_second"] = (at - done["step"]) * self.config.batch_size / taken
        test = None if found is None else asdict(found)
        record = {"step": at, "seconds": self.seconds, "train": train, "test": test}
        self.run.record(record)
        if test is not None:
            self.run.log("test", test, at)
        self._save(found)
        self.run.evaluated(record)

    def _take_metrics(self, windows: Sequence[MetricWindow]) -> Mapping[str, float] | None:
        """Add up and log metrics that have arrived; returns the newest."""
        metrics = None
        for metrics in self.run.metrics.add(windows):
            self.run.log("train", metrics, self.run.step)
        return metrics

    def _save(self, found: PuzzleScore | None) -> None:
        progress = PuzzleProgress(
            step=self.run.step, seconds=self.seconds, **self.run.progress(self.settings)
        )
        info = self.inputs.info
        facts = {
            "task": info.task,
            "rows": info.rows,
            "columns": info.columns,
            "data": str(self.config.data.resolve()),
            "step": self.run.step,
            "test": None if found is None else asdict(found),
            "settings": self.settings,
        }
        loss = None if found is None else 1.0 - found.exact
        with self.run.checkpoints.new(f"step-{self.run.step:08d}", loss) as folder:
            with self.average.applied():
                save_puzzle_model(self.model, folder, **facts)
            write_state(
                folder,
                progress,
                {
                    **training_tensors(self.model, self.optimizer, average=self.average.averages),
                    **{f"carry.{name}": value for name, value in self.step.carry.state_dict().items()},
                    **{f"random.{name}": value for name, value in random_states(self.device).items()},
                },
            )

    def _restore(self, folder: Path, progress: PuzzleProgress) -> None:
        data = progress.settings.get("data")
        if not isinstance(data, dict) or "train" not in data:
            raise InputError(
                f"{self.config.output} was started before checkpoints identified their data, and "
                f"{self.config.data} may contain other puzzles now: {START_OVER}"
            )
        self.config.require_same(progress.settings, self.settings)
        tensors = restore_training(folder, self.model, self.optimizer, average=self.average.averages)
        self.run.step, self.seconds = progress.step, progress.seconds
        carry = self.step.prepare(*self.feed.batch(self.run.step))
        try:
            with torch.no_grad():
                # The model's file holds averaged parameters, but the buffers themselves.
                saved = load_puzzle_model(folder)[0].state_dict()
                for name, buffer in self.model.named_buffers():
                    if name in saved:
                        buffer.copy_(saved[name])
            carry.load_state_dict(under("carry.", tensors))
            restore_random_states(under("random.", tensors), self.device, folder)
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{folder} contains a different model from this run's: {START_OVER}") from error

    def _build(self) -> None:
        config, info = self.config, self.inputs.info
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
            dtype="bfloat16" if config.bf16 else "float32",
        )
        self._require_memory(sizes)
        self.model = PuzzleTRM(sizes).to(self.device)
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
            extra=self.config.batch_size * numbers * item + 4 * (sizes.elements - sizes.parameters),
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

    def _plan(self) -> PuzzlePlan:
        inputs = self.inputs
        return PuzzlePlan(
            steps=self.config.steps,
            start=self.run.step,
            task=inputs.info.task,
            grid=(inputs.info.rows, inputs.info.columns),
            training=len(inputs.training),
            evaluated=len(inputs.held_out),
            repeated=inputs.repeated,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            batch_size=self.config.batch_size,
            device=f"{self.device}, {self._precision}",
        )


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
