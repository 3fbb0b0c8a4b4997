"""Phase 2: a recursion learns to lead from a context to the state after thinking (arXiv 2510.04871)."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_trm.data.pairs import PairFiles, open_pairs
from llm_trm.errors import InputError
from llm_trm.evaluate.held_out import require_held_out
from llm_trm.files import writable_folder, write_json
from llm_trm.memory import require_training_memory
from llm_trm.models.compression import (
    DimensionCompressor,
    compressor_facts,
    load_compressor,
    require_width,
    save_compressor,
)
from llm_trm.models.contexts import Contexts, read_contexts
from llm_trm.models.phase2 import COMPRESSOR_FOLDER
from llm_trm.models.sequence_trm import SequenceTRM, SequenceTRMConfig, save_sequence_trm
from llm_trm.text import words_of
from llm_trm.train.phase2.config import Phase2Config
from llm_trm.train.phase2.losses import SupervisionLoss, means_of
from llm_trm.train.phase2.order import EpochOrder, graph_lengths, split
from llm_trm.train.phase2.progress import Progress
from llm_trm.train.phase2.report import Phase2Plan, Phase2Report, Phase2Result, best_record
from llm_trm.train.phase2.validation import MEASURED, validation_sums
from llm_trm.train.run.checkpoints import Checkpoints
from llm_trm.train.run.random_states import random_states, restore_random_states
from llm_trm.train.run.schedule import warmup_cosine
from llm_trm.train.run.tracking import finish_tracking, new_accelerator, start_tracking
from llm_trm.train.run.training_state import (
    read_progress,
    require_same_settings,
    restore_training,
    training_tensors,
    write_state,
)
from trm_kernels import ParameterAverage, TrainingStep, capturable_adamw
from trm_kernels.metrics import MetricWindow

_CONFIG = "config.json"
#: Share of the epoch's mean cosine similarity that the threshold of the halting loss follows.
_THRESHOLD_SHARE = 0.95
#: Share of the free memory of a GPU that the contexts may take; larger ones stay on the host.
_MEMORY_SHARE = 0.25


class TRMSequenceTrainer:
    """Trains a :class:`SequenceTRM` on compressed contexts and the states that thinking led to.

    A batch gets N_sup supervision steps; each is one deep recursion with its own loss, backward pass and
    update, and hands its detached states to the next. Every epoch ends with a validation of the averaged
    weights on held-out samples and a checkpoint. On CUDA supervision steps are replayed as graphs; with
    several processes (``accelerate launch``) gradients are averaged before they are clipped, so that P
    processes with batches of B do what one does with batches of P x B.

    Args:
        config: Settings; data, compressor and an existing run in the output folder are checked here, before
            anything is written.
        report: Hears how it goes.

    Raises:
        InputError: Anything that the user can put right.
    """

    def __init__(self, config: Phase2Config, report: Phase2Report | None = None) -> None:
        self.config = config
        self.report = report or Phase2Report()
        self.checkpoints = Checkpoints(config.output, config.keep)
        self.checkpoints.permit(resume=config.resume, overwrite=config.overwrite)
        resumed = read_progress(self.checkpoints.last, Progress) if config.resume else None
        compressor, facts = self._load_compressor()
        pairs = self._open(config.data, compressor)
        held_out_pairs = self._open(config.val_data, compressor) if config.val_data else None
        if held_out_pairs is not None:
            require_held_out(held_out_pairs, pairs.settings, pairs, otherwise="leave --val-data out")
        writable_folder(config.output)
        self.accelerator = new_accelerator(
            config.track,
            config.output,
            device=config.device,
            resumed_at=resumed.updates if resumed else None,
        )
        self.device = self.accelerator.device
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.compressor = compressor.to(self.device)
        self._compressor_facts = facts
        self._facts = {
            "language_model": pairs.model,
            "data": str(config.data.resolve()),
            "pairs": pairs.settings,
            "max_steps": config.supervision_steps,
            "halting": "none" if config.halt_loss == "none" else "sample",
        }
        self._read_data(pairs, held_out_pairs)
        self.settings = self._settings()
        self._build()
        self.epoch = self.batch = self.updates = 0
        self.rate = 0.0
        self.sums: dict[str, float] = {}
        self.steps = self.skipped = 0.0
        self.history: list[dict[str, Any]] = []
        if resumed is not None:
            self._restore(resumed)

    def train(self) -> Phase2Result:
        """Train to the end, or until patience is over.

        Raises:
            InputError: No update of an epoch was finite.
        """
        config = self.config
        if self.accelerator.is_main_process:
            if config.overwrite:
                self.checkpoints.clear()
            elif config.resume:
                self.checkpoints.sweep()
            write_json(config.output / _CONFIG, config.record())
            self.report.begin(self._plan())
        start_tracking(self.accelerator, "llm-trm-phase2", config.record())
        while self.epoch < config.epochs and not self._out_of_patience():
            self._train_epoch()
        finish_tracking(self.accelerator)
        return Phase2Result(
            best=self.checkpoints.best,
            history=self.history,
            skipped=round(self.skipped),
            stopped_early=self.epoch < config.epochs,
        )

    def _train_epoch(self) -> None:
        save_every = self.config.save_every
        batches = self.order.batches(self.epoch)
        self.model.train()
        while self.batch < len(batches):
            self.train_batch(batches[self.batch][self.rank :: self.processes])
            self.batch += 1
            metrics = self.take_metrics(self.step.poll())
            if self.accelerator.is_main_process:
                self.report.batch(self.epoch + 1, self.batch, metrics)
            if save_every and self.batch % save_every == 0 and self.batch < len(batches):
                self._settle_metrics()
                self._save(None)
        self._settle_metrics()
        if not self.steps:
            raise InputError(
                f"no gradient of epoch {self.epoch + 1} was finite: choose a lower --learning-rate than "
                f"{self.config.learning_rate:g}, or --precision fp32"
            )
        self._end_epoch(means_of(self.sums, self.steps), self._validate())

    def _end_epoch(self, train: dict[str, float], validation: dict[str, float]) -> None:
        record = {
            "epoch": self.epoch + 1,
            "updates": self.updates,
            "skipped": round(self.skipped) - sum(record["skipped"] for record in self.history),
            "learning_rate": self.rate,
            "threshold": float(self.loss.threshold),
            "train": train,
            "validation": validation,
        }
        self.history.append(record)
        if self.config.adaptive_threshold:
            self.loss.threshold.fill_(_THRESHOLD_SHARE * train["cosine"])
        self.epoch, self.batch, self.sums, self.steps = self.epoch + 1, 0, {}, 0.0
        # Before the checkpoint: a run that goes on from it does not come here again.
        self._track({f"validation/{name}": value for name, value in validation.items()})
        self._save(validation)
        if self.accelerator.is_main_process:
            self.report.epoch(record)

    def train_batch(self, samples: Sequence[int]) -> None:
        """All supervision steps and updates of one batch, given by the numbers of this process's samples."""
        batch = self.contexts.batch(samples, self._bucket)
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
        """Whether no sample of any process is left; waits for the device, as only leaving samples need it."""
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
        """Add up and log metrics that have arrived; gives the newest."""
        metrics = None
        for window in windows:
            self.skipped += window.values["skipped"] * window.steps
            if not all(map(math.isfinite, window.values.values())):
                continue  # its other updates count for nothing, rather than the whole epoch
            for name, value in window.values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value * window.steps
            self.steps += window.steps
            metrics = means_of(window.values, 1)
            named = {f"train/{name}": value for name, value in metrics.items()}
            self._track({**named, "train/learning_rate": self.rate})
        return metrics

    def _settle_metrics(self) -> None:
        """Bring the epoch's sums up to date, and to their mean over processes; waits for the device."""
        self.take_metrics(self.step.drain())
        names = self.step.metrics.names
        own = [self.sums.get(name, 0.0) for name in names]
        *sums, self.steps = self._over_processes([*own, self.steps], "mean")
        self.sums = dict(zip(names, sums, strict=True))

    def _track(self, values: Mapping[str, float]) -> None:
        self.accelerator.log(dict(values), step=self.updates)

    def _validate(self) -> dict[str, float]:
        self.model.eval()
        with self.average.applied(), self._autocast():
            sums = validation_sums(
                self.model,
                self.held_out,
                self.validated[self.rank :: self.processes],
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
        """Write a checkpoint of this moment; all processes must call it."""
        from accelerate.utils import gather_object

        own = {f"random.{self.rank}.{name}": state for name, state in random_states(self.device).items()}
        randoms = dict(entry for process in gather_object([own]) for entry in process.items())
        if self.accelerator.is_main_process:
            progress = Progress(
                epoch=self.epoch,
                batch=self.batch,
                updates=self.updates,
                skipped=self.skipped,
                threshold=float(self.loss.threshold),
                sums=self.sums,
                steps=self.steps,
                history=self.history,
                settings=self.settings,
            )
            facts = {
                **self._facts,
                "epoch": self.epoch,
                "updates": self.updates,
                "validation": validation,
                "settings": self.settings,
            }
            number = self.epoch * len(self.order) + self.batch
            loss = None if validation is None else validation["mse"]
            with self.checkpoints.new(f"batch-{number:08d}", loss) as folder:
                with self.average.applied():
                    save_sequence_trm(self.model, folder, **facts)
                save_compressor(self.compressor, folder / COMPRESSOR_FOLDER, **self._compressor_facts)
                tensors = training_tensors(self.model, self.average, self.optimizer)
                write_state(folder, progress, {**tensors, **randoms})
        self.accelerator.wait_for_everyone()

    def _restore(self, progress: Progress) -> None:
        require_same_settings(self.config.output, progress.settings, self.settings)
        tensors = restore_training(self.checkpoints.last, self.model, self.average, self.optimizer)
        prefix = f"random.{self.rank}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        restore_random_states(own, self.device)
        self.loss.threshold.fill_(progress.threshold)
        self.epoch, self.batch, self.updates = progress.epoch, progress.batch, progress.updates
        self.sums, self.steps = progress.sums, progress.steps
        self.skipped, self.history = progress.skipped, progress.history

    def _heads(self) -> int:
        """Heads of the network; those asked for, if they divide D'."""
        width, heads = self.contexts.width, self.config.n_heads
        if heads is None:
            return next(
                count for count in (8, 4, 2, 1) if width % count == 0 and width // count >= min(width, 8)
            )
        if width % heads:
            raise InputError(
                f"--heads {heads} does not divide the compressor's width {width}: choose a divisor, or leave "
                "it out"
            )
        return heads

    def _build(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        sizes = SequenceTRMConfig(
            self.contexts.width,
            config.n_layers,
            self._heads(),
            config.n_latent_steps,
            config.n_deep_recursions,
            config.dropout,
        )
        require_training_memory(
            sizes.numbers, f"training {sizes.numbers:,} parameters", "choose fewer --layers", self.device
        )
        self.model = SequenceTRM.from_config(sizes).to(self.device)
        if config.halt_loss == "none":
            self.model.halt_head.requires_grad_(False)
        # From here on chance is dropout's, and each process has its own.
        torch.manual_seed(config.seed + 1 + self.rank)
        random.seed(config.seed + 1 + self.rank)
        self.optimizer = capturable_adamw(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            config.learning_rate,
            betas=(0.9, 0.95),
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
        self._autocast_dtype = torch.bfloat16 if self._precision() == "bf16" else None
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
        # Nothing is computed for samples that left: all their positions count as padding.
        return mask if self.loss.leaves == "none" else mask * ~self.loss.left[:, None]

    def _precision(self) -> str:
        if self.config.precision != "auto":
            return self.config.precision
        return "bf16" if self.device.type == "cuda" else "fp32"

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast_dtype)

    def _out_of_patience(self) -> bool:
        if self.config.patience is None or not self.history:
            return False
        return len(self.history) - 1 - best_record(self.history) >= self.config.patience

    def _load_compressor(self) -> tuple[DimensionCompressor, dict[str, Any]]:
        """The compressor, frozen, and what its file says beside kind and sizes."""
        folder = self.config.compressor
        compressor = load_compressor(folder)
        if not isinstance(compressor, DimensionCompressor):
            raise InputError(
                f"{folder} holds a compressor that gathers states: phase 2 needs one that narrows each, from "
                "llm-trm train phase1 --compressor dimension"
            )
        facts = compressor_facts(folder)
        identity = ("kind", "sizes", "weights_sha256")
        return compressor.eval().requires_grad_(False), {
            name: value for name, value in facts.items() if name not in identity
        }

    def _open(self, path: Path, compressor: DimensionCompressor) -> PairFiles:
        pairs = open_pairs(path)
        require_width(compressor, pairs.hidden_size, self.config.compressor, f"the pairs in {path}")
        return pairs

    def _read_data(self, pairs: PairFiles, held_out_pairs: PairFiles | None) -> None:
        config = self.config
        contexts = read_contexts(pairs, self.compressor, self.device)
        if held_out_pairs is None:
            held_out = contexts
            training, self.validated = split(len(contexts), config.val_fraction, config.seed)
            problems = [words_of(str(record["problem"])) for record in pairs.records()]
            learned = {problems[number] for number in training}
            self._repeated = sum(problems[number] in learned for number in self.validated)
        else:
            held_out = read_contexts(held_out_pairs, self.compressor, self.device)
            self._repeated = 0
            training, self.validated = [*range(len(contexts))], [*range(len(held_out))]
            if not self.validated:
                raise InputError(f"{config.val_data} has no samples: name others, or leave --val-data out")
        batch_size = config.batch_size * self.processes
        if len(training) < batch_size:
            raise InputError(
                f"{config.data} has {len(training)} samples to train on beside the held-out ones, and a "
                f"batch takes {batch_size}: choose a --batch-size of at most "
                f"{len(training) // self.processes}, or make more pairs"
            )
        # Recursions on the CPU run on packed rows, which make batches of any lengths free of padding.
        pool = {"pool": 1} if self.device.type == "cpu" else {}
        self.order = EpochOrder(training, contexts.lengths, batch_size, config.seed, **pool)
        self._bucket = graph_lengths(max(contexts.lengths)) if self.device.type == "cuda" else None
        self._digests = {"data": contexts.digest(), "val_data": held_out.digest()}
        self.contexts, self.held_out = self._to_gpu(contexts), self._to_gpu(held_out)

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must share."""
        found = {"n_heads": self._heads(), "precision": self._precision(), "processes": self.processes}
        return {**self.config.critical, **found, **self._digests}

    def _to_gpu(self, contexts: Contexts) -> Contexts:
        """``contexts`` on the GPU, if they take a quarter of its free memory at most."""
        if self.device.type != "cuda":
            return contexts
        free, _ = torch.cuda.mem_get_info(self.device)
        fits = contexts.rows.nbytes + contexts.targets.nbytes <= _MEMORY_SHARE * free
        return contexts.to(self.device) if fits else contexts

    def _plan(self) -> Phase2Plan:
        config = self.config
        return Phase2Plan(
            training=len(self.order.samples),
            held_out=len(self.validated),
            repeated=self._repeated,
            width=self.contexts.width,
            parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            batches=len(self.order),
            updates=config.epochs * len(self.order) * self._calls,
            epochs=config.epochs,
            batch_size=self.order.batch_size,
            start=(self.epoch, self.batch),
            device=f"{self.device}, {self._precision()}"
            + (f", {self.processes} processes" if self.processes > 1 else ""),
        )
