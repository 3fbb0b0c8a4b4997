"""An exponential moving average of parameters, kept on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trm_kernels import arguments


class ParameterAverage:
    """``average = decay * average + (1 - decay) * parameter`` for all parameters, in a few launches.

    Updates are in place and asynchronous, so a CUDA graph can capture them. Averages of bfloat16 and float16
    parameters are float32, because at a decay of 0.999 rounding to the lower precision would lose updates.

    Args:
        parameters: Parameters to average, for example ``model.parameters()``.
        decay: Decay rate of the average, in [0, 1).

    Raises:
        ValueError: If the decay is out of range.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float = 0.999) -> None:
        arguments.fraction("decay", decay)
        self.decay = decay
        self._parameters = list(parameters)
        self.averages = [_wide(parameter).clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages with the current parameters."""
        torch._foreach_lerp_(self.averages, [_wide(p) for p in self._parameters], 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Copy the averages into ``parameters``, by default the averaged parameters themselves."""
        targets = self._parameters if parameters is None else list(parameters)
        for target, average in zip(targets, self.averages, strict=True):
            target.copy_(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the parameters with their averages inside the block, in place, so that graphs see them."""
        saved = [parameter.detach().clone() for parameter in self._parameters]
        self.copy_to()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, saved, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, object]:
        """Return the decay and copies of the averages."""
        return {"decay": self.decay, "averages": [average.clone() for average in self.averages]}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Load the result of :meth:`state_dict` in place."""
        averages = state["averages"]
        assert isinstance(averages, list)
        for own, value in zip(self.averages, averages, strict=True):
            own.copy_(value)
        decay: Any = state["decay"]
        arguments.fraction("decay", decay)
        self.decay = float(decay)


def _wide(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return parameter.float() if parameter.dtype in (torch.bfloat16, torch.float16) else parameter
