"""The implementations that a case is run on, and why some cannot run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import trm_kernels
from llm_trm.benchmark.memory import peak_memory
from llm_trm.benchmark.original import OriginalNetwork
from llm_trm.benchmark.workloads import Case
from trm_kernels import backends, reference

GRAPH = "+graph"

#: Rows of a table, in order. ``original`` is the module that the project replaces, ``+graph`` replays the
#: whole case as one CUDA graph, the others are the backends of ``trm_kernels``.
CANDIDATES = (
    "original",
    *(name for name in backends.BACKENDS),
    *(name + GRAPH for name in ("eager", "compile", "triton")),
)


def candidates_for(device_type: str) -> tuple[str, ...]:
    """The candidates that make sense on a device type."""
    return tuple(name for name in CANDIDATES if device_type == "cuda" or not name.endswith(GRAPH))


@dataclass
class Inputs:
    """Sets of x, y, z, each a list of K tensors [B, L, D], and the gradient of y [B, L, D] for training.

    K sets together exceed twice the last-level cache of a GPU, so that no call finds its input there.

    ``graph_pool`` is the memory that the case's CUDA graphs share. They never run at the same time, and
    what outlives a replay is not shared.
    """

    x: list[Tensor]
    y: list[Tensor]
    z: list[Tensor]
    grad_y: Tensor
    graph_pool: Any = None

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        k = i % len(self.x)
        return self.x[k], self.y[k], self.z[k]


MAX_INPUT_SETS = 256


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, cache_bytes: int) -> Inputs:
    """Draw normal inputs; the gradient of y is scaled so that parameter gradients stay of unit order."""
    shape = (case.batch, case.latents, case.hidden_size)
    sets = 1
    if device.type == "cuda":
        set_bytes = 3 * dtype.itemsize * case.batch * case.latents * case.hidden_size
        sets = min(MAX_INPUT_SETS, 1 + 2 * cache_bytes // set_bytes)
    x, y, z = ([torch.randn(shape, device=device, dtype=dtype) for _ in range(sets)] for _ in range(3))
    scale = (case.batch * case.latents) ** -0.5
    grad_y = torch.randn(shape, device=device, dtype=dtype) * scale
    return Inputs(x, y, z, grad_y, torch.cuda.graph_pool_handle() if device.type == "cuda" else None)


def make_state(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict that all candidates load. Vectors are drawn too: fresh norms and biases hide errors."""
    with device:
        net = reference.TinyRecursiveNetwork(case.config())
    for parameter in net.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return net.to(dtype).state_dict()


class Step:
    """One candidate at one case: a latent recursion, or a training step (see :class:`Case`)."""

    def __init__(self, case: Case, net: nn.Module, inputs: Inputs, *, original: bool = False) -> None:
        self.case = case
        self.net = net
        self.inputs = inputs
        self.output: Tensor | None = None
        self.leaf: Tensor | None = None
        # The original adds x + y + z anew in every step, as the reference does.
        schedule = reference if original else trm_kernels
        self._latent = functools.partial(schedule.latent_recursion, n=case.steps)
        self._deep = functools.partial(schedule.deep_recursion, n=case.steps, T=case.recursions)
        net.train(case.mode == "train")

    def __call__(self, i: int) -> None:
        """Run on input set ``i`` modulo their number."""
        self.launch(*self.inputs[i])

    def launch(self, x: Tensor, y: Tensor, z: Tensor) -> None:
        """Run on x, y, z [B, L, D]."""
        if self.case.mode == "forward":
            with torch.no_grad():
                self.output = self._latent(self.net, x, y, z)[0]
            return
        self.net.zero_grad(set_to_none=True)
        self.leaf = x.detach().requires_grad_()
        output = self._deep(self.net, self.leaf, y, z)[0]
        output.backward(self.inputs.grad_y)
        self.output = output.detach()

    def prepare(self) -> None:
        """First call on input set 0: compiles what compiles."""
        self(0)

    def check(self) -> None:
        """Run on input set 0, for :meth:`results`."""
        self(0)

    def results(self) -> Iterator[tuple[str, Tensor]]:
        """``("output", y)``, then in training ``("x", gradient)`` and each parameter's gradient."""
        assert self.output is not None
        yield "output", self.output
        if self.case.mode == "train":
            assert self.leaf is not None
            for name, tensor in (("x", self.leaf), *self.net.named_parameters()):
                if tensor.grad is None:
                    raise RuntimeError(f"{name} received no gradient")
                yield name, tensor.grad

    def clear(self) -> None:
        """Let go of the last call's results."""
        self.output = self.leaf = None
        self.net.zero_grad(set_to_none=True)

    def peak_memory(self, device: torch.device) -> int | None:
        """Bytes held at the peak of a call, results included, above parameters and inputs."""
        self.clear()
        return peak_memory(device, lambda: self(0))


class GraphStep(Step):
    """The same, captured once and replayed as a CUDA graph; a call copies its inputs into the graph's."""

    WARM_UP = 3

    def prepare(self) -> None:
        """Warm up on a side stream, as capturing asks for, and capture the last input set."""
        self.static = [tensor.clone() for tensor in self.inputs[-1]]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                self.launch(*self.static)
        torch.cuda.current_stream().wait_stream(stream)
        self.clear()
        self.graph = torch.cuda.CUDAGraph()

        def capture() -> None:
            with torch.cuda.graph(self.graph, pool=self.inputs.graph_pool):
                self.launch(*self.static)

        self._peak = peak_memory(self.static[0].device, capture)

    def __call__(self, i: int) -> None:
        torch._foreach_copy_(self.static, list(self.inputs[i]))
        self.graph.replay()

    def check(self) -> None:
        for _, tensor in self.results():
            tensor.fill_(float("nan"))  # a replay that writes nothing must not pass
        self(0)

    def peak_memory(self, device: torch.device) -> int | None:
        return self._peak  # all of it is allocated while capturing


def _on_meta(build: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        net = build()
    # Own copies: training candidates must not share gradients, nor warm the cache for each other.
    net.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return net


def unavailable(name: str, device_type: str) -> str | None:
    """Why candidate ``name`` cannot run in this process at all, or None."""
    base = name.removesuffix(GRAPH)
    if name.endswith(GRAPH) and device_type != "cuda":
        return f"CUDA graphs need a CUDA device, not {device_type}"
    reason = backends.BACKENDS[base].unavailable() if base in backends.BACKENDS else None
    if reason is None and base == "triton" and device_type == "cpu":
        return "the kernels run on a GPU; Triton's interpreter shows no speed"
    return reason


def build(name: str, case: Case, state: dict[str, Tensor], inputs: Inputs) -> Step | str:
    """The step of candidate ``name``, or the reason why it cannot serve the case."""
    x = inputs.x[0]
    reason = unavailable(name, x.device.type)
    if reason is not None:
        return reason
    step = GraphStep if name.endswith(GRAPH) else Step
    config = case.config()
    if name == "original":
        if config.family != "seed":
            return f"the original module has the seed family's block, not the {config.family} family's"
        return step(case, _on_meta(lambda: OriginalNetwork(config), state), inputs, original=True)
    base = name.removesuffix(GRAPH)
    net = _on_meta(lambda: trm_kernels.TinyRecursiveNetwork.from_config(config, backend=base), state)
    assert isinstance(net, trm_kernels.TinyRecursiveNetwork)
    built = step(case, net, inputs)
    training = case.mode == "train"
    for grad in (False, True) if training else (False,):
        with torch.set_grad_enabled(grad):
            reason = backends.refusal(base, net, x.detach().requires_grad_(grad))
            if reason is not None:
                return reason
    return built
