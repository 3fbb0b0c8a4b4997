"""The timed units of work: a latent recursion, or a deep recursion with its backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llm_trm.benchmark.memory import peak_memory
from llm_trm.benchmark.models import Model, State
from llm_trm.benchmark.workloads import CLASSES, Case
from trm_kernels import reference


@dataclass
class Inputs:
    """Sets of x, y, z, each a list of K tensors [B, L, D], and further inputs for training cases.

    The K sets together exceed twice the last-level cache of a GPU, so that no call finds its input there.

    Attributes:
        grad_y: Gradient of y [B, L, D], for ``train``.
        labels: Class of each position [B, L], for ``step``.
        head: Weight of the head [C, D] in float32, for ``step``.
        graph_pool: Memory pool that the case's CUDA graphs share. They never run at the same time, and
            tensors that outlive a replay are not shared.
    """

    x: list[Tensor]
    y: list[Tensor]
    z: list[Tensor]
    grad_y: Tensor
    labels: Tensor
    head: Tensor
    graph_pool: Any = None

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        k = i % len(self.x)
        return self.x[k], self.y[k], self.z[k]


MAX_INPUT_SETS = 256


def make_inputs(case: Case, device: torch.device, cache_bytes: int) -> Inputs:
    """Sample normal inputs. The gradient of y is scaled to give parameter gradients of order one."""
    dtype: torch.dtype = getattr(torch, case.stream_dtype)
    shape = (case.batch, case.latents, case.hidden_size)
    sets = 1
    if device.type == "cuda":
        set_bytes = 3 * dtype.itemsize * case.batch * case.latents * case.hidden_size
        sets = min(MAX_INPUT_SETS, 1 + 2 * cache_bytes // set_bytes)
    x, y, z = ([torch.randn(shape, device=device, dtype=dtype) for _ in range(sets)] for _ in range(3))
    grad_y = torch.randn(shape, device=device, dtype=dtype) * (case.batch * case.latents) ** -0.5
    labels = torch.randint(CLASSES, shape[:2], device=device)
    head = torch.randn(CLASSES, case.hidden_size, device=device) * case.hidden_size**-0.5
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    return Inputs(x, y, z, grad_y, labels, head, pool)


#: Scale of the paper family's output projections. At a new network's scale the recursion amplifies rounding
#: errors: a bf16 run of 21 calls has an error of 18% at width 512, too much to distinguish a kernel from
#: eager. With this factor the error is 1.3%.
_DAMPING = 0.25


def make_state(case: Case, device: torch.device) -> State:
    """The state dict for all candidates. Vectors are random too, as initial ones would hide errors."""
    with device:
        net = reference.TinyRecursiveNetwork(case.config())
    for name, parameter in net.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
        elif case.family == "paper" and ("o_proj" in name or "down_proj" in name):
            with torch.no_grad():
                parameter.mul_(_DAMPING)
    return net.to(getattr(torch, case.parameter_dtype)).state_dict()


class Timed(Protocol):
    """The interface of a timed step."""

    model: Model

    def prepare(self) -> None:
        """Compile or capture in the first call."""

    def __call__(self, i: int) -> None:
        """Run on input set ``i`` modulo the number of sets."""

    def check(self) -> None:
        """Run on input set 0 from the initial parameters, for :meth:`results`."""

    def results(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ``("output", y)`` and, in training, all gradients by name."""

    def peak_memory(self, device: torch.device) -> int | None:
        """Peak memory of a call in bytes, including results but not parameters and inputs."""


class Step:
    """One candidate on a case with mode ``forward`` or ``train`` (see :class:`Case`)."""

    def __init__(self, case: Case, model: Model, inputs: Inputs) -> None:
        self.case = case
        self.model = model
        self.inputs = inputs
        self.output: Tensor | None = None
        self.leaf: Tensor | None = None
        model.net.train(case.mode != "forward")

    def __call__(self, i: int) -> None:
        self.launch(*self.inputs[i])

    def launch(self, x: Tensor, y: Tensor, z: Tensor) -> None:
        """Run on x, y, z [B, L, D]."""
        if self.case.mode == "forward":
            with torch.no_grad():
                self.output = self.model.latent(x, y, z)[0]
            return
        self.model.net.zero_grad(set_to_none=True)
        self.leaf = x.detach().requires_grad_()
        output = self.model.deep(self.leaf, y, z)[0]
        output.backward(self.inputs.grad_y)
        self.output = output.detach()

    def prepare(self) -> None:
        self(0)

    def check(self) -> None:
        self.restore()
        self(0)
        self.verify()

    def restore(self) -> None:
        """Restore the state that calls change."""

    def verify(self) -> None:
        """Raise RuntimeError if a call after :meth:`restore` left out an effect not in :meth:`results`."""

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors that receive a gradient, by name."""
        if self.case.mode == "train":
            assert self.leaf is not None
            yield "x", self.leaf
            yield from self.model.net.named_parameters()

    def results(self) -> Iterator[tuple[str, Tensor]]:
        assert self.output is not None
        yield "output", self.output
        for name, tensor in self.trained():
            if tensor.grad is None:
                raise RuntimeError(f"{name} received no gradient")
            yield name, tensor.grad

    def clear(self) -> None:
        """Release the results of the last call."""
        self.output = self.leaf = None
        self.model.net.zero_grad(set_to_none=True)

    def peak_memory(self, device: torch.device) -> int | None:
        self.clear()
        return peak_memory(device, lambda: self(0))


class GraphStep:
    """A step captured once and replayed as a CUDA graph; a call copies its inputs into the graph's."""

    WARM_UP = 3

    def __init__(self, step: Step) -> None:
        self.step = step
        self.model = step.model
        self.inputs = step.inputs

    def prepare(self) -> None:
        """Warm up on a side stream, as capturing requires, and capture the last input set."""
        self.static = [tensor.clone() for tensor in self.inputs[-1]]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                self.step.launch(*self.static)
        torch.cuda.current_stream().wait_stream(stream)
        self.step.clear()
        self.graph = torch.cuda.CUDAGraph()

        def capture() -> None:
            with torch.cuda.graph(self.graph, pool=self.inputs.graph_pool):
                self.step.launch(*self.static)

        self._peak = peak_memory(self.static[0].device, capture)

    def __call__(self, i: int) -> None:
        torch._foreach_copy_(self.static, list(self.inputs[i]))
        self.graph.replay()

    def check(self) -> None:
        for _, tensor in self.step.results():
            tensor.fill_(float("nan"))  # so that a replay that writes nothing fails the check
        self.step.restore()
        self(0)
        self.step.verify()

    def results(self) -> Iterator[tuple[str, Tensor]]:
        return self.step.results()

    def peak_memory(self, device: torch.device) -> int | None:
        return self._peak  # all memory is allocated during capture
