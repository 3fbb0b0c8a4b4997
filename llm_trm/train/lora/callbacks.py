"""Callbacks of training with LoRA: which checkpoints are kept, and what they record."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llm_trm.data.lessons import prompts_fingerprint
from llm_trm.models.causal.card import About, inner, write_about
from llm_trm.train.lora.config import LoraTrainingConfig
from llm_trm.train.lora.curriculum import StagedOrder
from llm_trm.train.lora.model import Trainee
from llm_trm.train.run.trainer_checkpoints import checkpoint_of, checkpoints, step_of


class WriteFacts(TrainerCallback):
    """Adds to checkpoints what ``load_latent_model`` needs in addition to weights."""

    def __init__(self, config: LoraTrainingConfig, trainee: Trainee) -> None:
        self._config, self._trainee = config, trainee

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = checkpoint_of(Path(args.output_dir), state.global_step)
        if state.is_world_process_zero and folder.is_dir():
            config, trainee = self._config, self._trainee
            known = About(
                config.model,
                trainee.form,
                {"training": config.record()},
                prompts=prompts_fingerprint(trainee.tokenizer, trainee.form),
            )
            inner(trainee.model).about = known
            write_about(trainee.model, folder)
            trainee.tokenizer.save_pretrained(folder)


class FollowEpochs(TrainerCallback):
    """Passes the epoch to the order of the samples, which the Trainer does only in most set-ups."""

    def __init__(self, order: StagedOrder) -> None:
        self._order = order

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        updates = max(1, -(-len(train_dataloader) // args.gradient_accumulation_steps))
        self._order.epochs = state.max_steps / updates
        self._order.set_epoch(state.global_step // updates)


class KeepBest(TrainerCallback):
    """Keeps the best checkpoints and the last, and ends a run that no longer improves.

    The Trainer's own limit keeps the last ones and a single best. The decisions follow from the Trainer's
    history, which a resumed run reads again.

    Args:
        keep: Number of best checkpoints.
        patience: Evaluations without a lower loss; 0 for no end.
        share: Fraction of the updates before which no evaluation counts, since the task still changes.

    Attributes:
        stopped: Whether patience ended the run.
    """

    def __init__(self, keep: int, patience: int, share: float) -> None:
        self._keep, self._patience, self._share = keep, patience, share
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The path in the Trainer's state is wrong if the run was moved, and may lead anywhere.
        if state.best_global_step:
            best = checkpoint_of(Path(args.output_dir), state.best_global_step)
            state.best_model_checkpoint = str(best) if best.is_dir() else None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.exhausted(state.log_history, state.max_steps):
            self.stopped = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        losses = eval_losses(state.log_history)
        best = sorted(losses, key=lambda step: losses[step])[: self._keep]
        for path in checkpoints(Path(args.output_dir)):
            if step_of(path) not in (*best, state.global_step):
                shutil.rmtree(path, ignore_errors=True)

    def exhausted(self, history: Sequence[Mapping[str, Any]], steps: int) -> bool:
        """Whether the last evaluations in the history of a run of ``steps`` brought no lower loss."""
        losses = [loss for step, loss in eval_losses(history).items() if step >= self._share * steps]
        if not self._patience or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self._patience


def eval_losses(history: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """The held-out loss by the step of its evaluation; NaN counts as infinitely high."""
    return {
        entry["step"]: math.inf if math.isnan(entry["eval_loss"]) else entry["eval_loss"]
        for entry in history
        if "eval_loss" in entry
    }
