"""A whole training step: deep recursion, norm, head, cross-entropy, backward, clipping, AdamW and EMA."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trm.benchmark.models import Model, State, reference_network, written_out
from llm_trm.benchmark.steps import Inputs, Step
from llm_trm.benchmark.workloads import Case

LEARNING_RATE = 1e-4
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_NORM = 1.0
EMA_DECAY = 0.999


def loss_of(y: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of ``head norm(y)`` in the head's dtype: y [B, L, D], head [C, D], labels [B, L]."""
    wide = y.to(head.dtype)
    logits = F.linear(F.rms_norm(wide, wide.shape[-1:], eps=1e-6), head)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def autocast_dtype(case: Case, model: Model) -> torch.dtype | None:
    """The autocast dtype of a step, or None; the paper's model casts its weights itself."""
    if case.dtype == "float32" or not (model.needs_autocast or case.stream_dtype == "float32"):
        return None
    dtype: torch.dtype = getattr(torch, case.dtype)
    return dtype


@functools.cache
def autocast_cache_keeps_gradients(device_type: str) -> bool:
    """Whether a weight that autocast first casts without gradients still gets a gradient from a later use.

    The recursions without gradients come first in a step. In older releases of PyTorch (issue 112583 of
    pytorch/pytorch) the cast that they leave in the cache detaches the weight from later uses, so the cache
    must be disabled.
    """
    weight = torch.ones(1, 1, device=device_type, requires_grad=True)
    x = torch.ones(1, 1, device=device_type)
    with torch.autocast(device_type, torch.bfloat16):
        with torch.no_grad():
            F.linear(x, weight)
        return F.linear(x, weight).requires_grad


def require_updates(initial: Mapping[str, Tensor], updated: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise RuntimeError if a tensor of ``updated``, by kind and name, equals its value in ``initial``."""
    for kind, tensors in updated.items():
        for name, before in initial.items():
            if not (tensors[name] != before).any():
                raise RuntimeError(f"the step did not change the {kind} {name}")


class LoopStep(Step):
    """The plain training loop, which updates the average per parameter in Python and reads the loss.

    In low precision it runs as in real training: parameters, their average and AdamW's moments are float32,
    with autocast or, for the paper's family, low-precision streams and weights cast on use.
    """

    def __init__(self, case: Case, model: Model, inputs: Inputs) -> None:
        super().__init__(case, model, inputs)
        self.head = nn.Parameter(inputs.head.clone())
        self.parameters = dict(model.net.named_parameters()) | {"head": self.head}
        self.initial = {name: tensor.detach().clone() for name, tensor in self.parameters.items()}
        self.average = {name: tensor.detach().clone() for name, tensor in self.parameters.items()}
        self.autocast = autocast_dtype(case, model)
        self.optimizer = self.make_optimizer()
        self.loss = float("nan")

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW with PyTorch's default implementation."""
        return torch.optim.AdamW(
            self.parameters.values(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY
        )

    def gradients(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Run the forward and backward pass, and return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        kind = self.head.device.type
        with torch.autocast(
            kind,
            self.autocast,
            enabled=self.autocast is not None,
            cache_enabled=autocast_cache_keeps_gradients(kind),
        ):
            output = self.model.deep(x, y, z)[0]
        loss = loss_of(output, self.head, self.inputs.labels)
        loss.backward()
        self.output = output.detach()
        return loss.detach()

    def launch(self, x: Tensor, y: Tensor, z: Tensor) -> None:
        """One training step on x, y, z [B, L, D]."""
        loss = self.gradients(x, y, z)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), MAX_NORM)
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].mul_(EMA_DECAY).add_(parameter, alpha=1.0 - EMA_DECAY)
        self.loss = loss.item()

    def restore(self) -> None:
        """Reset the parameters to their initial values; AdamW keeps its moments."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.initial[name])
                self.average[name].copy_(self.initial[name])

    def verify(self) -> None:
        require_updates(self.initial, {"parameter": self.parameters, "average": self.average})

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.parameters.items()

    def clear(self) -> None:
        super().clear()
        self.head.grad = None


class DeviceLoopStep(LoopStep):
    """The same arithmetic without device synchronisation, as CUDA graphs require."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.parameters.values(),
            lr=LEARNING_RATE,
            betas=BETAS,
            weight_decay=WEIGHT_DECAY,
            fused=True,
            capturable=self.head.is_cuda,
        )

    def launch(self, x: Tensor, y: Tensor, z: Tensor) -> None:
        self.device_loss = self.gradients(x, y, z)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), MAX_NORM, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1.0 - EMA_DECAY)


def float64_gradients(case: Case, state: State, inputs: Inputs, rows: int) -> dict[str, Tensor]:
    """Output and clipped gradients of the first step in float64, computed ``rows`` samples at a time."""
    device = torch.device("cpu") if inputs.head.device.type == "mps" else inputs.head.device
    wide = {name: tensor.to(device, torch.float64) for name, tensor in state.items()}
    model = written_out(reference_network)(case, wide)
    head = inputs.head.to(device, torch.float64).requires_grad_()
    outputs = []
    for start in range(0, case.batch, rows):
        x, y, z = (tensor[start : start + rows].to(device, torch.float64) for tensor in inputs[0])
        labels = inputs.labels[start : start + rows].to(device)
        output = model.deep(x, y, z)[0]
        (loss_of(output, head, labels) * (len(x) / case.batch)).backward()
        outputs.append(output.detach())
    parameters = dict(model.net.named_parameters()) | {"head": head}
    torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_NORM)
    gradients = {name: tensor.grad for name, tensor in parameters.items() if tensor.grad is not None}
    return {"output": torch.cat(outputs)} | gradients
