"""Phase 2: trains a recursion that predicts the state after thinking from a context (arXiv 2510.04871)."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_trm.files import require_writable
from llm_trm.memory import require_training_memory
from llm_trm.models.compression import save_compressor
from llm_trm.models.phase2 import COMPRESSOR_FOLDER
from llm_trm.models.sequence_trm import SequenceTRM, SequenceTRMConfig, save_sequence_trm
from llm_trm.train.phase2.config import Phase2Config
from llm_trm.train.phase2.inputs import read_inputs
from llm_trm.train.phase2.losses import SupervisionLoss, means_of
from llm_trm.train.phase2.order import EpochOrder, graph_lengths
from llm_trm.train.phase2.progress import Progress
from llm_trm.train.phase2.report import Phase2Plan, Phase2Result, best_record
from llm_trm.train.phase2.validation import MEASURED, validation_sums
from llm_trm.train.run.random_states import random_states, restore_random_states
from llm_trm.train.run.report import Report
from llm_trm.train.run.run import Run
from llm_trm.train.run.schedule import warmup_cosine
from llm_trm.train.run.training_state import restore_training, training_tensors, under, write_state
from trm_kernels import ParameterAverage, TrainingStep, capturable_adamw
from trm_kernels.metrics import MetricWindow

#: The threshold of the halting loss follows this fraction of the epoch's mean cosine similarity.
_THRESHOLD_SHARE = 0.95


class TRMSequenceTrainer:
    """Trains a :class:`SequenceTRM` on compressed contexts and the states that thinking led to.

    A batch gets N_sup supervision steps. Each is one deep recursion with its own loss, backward pass and
    update, and passes its detached states to the next. Every epoch ends with a validation of the averaged
    weights on held-out samples and a checkpoint. On CUDA, supervision steps are replayed as graphs. With
    several processes (``accelerate launch``), gradients are averaged before they are clipped, so that P
    processes with batches of B do the same as one with batches of P x B.

    Args:
        config: Settings. Data, compressor and an existing run in the output folder are checked here, before
            anything is written.
        report: Follows the run.

    Raises:
        InputError: Anything that the user can correct.
    """

    def __init__(self, config: Phase2Config, report: Report | None = None) -> None:
        self.config = config
        self.run = Run(config, report, Progress)
        resumed = self.run.resumed
        self.accelerator = self.run.launch(resumed.updates if resumed else None)
        self.device = self.accelerator.device
        self._precision = "bf16" if config.bf16 else "fp32"
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.inputs = read_inputs(config, self.device, self.processes)
        self.settings = {
            **config.critical,
            "n_heads": self.inputs.heads,
            "precision": self._precision,
            "processes": self.processes,
            **self.inputs.digests,
        }
        # On the CPU, recursions run on packed rows, so that batches of any lengths are free of padding.
        pool = {"pool": 1} if self.device.type == "cpu" else {}
        lengths, batch_size = self.inputs.contexts.lengths, config.batch_size * self.processes
        self.order = EpochOrder(self.inputs.training, lengths, batch_size, config.seed, **pool)
        self._bucket = graph_lengths(max(lengths)) if self.device.type == "cuda" else None
        require_writable(config.output)
        self._build()
        self.epoch = self.batch = self.updates = 0
        self.rate = 0.0
        if resumed is not None and self.run.checkpoint is not None:
            self._restore(self.run.checkpoint, resumed)

    def train(self) -> Phase2Result:
        """Train to the end, or until patience is exhausted.

        Raises:
            InputError: No update of an epoch was finite, or another process writes in the output folder.
            Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        """
        with self.run.alone():
            return self._train()

    def _train(self) -> Phase2Result:
        config = self.config
        self.run.start(self._plan())
        with self.run.interruption:
            while self.epoch < config.epochs and not self._out_of_patience():
                self._train_epoch()
        self.run.finish()
        return Phase2Result(
            best=self.run.checkpoints.best,
            history=self.run.history,
            skipped=round(self.run.metrics.skipped),
            stopped_early=self.epoch < config.epochs,
        )

    def _train_epoch(self) -> None:
        save_every = self.config.save_every
        batches = self.order.batches(self.epoch)
        self.model.train()
        stop = False
        while self.batch < len(batches):
            self.train_batch(batches[self.batch][self.rank :: self.processes])
            self.batch += 1
            self.run.step += 1
            stop = self.run.stepped(self.take_metrics(self.step.poll()))
            due = stop or (save_every is not None and self.batch % save_every == 0)
            if due and self.batch < len(batches):
                self._settle_metrics()
                self._save(None)
                if stop:
                    raise self.run.interrupted()
        self._settle_metrics()
        self.run.require_updates(f"of epoch {self.epoch + 1}")
        self._end_epoch(means_of(self.run.metrics.sums, self.run.metrics.steps), self._validate())
        if stop:
            raise self.run.interrupted()

    def _end_epoch(self, train: dict[str, float], validation: dict[str, float]) -> None:
        history, skipped = self.run.history, round(self.run.metrics.skipped)
        record = {
            "epoch": self.epoch + 1,
            "updates": self.updates,
            "skipped": skipped - sum(record["skipped"] for record in history),
            "learning_rate": self.rate,
            "threshold": float(self.loss.threshold),
            "train": train,
            "validation": validation,
        }
        if self.config.adaptive_threshold:
            self.loss.threshold.fill_(_THRESHOLD_SHARE * train["cosine"])
        self.epoch, self.batch = self.epoch + 1, 0
        self.run.record(record)
        # Before the checkpoint: a run that is resumed from it does not come here again.
        self.run.log("validation", validation, self.updates)
        self._save(validation)
        self.run.evaluated(record)

    def train_batch(self, samples: Sequence[int]) -> None:
        """All supervision steps and updates of one batch: the indices of this process's samples."""
        batch = self.inputs.contexts.batch(samples, self._bucket)
        self.step.restart()
        self.loss.restart()
        first = (self.epoch * len(self.order) + self.batch) * self._calls
        total = self.config.epochs * len(self.order) * self._calls
        warmup = math.ceil(total * self.config.warmup_ratio)
        for call in range(self._calls):
            self.rate = self.config.learning_rate * warmup_cosine(first + call, total, warmup)
            for group in self.optimizer.param_groups:
                group["lr"].fill_(self.rate)
            self.step(*batch)
            self.updates += 1
            if self.loss.leaves != "none" and self._all_left():
                break

    def _all_left(self) -> bool:
        """Whether all samples of all processes have halted; waits for the device."""
        staying = (~self.loss.left).sum()
        return int(self.accelerator.reduce(staying)) == 0

    def _average_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Their mean over processes, in one all-reduce."""
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= self.processes
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, parts, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def take_metrics(self, windows: Sequence[MetricWindow]) -> dict[str, float] | None:
        """Add up and log metrics that have arrived; returns the newest."""
        metrics = None
        for values in self.run.metrics.add(windows):
            metrics = means_of(values, 1)
            self.run.log("train", {**metrics, "learning_rate": self.rate}, self.updates)
        return metrics

    def _settle_metrics(self) -> None:
        """Bring the epoch's sums up to date, and to their mean over processes; waits for the device."""
        self.take_metrics(self.step.drain())
        metrics, names = self.run.metrics, self.step.metrics.names
        own = [metrics.sums.get(name, 0.0) for name in names]
        *sums, metrics.steps = self._over_processes([*own, metrics.steps], "mean")
        metrics.sums = dict(zip(names, sums, strict=True))

    def _validate(self) -> dict[str, float]:
        self.model.eval()
        with self.average.applied(), self._autocast():
            sums = validation_sums(
                self.model,
                self.inputs.held_out,
                self.inputs.validated[self.rank :: self.processes],
                self.config.batch_size,
                self.config.supervision_steps,
            )
        *totals, count = self._over_processes(sums, "sum")
        return {name: total / count for name, total in zip(MEASURED, totals, strict=True)}

    def _over_processes(self, values: Sequence[float], how: str) -> list[float]:
        """The ``"sum"`` or ``"mean"`` of each value over all processes."""
        if self.processes == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.accelerator.reduce(tensor, how).tolist()

    def _save(self, validation: Mapping[str, float] | None) -> None:
        """Write a checkpoint; all processes must call this."""
        from accelerate.utils import gather_object

        own = {f"random.{self.rank}.{name}": state for name, state in random_states(self.device).items()}
        randoms = dict(entry for process in gather_object([own]) for entry in process.items())
        if self.accelerator.is_main_process:
            progress = Progress(
                epoch=self.epoch,
                batch=self.batch,
                updates=self.updates,
                skipped=self.run.metrics.skipped,
                threshold=float(self.loss.threshold),
                **self.run.progress(self.settings),
            )
            facts = {
                **self.inputs.facts,
                "max_steps": self.config.supervision_steps,
                "halting": "none" if self.config.halt_loss == "none" else "sample",
                "epoch": self.epoch,
                "updates": self.updates,
                "validation": validation,
                "settings": self.settings,
            }
            number = self.epoch * len(self.order) + self.batch
            loss = None if validation is None else validation["mse"]
            with self.run.checkpoints.new(f"batch-{number:08d}", loss) as folder:
                with self.average.applied():
                    save_sequence_trm(self.model, folder, **facts)
                save_compressor(
                    self.inputs.compressor, folder / COMPRESSOR_FOLDER, **self.inputs.compressor_facts
                )
                tensors = training_tensors(self.model, self.optimizer, average=self.average.averages)
                write_state(folder, progress, {**tensors, **randoms})
        self.accelerator.wait_for_everyone()

    def _restore(self, folder: Path, progress: Progress) -> None:
        self.config.require_same(progress.settings, self.settings)
        tensors = restore_training(folder, self.model, self.optimizer, average=self.average.averages)
        restore_random_states(under(f"random.{self.rank}.", tensors), self.device, folder)
        self.loss.threshold.fill_(progress.threshold)
        self.epoch, self.batch, self.updates = progress.epoch, progress.batch, progress.updates
        self.run.step = self.epoch * len(self.order) + self.batch
        self.run.metrics.skipped = progress.skipped

    def _build(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        sizes = SequenceTRMConfig(
            self.inputs.contexts.width,
            config.n_layers,
            self.inputs.heads,
            config.n_latent_steps,
            config.n_deep_recursions,
            config.dropout,
        )
        require_training_memory(
            sizes.parameters,
            f"training {sizes.parameters:,} parameters",
            "choose fewer --layers",
            self.device,
        )
        self.model = SequenceTRM.from_config(sizes).to(self.device)
        if config.halt_loss == "none":
            self.model.halt_head.requires_grad_(False)
        # From here on, random numbers are for dropout, and differ between processes.
        torch.manual_seed(config.seed + 1 + self.rank)
        random.seed(config.seed + 1 + self.rank)
        self.optimizer = capturable_adamw(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.average = ParameterAverage(self.model.parameters(), config.ema_decay)
        self.loss = SupervisionLoss(
            self.model.halt_logits,
            config.batch_size,
            halt=config.halt_loss,
            weight=config.halt_weight,
            threshold=config.halt_threshold,
            leaves=config.halt_in_training,
        ).to(self.device)
        self._calls = config.supervision_steps // config.steps_per_update
        self._autocast_dtype = torch.bfloat16 if config.bf16 else None
        self.step = TrainingStep(
            self.model.net,
            self.loss,
            self.optimizer,
            n=config.n_latent_steps,
            T=config.n_deep_recursions,
            output_norm=self.model.output_norm,
            embed=lambda context, mask, target: self.model.embed(context),
            mask=self._mask,
            clip_norm=config.clip_norm,
            reduce=self._average_gradients if self.processes > 1 else None,
            average=self.average,
            autocast_dtype=self._autocast_dtype,
            supervision_steps=config.steps_per_update,
            skip_nonfinite=True,
            read_every=config.log_every * self._calls,
            modules=[self.model],
            capture=self.device.type == "cuda",
        )

    def _mask(self, context: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        mask = self.model.extend_mask(mask)
        # Nothing is computed for samples that have halted: all their positions count as padding.
        return mask if self.loss.leaves == "none" else mask * ~self.loss.left[:, None]

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast_dtype)

    def _out_of_patience(self) -> bool:
        history = self.run.history
        if self.config.patience is None or not history:
            return False
        return len(history) - 1 - best_record(history) >= self.config.patience

    def _plan(self) -> Phase2Plan:
        config, batches = self.config, len(self.order)
        return Phase2Plan(
            steps=config.epochs * batches,
            start=self.run.step,
            training=len(self.inputs.training),
            held_out=len(self.inputs.validated),
            repeated=self.inputs.repeated,
            width=self.inputs.contexts.width,
            parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            batches=batches,
            updates=config.epochs * batches * self._calls,
            epochs=config.epochs,
            batch_size=self.order.batch_size,
            device=f"{self.device}, {self._precision}"
            + (f", {self.processes} processes" if self.processes > 1 else ""),
        )
