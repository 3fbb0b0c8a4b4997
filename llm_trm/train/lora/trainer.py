"""``transformers.Trainer`` for a language model that recurs at ``<think>``."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm_trm.data.reasoning import IGNORED
from llm_trm.errors import InputError, one_line
from llm_trm.files import read_json
from llm_trm.models.loading import require_own_files
from llm_trm.ranges import AMOUNT, PLACE, Range, require_in
from llm_trm.train.lora.curriculum import StagedOrder
from llm_trm.train.lora.distillation import state_distance, states_at, teacher_states
from llm_trm.train.lora.metrics import sample_measures, summary

_STATE_FILE = "trainer_state.json"
_STATE: dict[str, Range] = {"global_step": PLACE, "max_steps": PLACE, "epoch": AMOUNT}
#: Parameters of a reasoner that phase 2 has trained.
_STARTED = re.compile(r"\.reasoner\.(.*\.)?(trm|compressor)\.")


class LatentTrainer(Trainer):
    """A Trainer with the curriculum's order, distillation, and measures of its own.

    Args:
        order: Of the training samples.
        distill: Weight of the distance to the run with written thinking.
        recursion_rate: Peak of the learning rate of the recursion and its compressor; None for that of all.
        think: Id of ``<think>``.
        **settings: Of a ``Trainer``.
    """

    def __init__(
        self,
        *,
        order: StagedOrder,
        distill: float,
        recursion_rate: float | None,
        think: int,
        **settings: Any,
    ) -> None:
        super().__init__(compute_metrics=_metrics, **settings)
        self._order, self._distill, self._think = order, distill, think
        self._recursion_rate = recursion_rate
        self._noted: dict[str, list[Tensor]] = defaultdict(list)
        # The Trainer turns the cache off in the configuration, and saves it so: generation would crawl.
        ours: Any = self.model
        ours.config.use_cache = True
        self.add_callback(FollowEpochs(order))

    def _get_train_sampler(self, train_dataset: Any = None) -> StagedOrder:
        return self._order

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`Trainer.create_optimizer`."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._recursion_rate is not None:
            ours: Any = self.model
            started = {id(weight) for name, weight in ours.named_parameters() if _STARTED.search(name)}
            _set_rate(optimizer, started, self._recursion_rate)
        return optimizer

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Matrices: no norms, biases, learned tokens, nor embeddings, of which some rows may be trained."""
        rows = tuple(f"{name}.weight" for name, module in model.named_modules() if _has_rows(name, module))
        return [
            name
            for name, parameter in model.named_parameters()
            if name.endswith("weight") and parameter.ndim > 1 and name not in rows
        ]

    def floating_point_ops(self, inputs: Any) -> int:
        """0: an estimate by tokens and parameters, which the Trainer makes, does not hold for a recursion."""
        return 0

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """See :meth:`Trainer.compute_loss`; the loss of the model, and the distance to the teacher."""
        inputs, taught = _apart(inputs)
        distils = self._distill > 0 and model.training and "teacher_ids" in taught
        if distils:
            teacher = teacher_states(
                model,
                self.accelerator.unwrap_model(model),
                taught["teacher_ids"],
                taught["teacher_mask"],
                taught["teacher_at"],
            )
            inputs["output_hidden_states"] = True
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._note("halting_loss", outputs.halting_loss)
        self._note("reconstruction_error", outputs.reconstruction_error)
        if distils:
            rows = taught["taught"]
            student = states_at(outputs.hidden_states, taught["answer_at"][rows], rows)
            distance = state_distance(student, teacher)
            self._note("distill_distance", distance)
            share: Tensor | float = 1.0
            if num_items_in_batch is not None:
                # As the rest of the loss, by the tokens of all accumulated batches of all processes.
                share = (inputs["labels"][:, 1:] != IGNORED).sum() / num_items_in_batch
                if self.args.average_tokens_across_devices:
                    share = share * self.accelerator.num_processes
            loss = loss + self._distill * share * distance
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """Measures of each sample, in place of logits."""
        batch = self._prepare_inputs(inputs)
        fed, _ = _apart(batch)
        with torch.no_grad(), self.compute_loss_context_manager():
            measures = sample_measures(model(**fed, use_cache=False), batch, self._think)
        return None, measures, measures[:, :1]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """See :meth:`Trainer.log`; adds means since the last call of what batches told."""
        if "loss" in logs:
            for name, values in self._noted.items():
                logs[name] = float(torch.stack(values).mean())
            self._noted.clear()
        super().log(logs, *args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        forget_tied(self.model, load_result)
        super()._issue_warnings_after_load(load_result)

    def _note(self, name: str, value: Tensor | None) -> None:
        if value is not None:
            self._noted[name].append(value.detach())


def _set_rate(optimizer: Any, chosen: set[int], rate: float) -> None:
    """Give the parameters with ids ``chosen`` groups of their own, with the learning rate ``rate``."""
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group({**group, "params": own, "lr": rate})


def _has_rows(name: str, module: Any) -> bool:
    return isinstance(module, torch.nn.Embedding) or name.rpartition(".")[2] == "lm_head"


def _apart(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model takes, and the rest."""
    ours = {"answer_at", "teacher_ids", "teacher_mask", "teacher_at", "taught"}
    return (
        {name: value for name, value in inputs.items() if name not in ours},
        {name: value for name, value in inputs.items() if name in ours},
    )


def _metrics(prediction: Any) -> dict[str, float]:
    return summary(prediction.predictions)


class FollowEpochs(TrainerCallback):
    """Tells the order where the training stands; the Trainer reaches it in most set-ups only."""

    def __init__(self, order: StagedOrder) -> None:
        self._order = order

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        updates = max(1, -(-len(train_dataloader) // args.gradient_accumulation_steps))
        self._order.epochs = state.max_steps / updates
        self._order.set_epoch(state.global_step // updates)


def forget_tied(model: Any, load_result: Any) -> None:
    """Take out of what was missing a head that shares the embeddings: it is in no file."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if model.config.tie_word_embeddings and set(load_result.missing_keys) <= tied:
        load_result.missing_keys.clear()


class KeepBest(TrainerCallback):
    """Keeps the last checkpoint and the best few, and ends a run that no longer improves.

    The Trainer's own limit keeps the last ones and a single best. Both are told by the Trainer's history,
    which a resumed run reads again.

    Args:
        keep: Best checkpoints.
        patience: Evaluations without a lower loss; 0 for no end.
        share: Of the updates before which no evaluation counts: until then the task changes.
    """

    def __init__(self, keep: int, patience: int, share: float) -> None:
        self._keep, self._patience, self._share = keep, patience, share
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The Trainer's state has a path, which is another's where the run was moved, and may lead anywhere.
        if state.best_global_step:
            best = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
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
        """Whether the last evaluations of ``history``, of a run of ``steps``, brought nothing better."""
        losses = [loss for step, loss in eval_losses(history).items() if step >= self._share * steps]
        if not self._patience or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self._patience


def eval_losses(history: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Loss on what is held out by the step of its evaluation; NaN counts as infinitely high."""
    return {
        entry["step"]: entry["eval_loss"] if entry["eval_loss"] == entry["eval_loss"] else float("inf")
        for entry in history
        if "eval_loss" in entry
    }


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is of."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, whole or not, by their step."""
    found = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((path for path in found if path.name.rpartition("-")[2].isdigit()), key=step_of)


def take_up_finished(trainer: Any, checkpoint: Path, folder: Path, best: bool) -> bool:
    """Load a run whose last update was made before ``checkpoint`` was written; False if there are more.

    The Trainer itself would make one more update. It alone can load weights that are shared out.

    Args:
        trainer: Which has not begun.
        checkpoint: The run's last.
        folder: Of its checkpoints.
        best: Whether the weights are to be those of the lowest loss, instead of the last.
    """
    state = TrainerState.load_from_json(str(checkpoint / _STATE_FILE))
    if state.global_step < state.max_steps or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    trainer.state = state
    lowest = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    trainer._load_from_checkpoint(str(lowest if best and lowest.is_dir() else checkpoint))
    return True


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """What transformers' Trainer wrote of where a run stood.

    Raises:
        InputError: The file is missing, or a number in it makes no sense.
    """
    path = checkpoint / _STATE_FILE
    remedy = "start over with --overwrite, or delete the checkpoint"
    state = read_json(path, remedy)
    try:
        for name, within in _STATE.items():
            require_in(within, name, state[name])
        for record in state["log_history"]:
            require_in(PLACE, "log_history: step", record["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not say where the run stood ({one_line(error)}): {remedy}") from error
    return dict(state)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest one that was written to its end: the Trainer's state is its last file.

    Raises:
        InputError: A checkpoint's index of weights names files outside it.
    """
    whole = [path for path in checkpoints(folder) if (path / _STATE_FILE).exists()]
    for path in whole:
        require_own_files(path)
    return whole[-1] if whole else None
