"""A whole training step with :class:`trm_kernels.training.TrainingStep`, plain or captured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from llm_trm.benchmark.memory import peak_memory
from llm_trm.benchmark.models import Model
from llm_trm.benchmark.steps import Inputs
from llm_trm.benchmark.training import (
    BETAS,
    EMA_DECAY,
    LEARNING_RATE,
    MAX_NORM,
    WEIGHT_DECAY,
    autocast_dtype,
    loss_of,
    require_updates,
)
from llm_trm.benchmark.workloads import Case
from trm_kernels.optim.averaging import ParameterAverage
from trm_kernels.optim.capturable import capturable_adamw
from trm_kernels.training import TrainingStep


class LibraryStep:
    """This library's training step, as an alternative to the plain loop.

    Every sample halts after one supervision step, so each call trains on the given inputs, starting from the
    y and z of input set 0.
    """

    WARM_UP = 3

    def __init__(self, case: Case, model: Model, inputs: Inputs, *, capture: bool) -> None:
        model.net.train()
        self.model = model
        self.inputs = inputs
        self.capture = capture
        self.head = nn.Parameter(inputs.head.clone())
        self.parameters = dict(model.net.named_parameters()) | {"head": self.head}
        self.initial = {name: tensor.detach().clone() for name, tensor in self.parameters.items()}
        self.optimizer = capturable_adamw(
            self.parameters.values(), LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        self.average = ParameterAverage(self.parameters.values(), EMA_DECAY)
        _, y, z = inputs[0]
        self.training = TrainingStep(
            model.net,
            self._loss,
            self.optimizer,
            n=case.steps,
            T=case.recursions,
            initial=lambda x: (y, z),
            clip_norm=MAX_NORM,
            average=self.average,
            autocast_dtype=autocast_dtype(case, model),
            max_steps=1,
            capture=capture,
            warmup=self.WARM_UP,
            **model.options,
        )

    def _loss(self, y: Tensor, z: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        with torch.autocast(y.device.type, enabled=False):
            return loss_of(y, self.head, labels), {}

    def prepare(self) -> None:
        """Run until the step is captured.

        Raises:
            RuntimeError: The step could not be captured. It would still run, but as a different candidate.
        """
        for _ in range(self.WARM_UP if self.capture else 1):
            self(0)
        device = self.head.device
        self._peak = peak_memory(device, lambda: self(0))
        if self.capture:
            status = self.training.cache.status()
            if status.replays == 0:
                raise RuntimeError(f"the step was not captured: {', '.join(status.fallbacks)}")

    def __call__(self, i: int) -> None:
        self.training(self.inputs[i][0], self.inputs.labels)
        self.training.poll()

    def check(self) -> None:
        carry = self.training.carry
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.initial[name])
                self.optimizer.state[parameter]["exp_avg"].zero_()
            for average, parameter in zip(self.average.averages, self.parameters.values(), strict=True):
                average.copy_(parameter)
            for state in (carry.y, carry.z):
                assert state is not None
                state.fill_(float("nan"))  # so that a step that writes nothing fails the check
        self(0)
        averages = dict(zip(self.parameters, self.average.averages, strict=True))
        require_updates(self.initial, {"parameter": self.parameters, "average": averages})

    def results(self) -> Iterator[tuple[str, Tensor]]:
        output = self.training.carry.y
        assert output is not None
        yield "output", output
        # Gradients are not stored, but follow from AdamW's first moments, which were zero before the step.
        for name, parameter in self.parameters.items():
            yield name, self.optimizer.state[parameter]["exp_avg"] / (1.0 - BETAS[0])

    def peak_memory(self, device: torch.device) -> int | None:
        return self._peak
