"""``transformers.Trainer`` for a language model that recurs at ``<think>``."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llm_trm.data.reasoning import IGNORED
from llm_trm.train.lora.callbacks import FollowEpochs
from llm_trm.train.lora.curriculum import StagedOrder
from llm_trm.train.lora.distillation import state_distance, states_at, teacher_states
from llm_trm.train.lora.metrics import sample_measures, summary
from llm_trm.train.run.trainer_checkpoints import StrictTrainer

#: Parameters of a reasoner that phase 2 has trained.
_STARTED = re.compile(r"\.reasoner\.(.*\.)?(trm|compressor)\.")


class LatentTrainer(StrictTrainer):
    """A Trainer with the order of a curriculum, distillation, and its own held-out metrics.

    Args:
        order: Order of the training samples.
        distill: Weight of the distance to the pass with written thinking.
        recursion_rate: Peak learning rate of the recursion and its compressor; None for that of the rest.
        think: Id of ``<think>``.
        **settings: Arguments of a ``Trainer``.
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
        # The Trainer turns the cache off in the configuration that it saves: generation would be slow.
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
        """Names of matrices: no norms, biases, learned tokens, or embeddings, whose rows may train alone."""
        rows = tuple(f"{name}.weight" for name, module in model.named_modules() if _has_rows(name, module))
        return [
            name
            for name, parameter in model.named_parameters()
            if name.endswith("weight") and parameter.ndim > 1 and name not in rows
        ]

    def floating_point_ops(self, inputs: Any) -> int:
        """0: the Trainer's estimate from tokens and parameters is wrong for a recursion."""
        return 0

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """See :meth:`Trainer.compute_loss`; adds the distance to the teacher's states to the model's loss."""
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
                # Like the rest of the loss: per token of all accumulated batches in all processes.
                share = (inputs["labels"][:, 1:] != IGNORED).sum() / num_items_in_batch
                if self.args.average_tokens_across_devices:
                    share = share * self.accelerator.num_processes
            loss = loss + self._distill * share * distance
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """Measures of each sample [B, measures] instead of logits."""
        batch = self._prepare_inputs(inputs)
        fed, _ = _apart(batch)
        with torch.no_grad(), self.compute_loss_context_manager():
            measures = sample_measures(model(**fed, use_cache=False), batch, self._think)
        return None, measures, measures[:, :1]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """See :meth:`Trainer.log`; adds the means of the model's other losses since the last call."""
        if "loss" in logs:
            for name, values in self._noted.items():
                logs[name] = float(torch.stack(values).mean())
            self._noted.clear()
        super().log(logs, *args, **kwargs)

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
    """The inputs of the model, and the rest."""
    ours = {"answer_at", "teacher_ids", "teacher_mask", "teacher_at", "taught"}
    return (
        {name: value for name, value in inputs.items() if name not in ours},
        {name: value for name, value in inputs.items() if name in ours},
    )


def _metrics(prediction: Any) -> dict[str, float]:
    return summary(prediction.predictions)
