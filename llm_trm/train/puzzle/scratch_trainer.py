"""A trainer for :class:`~llm_trm.models.puzzle.TinyRecursiveModel`, built on the captured training step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trm.models.puzzle.scratch_trm import TinyRecursiveModel
from trm_kernels import ParameterAverage, TrainingStep, capturable_adamw

_CLIP_NORM = 1.0


class TRMTrainer:
    """Trains on batches, with all supervision steps of a batch in one update (AdamW, clipped at norm 1).

    The loss is the original's: cross entropy plus binary cross entropy of the halting probability against
    whether the whole answer is right, both averaged over supervision steps. The second is computed from
    logits, so it has a gradient even where the probability has rounded to 0 or 1. Each supervision step runs
    its backward pass at once, so that only one recursion's graph is alive; the gradients are those of the
    sum. On CUDA an update is replayed as a graph.

    The learning rate of update k, counted from 1, is ``lr`` x min(1, k / ``warmup_steps``). (In the original
    the first update has the full rate, and the k-th the factor of k - 1.) An update whose gradient is not
    finite is skipped with a warning: a model without ``output_norm`` may need fewer supervision steps.

    Args:
        model: Moved to ``device``.
        lr: Learning rate after the warm-up.
        weight_decay: Weight decay of AdamW (betas 0.9 and 0.95).
        warmup_steps: Number of updates of linear warm-up.
        ema_decay: Decay of the moving average of the weights.
        device: By default the model's device.
        ignore_index: Label of cells to ignore.

    Attributes:
        ema_model: A copy of the model with the averaged weights, in evaluation mode and without gradients;
            float32 if the model is bfloat16 or float16. Every update changes it.
        step_count: Number of updates so far, including skipped ones.
    """

    def __init__(
        self,
        model: TinyRecursiveModel,
        lr: float = 1e-4,
        weight_decay: float = 1.0,
        warmup_steps: int = 2000,
        ema_decay: float = 0.999,
        device: torch.device | str | None = None,
        *,
        ignore_index: int = -100,
    ) -> None:
        self.device = model.init_y.device if device is None else torch.device(device)
        self.model = model.to(self.device)
        self.base_lr, self.warmup_steps, self.ema_decay = lr, warmup_steps, ema_decay
        self.step_count = 0
        self.optimizer = capturable_adamw(
            model.parameters(), lr, betas=(0.9, 0.95), weight_decay=weight_decay
        )
        self._average = ParameterAverage(model.parameters(), ema_decay)
        self.ema_model = deepcopy(model).requires_grad_(False).eval()
        for parameter, average in zip(self.ema_model.parameters(), self._average.averages, strict=True):
            parameter.data = average
        self._ignore_index = ignore_index
        self._steps: dict[int, tuple[_StepLoss, TrainingStep]] = {}

    def compute_loss(
        self,
        predictions: Sequence[Tensor],
        halt_probs: Sequence[Tensor],
        targets: Tensor,
        loss_weights: Sequence[float] | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of all supervision steps together; waits for the device once.

        Args:
            predictions: Logits [B, L, V] of each step.
            halt_probs: Halting probabilities [B] of each step.
            targets: Answers, integers [B, L].
            loss_weights: Weight of each step, 1 by default; the weighted sum is divided by their number.

        Returns:
            The loss, a scalar, and ``total_loss``, ``task_loss`` and ``halt_loss``.

        Raises:
            ValueError: Lists of different lengths, or empty ones.
        """
        count = len(predictions)
        weights = [1.0] * count if loss_weights is None else list(loss_weights)
        if not count == len(halt_probs) == len(weights) or count == 0:
            raise ValueError(
                f"expected one prediction, halting probability and weight for each supervision step, got "
                f"{count}, {len(halt_probs)} and {len(weights)}"
            )
        pairs = [
            _losses(logits, _logit(halt_prob), targets.long(), self._ignore_index)
            for logits, halt_prob in zip(predictions, halt_probs, strict=True)
        ]
        task, halt = (
            torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum() / count
            for values in zip(*pairs, strict=True)
        )
        total = task + halt
        values = torch.stack((total, task, halt)).tolist()
        return total, dict(zip(("total_loss", "task_loss", "halt_loss"), values, strict=True))

    def train_step(self, batch: tuple[Tensor, Tensor], num_supervision_steps: int = 16) -> dict[str, float]:
        """Make one update from a batch.

        Args:
            batch: Questions and answers, integers [B, L], on any device.
            num_supervision_steps: Supervision steps, each from the states of the previous one.

        Returns:
            ``total_loss``, ``task_loss`` and ``halt_loss``: means over the supervision steps. ``accuracy``:
            fraction of the cells that are right after the last one. ``lr``: learning rate of this update.
            ``grad_norm``: before clipping. ``skipped``: 1.0 if the gradient was not finite, else 0.0.
        """
        inputs, targets = batch
        self.model.embed(inputs[:0].to(self.device))  # rejects a wrong length before anything changes
        self.model.train()
        if num_supervision_steps not in self._steps:
            self._steps[num_supervision_steps] = self._build(num_supervision_steps)
        loss, step = self._steps[num_supervision_steps]
        rate = self.base_lr * min(1.0, (self.step_count + 1) / max(1, self.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate)
        loss.taken.zero_()
        step.restart()
        step(inputs.long(), targets.long())
        self.step_count += 1
        (window,) = step.drain()
        values = dict(window.values)
        del values["halted"]
        if values["skipped"]:
            warnings.warn(
                "the gradient was not finite and the update was skipped: build the model with "
                "output_norm=True, or train with fewer supervision steps",
                stacklevel=2,
            )
        return {"total_loss": values.pop("loss"), **values, "lr": rate}

    def _build(self, supervision_steps: int) -> tuple[_StepLoss, TrainingStep]:
        model = self.model
        loss = _StepLoss(model, supervision_steps, self._ignore_index).to(self.device)
        step = TrainingStep(
            model.network,
            loss,
            self.optimizer,
            n=model.n_recursions,
            T=model.t_cycles,
            output_norm=model.output_norm,
            embed=lambda inputs, targets: model.embed(inputs),
            initial=model.initial_states,
            clip_norm=_CLIP_NORM,
            average=self._average,
            supervision_steps=supervision_steps,
            skip_nonfinite=True,
            read_every=1,
            modules=[model],
            capture=self.device.type == "cuda",
        )
        return loss, step


class _StepLoss(nn.Module):
    """The loss of one supervision step, as :class:`~trm_kernels.TrainingStep` calls it.

    ``taken`` counts the supervision steps of an update on the device: only the accuracy of the last one is
    reported, while the training step averages every metric over the steps.
    """

    taken: Tensor

    def __init__(self, model: TinyRecursiveModel, supervision_steps: int, ignore_index: int) -> None:
        super().__init__()
        self._halt_logits, self._output_head = model.halt_logits, model.output_head
        self._supervision_steps, self._ignore_index = supervision_steps, ignore_index
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    def forward(
        self, y: Tensor, z: Tensor, inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self._output_head(y)
        task, halt = _losses(logits, self._halt_logits(y), targets, self._ignore_index)
        self.taken += 1
        counted = targets != self._ignore_index
        right = ((logits.argmax(dim=-1) == targets) & counted).sum() / counted.sum().clamp_min(1)
        last = self.taken == self._supervision_steps
        accuracy = torch.where(last, right * self._supervision_steps, 0.0)
        return task + halt, {"task_loss": task, "halt_loss": halt, "accuracy": accuracy}


def _logit(probability: Tensor) -> Tensor:
    """The logit of a probability, finite where that has rounded to 0 or 1; in float32 or wider."""
    wide = probability.to(torch.promote_types(probability.dtype, torch.float32))
    return torch.logit(wide, torch.finfo(wide.dtype).eps)


def _losses(logits: Tensor, halt_logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Cross entropy and halting loss of one supervision step, in float32 or wider."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    task = F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten(), ignore_index=ignore_index)
    right = ((logits.argmax(dim=-1) == targets) | (targets == ignore_index)).all(dim=1)
    # Not F.binary_cross_entropy: there, a NaN probability is a device assertion, which ends the process.
    return task, F.binary_cross_entropy_with_logits(halt_logits.to(wide), right.to(wide))
