"""Fits a compressor to hidden states in files, in one process or several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_trm.errors import InputError
from llm_trm.train.phase1.pca import Moments, PrincipalComponents, principal_components
from llm_trm.train.phase1.reconstruction import Batch, Quality, Reconstruction, quality
from llm_trm.train.phase1.report import Progress
from llm_trm.train.phase1.states import StateFiles, padded
from llm_trm.train.phase1.unfinished import FitProgress, Unfinished
from llm_trm.train.run.interruption import Interruption
from llm_trm.train.run.schedule import warmup_cosine

if TYPE_CHECKING:
    from accelerate import Accelerator

_WARM_UP = 0.1
#: Relative decrease of the validation error that counts as an improvement.
_LEAST_GAIN = 1e-4
#: Steps between readings of the loss, which wait for the device.
_READ_EVERY = 20
_EVAL_ROWS, _EVAL_SEQUENCES = 8192, 32


@dataclass
class Material:
    """The hidden states of one stage: to train on, with their moments, and to validate on."""

    training: StateFiles
    validation: StateFiles
    moments: Moments

    @cached_property
    def components(self) -> PrincipalComponents:
        """Principal components of the training states."""
        return principal_components(self.moments.second)


@dataclass(frozen=True)
class Fit:
    """How to optimise.

    Attributes:
        sequences: Whether batches contain padded sequences (latent compressors) or single states.
        batch_size: Sequences or states per optimizer step, over all processes.
        learning_rate: Peak learning rate: warm-up over a tenth of the steps, then cosine decay to 0.
        weight_decay: Weight decay of AdamW.
        epochs: Maximum number of passes over the states.
        patience: Epochs without a lower validation error after which training stops.
        seed: Seed of the order.
    """

    sequences: bool
    batch_size: int
    learning_rate: float
    weight_decay: float
    epochs: int
    patience: int
    seed: int


def every_batch(files: StateFiles, sequences: bool, device: torch.device) -> Iterator[Batch]:
    """All states, in order, as float32 batches on ``device``: padded sequences, or single states."""
    if not sequences:
        for rows in files.batches(_EVAL_ROWS):
            yield rows.to(device).float(), None
        return
    for number in range(len(files.shards)):
        shard = files.shard(number)
        for start in range(0, len(shard), _EVAL_SEQUENCES):
            states, mask = padded(shard[start : start + _EVAL_SEQUENCES])
            yield states.to(device).float(), mask.to(device)


def fit(
    module: Reconstruction,
    material: Material,
    settings: Fit,
    accelerator: Accelerator,
    progress: Progress,
    what: str,
    *,
    first_step: int,
    unfinished: Unfinished,
    interruption: Interruption,
) -> tuple[int, int]:
    """Minimise the squared error of ``module``, over the states' mean square, and keep the best weights.

    Every process draws the same batches and takes its part of each, and gradients are averaged so that each
    state counts once: the result does not depend on the number of processes, apart from rounding.

    Args:
        module: Trained in place; ends in eval mode, on the accelerator's device, with the weights of the best
            validation error, which may be those that it came with.
        what: Name of the run, for progress and trackers.
        first_step: First step of the trackers.
        unfinished: Where an interrupted optimisation is kept, and continues from.
        interruption: Asks to stop.

    Returns:
        The epochs that the best weights took, and the steps that were made.

    Raises:
        InputError: Fewer states or sequences in a batch than processes.
        Interrupted: The state is in ``unfinished``.
    """
    files, device = material.training, accelerator.device
    count = files.sequences if settings.sequences else files.rows
    if min(count, settings.batch_size) < accelerator.num_processes:
        raise InputError(
            f"batches of {min(count, settings.batch_size)} cannot be shared by {accelerator.num_processes} "
            "processes: use fewer processes, or a larger --batch-size and more --num-tokens"
        )
    per_epoch = max(1, count // settings.batch_size)
    total = per_epoch * settings.epochs
    warm_up = max(1, round(_WARM_UP * total))
    optimizer = torch.optim.AdamW(
        module.parameters(), settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    wrapped, stepper = accelerator.prepare(module, optimizer)
    weights = _copied(module)
    if (standing := unfinished.read(module, weights, optimizer)) is not None:
        best, now = Quality(**standing.best), Quality(**standing.now)
        best_epoch, stale, steps = standing.best_epoch, standing.stale, standing.steps
        progress.say(f"{what}: continuing after step {steps}")
    else:
        best = now = quality(module, every_batch(material.validation, settings.sequences, device))
        best_epoch, stale, steps = 0, 0, 0
    # accelerate averages gradients over the processes: each loss is over the mean share of a batch.
    scale = material.moments.power * files.width / accelerator.num_processes
    for epoch in range(steps // per_epoch, settings.epochs):
        module.train()
        recent: list[Tensor] = []
        shares = _shares(files, settings, epoch, accelerator)
        for (states, mask), rows in islice(shares, steps - epoch * per_epoch, None):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * warmup_cosine(steps, total, warm_up)
            error = wrapped(states, mask) - states
            loss = (error if mask is None else error[mask]).square().sum() / (rows * scale)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            stepper.step()
            stepper.zero_grad()
            steps += 1
            recent.append(loss.detach())
            if steps % _READ_EVERY == 0 or steps % per_epoch == 0:
                seen = float(torch.stack(recent).mean())
                recent.clear()
                progress.training(what, steps, total, seen, now.cosine_similarity)
                accelerator.log({f"{what}/loss": seen}, first_step + steps)
            if interruption.wanted(steps, accelerator) and steps < (epoch + 1) * per_epoch:
                break
        if steps == (epoch + 1) * per_epoch:
            module.eval()
            now = _agreed(quality(module, every_batch(material.validation, settings.sequences, device)))
            values = {f"{what}/held-out {name}": value for name, value in asdict(now).items()}
            accelerator.log(values, first_step + steps)
            stale = 0 if now.mse < best.mse * (1 - _LEAST_GAIN) else stale + 1
            if now.mse < best.mse:
                best, best_epoch = now, epoch + 1
                weights = _copied(module)
            if stale >= settings.patience:
                progress.say(f"{what}: no improvement for {stale} epochs, stopped after epoch {epoch + 1}")
                break
        if interruption.agreed:
            if accelerator.is_main_process:
                standing = FitProgress(
                    steps, best_epoch, stale, asdict(best), asdict(now), unfinished.settings
                )
                unfinished.write(standing, module, weights, optimizer)
            accelerator.wait_for_everyone()
            raise interruption.stop(steps)
    if accelerator.is_main_process:
        unfinished.remove()
    accelerator.free_memory()
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            parameter.copy_(weight)
    module.eval()
    return best_epoch, steps


def _shares(
    files: StateFiles, settings: Fit, epoch: int, accelerator: Accelerator
) -> Iterator[tuple[Batch, int]]:
    """This process's part of every batch of an epoch, and the number of states in the whole batch."""
    generator = torch.Generator().manual_seed((settings.seed * 100_003 + epoch) % 2**64)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    device = accelerator.device
    if settings.sequences:
        for sequences in files.shuffled_sequences(settings.batch_size, generator):
            states, mask = padded(sequences[mine])
            yield (states.to(device).float(), mask.to(device)), sum(map(len, sequences))
    else:
        for rows in files.shuffled_rows(settings.batch_size, generator):
            yield (rows[mine].to(device).float(), None), len(rows)


def _agreed(found: Quality) -> Quality:
    """The main process's measurement: processes that decided for themselves could deadlock."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([found])[0]


def _copied(module: torch.nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]
