"""Adam with an arctangent instead of the division, which needs no epsilon (arXiv 2407.05872)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trm_kernels import arguments


class AdamATan2(Optimizer):
    """AdamW with the update ``-lr * a * atan2(m, b * sqrt(v))``, with bias-corrected moments m and v.

    Without an epsilon, the update does not depend on the scale of the gradients, as long as their squares are
    normal numbers. Its magnitude is at most ``lr * a * pi / 2``. Weight decay is decoupled and applied first:
    ``p * (1 - lr * weight_decay)``, as in :class:`torch.optim.AdamW`.

    A step consists only of in-place device work, so a CUDA graph can capture it; its step counters are on the
    device of the parameters. If ``found_inf`` (a one-element tensor, set by
    ``TrainingStep(skip_nonfinite=True)``) is not 0, the step changes nothing, as in torch's fused optimizers.

    Args:
        params: Parameters or groups; all parameters of a group are on one device.
        lr: Learning rate: a number, or a 0-dimensional tensor on the device.
        betas: Decay rates of m and v, each in [0, 1).
        weight_decay: Decoupled weight decay coefficient.
        a, b: Scales of the update and of its argument. With ``a = 4 / pi`` the update is ``lr`` if m equals
            sqrt(v), as in Adam. With the default of 1 it is ``lr * pi / 4`` there, and matches Adam if m is
            small compared to sqrt(v). The official TRM code uses the defaults of the compiled ``adam-atan2``
            package, which we have not checked.
        capturable: Whether :class:`~trm_kernels.TrainingStep` may capture the step, which requires ``lr`` to
            be a tensor: see :func:`~trm_kernels.capturable_adam_atan2`.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        a: float = 1.0,
        b: float = 1.0,
        capturable: bool = False,
    ) -> None:
        if not isinstance(lr, Tensor):
            arguments.real("lr", lr)
        for beta in betas:
            arguments.fraction("betas", beta)
        arguments.real("weight_decay", weight_decay)
        if a <= 0.0 or b <= 0.0:
            raise ValueError(f"a and b must be positive, got {a} and {b}")
        arguments.real("a", a)
        arguments.real("b", b)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "a": a,
            "b": b,
            "capturable": capturable,
            # Tells torch that the optimizer supports found_inf and keeps its step counters on the device.
            "fused": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients and return the result of ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        skip = None if found_inf is None else found_inf.reshape(()) > 0
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group, skip)
        return loss

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _update(self, parameters: list[Tensor], group: dict[str, Any], skip: Tensor | None) -> None:
        states = [self._state(parameter) for parameter in parameters]
        steps, means, squares = (
            [state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # In float32 the corrections are exact to a few units in the last place, thanks to expm1.
        dtype = torch.float64 if parameters[0].dtype == torch.float64 else torch.float32
        lr, (beta1, beta2) = group["lr"], group["betas"]
        keep1: float | Tensor = beta1
        keep2: float | Tensor = beta2
        decay, rate = 1.0 - lr * group["weight_decay"], -group["a"] * lr
        if skip is not None:
            # Values that leave everything unchanged bit for bit: gradients are 0, which avoids 0 * infinity.
            gradients = [gradient.masked_fill(skip, 0.0) for gradient in gradients]
            rate = _unless(skip, rate, 0.0, dtype)
            keep1, keep2, decay = (_unless(skip, value, 1.0, dtype) for value in (keep1, keep2, decay))

        if skip is None:
            torch._foreach_add_(steps, 1.0)
        else:
            # Without alpha torch selects the scalar overload, which synchronises to read the tensor's value.
            torch._foreach_add_(steps, (~skip).float(), alpha=1.0)
        if group["weight_decay"] != 0.0:
            torch._foreach_mul_(parameters, decay)
        torch._foreach_mul_(means, keep1)
        torch._foreach_add_(means, gradients, alpha=1.0 - beta1)
        torch._foreach_mul_(squares, keep2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - beta2)

        # atan2 is unchanged if both arguments are divided by the correction of the first.
        count = torch.stack(steps).to(dtype).clamp_(min=1.0)  # 0 if the very first step is skipped
        correction = group["b"] * _corrected(beta1, count) / _corrected(beta2, count).sqrt()
        arguments = torch._foreach_sqrt(squares)
        torch._foreach_mul_(arguments, list(correction.unbind()))
        # torch has no _foreach_atan2. For a non-negative second argument, atan of the quotient is equal
        # except at 0 / 0, which the clamp avoids: sqrt of the smallest positive v is far above the smallest
        # normal number.
        torch._foreach_clamp_min_(arguments, [torch.finfo(p.dtype).tiny for p in parameters])
        updates = torch._foreach_div(means, arguments)
        torch._foreach_atan_(updates)
        torch._foreach_mul_(updates, rate)
        torch._foreach_add_(parameters, updates)


def _corrected(beta: float, count: Tensor) -> Tensor:
    """Compute ``1 - beta ** count`` without cancellation."""
    return -torch.expm1(count * (math.log(beta) if beta > 0.0 else -math.inf))


def _unless(skip: Tensor, value: float | Tensor, otherwise: float, dtype: torch.dtype) -> Tensor:
    """Return ``value``, or ``otherwise`` if ``skip`` is set, as a 0-dimensional tensor."""
    # torch.where would copy a number to the device synchronously, which a capture forbids.
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=dtype, device=skip.device)
    return value.masked_fill(skip, otherwise)
