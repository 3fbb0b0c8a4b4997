"""Adam with an arctangent in place of the division, so that no epsilon is needed (arXiv 2407.05872)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trm_kernels import arguments


class AdamATan2(Optimizer):
    """AdamW whose update is ``-lr * a * atan2(m, b * sqrt(v))``, m and v the corrected means.

    Without an epsilon the update does not depend on the scale of the gradients: all of them times a constant
    change nothing, as long as their squares are normal numbers. It is at most ``lr * a * pi / 2``. Weight
    decay is decoupled, and comes first: ``p * (1 - lr * weight_decay)``, as in :class:`torch.optim.AdamW`.

    A step consists of device work alone, in place, so that a CUDA graph can hold it; its counters lie beside
    the parameters. With ``found_inf`` (a tensor of one element, set by ``TrainingStep(skip_nonfinite=True)``)
    other than 0 it changes nothing, as torch's fused optimizers do.

    Args:
        params: Parameters or groups; those of a group lie on one device.
        lr: Learning rate, a number or a tensor without dimensions on the device.
        betas: Shares of m and v that a step keeps, each in [0, 1).
        weight_decay: Share of a parameter that a learning rate of 1 would take away.
        a, b: Scales of the update and of its argument. With ``a = 4 / pi`` an update is ``lr`` where m equals
            sqrt(v), as Adam's is; with the default of 1 it is ``lr * pi / 4`` there, and where m is small
            against sqrt(v) the two agree. The official code of TRM leaves both to the compiled ``adam-atan2``
            package, whose values have not been looked up.
        capturable: Says to :class:`~trm_kernels.TrainingStep` that the step may be captured, which needs
            ``lr`` to be a tensor: see :func:`~trm_kernels.capturable_adam_atan2`.

    Raises:
        ValueError: A number outside its range.
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
            arguments.share("betas", beta)
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
            # torch's mark of optimizers that obey found_inf, and whose counters load to the device.
            "fused": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients; gives what ``closure`` gave."""
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
            # Numbers that leave everything as it is, bit for bit: gradients of 0, and not 0 * infinity.
            gradients = [gradient.masked_fill(skip, 0.0) for gradient in gradients]
            rate = _unless(skip, rate, 0.0, dtype)
            keep1, keep2, decay = (_unless(skip, value, 1.0, dtype) for value in (keep1, keep2, decay))

        if skip is None:
            torch._foreach_add_(steps, 1.0)
        else:
            # Without alpha this would be the form that takes a number: it would wait for the tensor's value.
            torch._foreach_add_(steps, (~skip).float(), alpha=1.0)
        if group["weight_decay"] != 0.0:
            torch._foreach_mul_(parameters, decay)
        torch._foreach_mul_(means, keep1)
        torch._foreach_add_(means, gradients, alpha=1.0 - beta1)
        torch._foreach_mul_(squares, keep2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - beta2)

        # atan2 does not change when both its arguments are divided by the correction of the first.
        count = torch.stack(steps).to(dtype).clamp_(min=1.0)  # 0 if the first step of all is skipped
        correction = group["b"] * _corrected(beta1, count) / _corrected(beta2, count).sqrt()
        arguments = torch._foreach_sqrt(squares)
        torch._foreach_mul_(arguments, list(correction.unbind()))
        # torch has no foreach form of atan2. Where its second argument is not negative, atan of the quotient
        # is the same, but for 0 / 0: the root of the least v above 0 is far above the least normal number.
        torch._foreach_clamp_min_(arguments, [torch.finfo(p.dtype).tiny for p in parameters])
        updates = torch._foreach_div(means, arguments)
        torch._foreach_atan_(updates)
        torch._foreach_mul_(updates, rate)
        torch._foreach_add_(parameters, updates)


def _corrected(beta: float, count: Tensor) -> Tensor:
    """``1 - beta ** count`` without cancellation."""
    return -torch.expm1(count * (math.log(beta) if beta > 0.0 else -math.inf))


def _unless(skip: Tensor, value: float | Tensor, otherwise: float, dtype: torch.dtype) -> Tensor:
    """``value``, or ``otherwise`` where ``skip`` is set, without dimensions."""
    # torch.where would copy a number to the device and wait for that, which a capture forbids.
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=dtype, device=skip.device)
    return value.masked_fill(skip, otherwise)
