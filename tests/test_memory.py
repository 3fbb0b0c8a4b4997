"""Memory traffic and saved memory of a recursion, counted without a GPU from recorded launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trm_kernels import NetworkConfig, reference
from trm_kernels.backends.fused import block_parameters
from trm_kernels.config import Memory
from trm_kernels.ops import _launch
from trm_kernels.ops._launch import TARGETS, record
from trm_kernels.ops.recursion import (
    AuxiliaryTensors,
    Settings,
    _recursion,
    _recursion_backward,
    _recursion_saving,
)

pytestmark = pytest.mark.interpreter
BATCH, LENGTH, WIDTH, HEADS, N = 768, 97, 512, 8, 6
STATE = BATCH * LENGTH * WIDTH * 2  # bytes of one [B, L, D] in bfloat16
DTYPE = torch.bfloat16


def network(layout: str) -> reference.TinyRecursiveNetwork:
    family, _, tokens = layout.partition("-")
    config = NetworkConfig(WIDTH, 2, HEADS, family=family, mixer=tokens or "attention", seq_len=LENGTH)
    with torch.device("meta"):
        return reference.TinyRecursiveNetwork(config).to(DTYPE)


def state() -> Tensor:
    return torch.empty(BATCH, LENGTH, WIDTH, dtype=DTYPE, device="meta")


def arguments(
    layout: str, net: reference.TinyRecursiveNetwork, memory: Memory, output_norm: bool = False
) -> tuple[Any, ...]:
    """Return the op's arguments after the states."""
    config = net.config
    parameters = [parameter.detach() for block in net.layers for parameter in block_parameters(block)]
    cos = torch.empty(LENGTH, config.head_dim // 2, device="meta") if config.rotary else None
    weight = torch.empty(WIDTH, dtype=DTYPE, device="meta") if output_norm else None
    eps = 1e-6 if output_norm else None
    settings = Settings(layout, N, HEADS, BATCH, LENGTH, config.norm_eps, eps, 0.0, DTYPE, memory)
    return parameters, [], weight, *AuxiliaryTensors(cos=cos, sin=cos), *settings


def passes(run: Callable[[], object]) -> float:
    """Return how many [B, L, D] tensors the launches of ``run`` read and write, without row statistics."""
    with record(TARGETS["sm_90"]) as launches:
        run()
    tensors = [arg for launch in launches for arg in launch.args if isinstance(arg, Tensor)]
    moved = [t.numel() * t.element_size() for t in tensors if t.shape[:-1] == (BATCH, LENGTH)]
    return sum(moved) / STATE


#: A seed block: projections 1 + 3, attention 3 + 1, output 1 + residual 1 + 1, MLP 1 + 4 and 4 + 1 + 1.
BLOCK = 22
#: x + y + z: three read, x + y and the sum written.
START = 5
#: n - 1 times the last GEMM of a call reads x + y; once it reads y and writes both z and the next input.
PLAN = START + (N + 1) * 2 * BLOCK + (N - 1) + 2
#: A norm after every call: the GEMM writes the sum, and a row kernel reads it. Calls end in three ways: n - 1
#: times the kernel reads x + y; once it reads y and writes z and the next input; at the end it writes y.
PLAN_WITH_NORM = PLAN + (N + 1) * 2


def test_memory_traffic_of_a_recursion() -> None:
    net = network("seed")
    found = passes(lambda: _recursion(state(), state(), state(), *arguments("seed", net, "fast")))
    assert found == PLAN == 320
    normed = arguments("seed", net, "fast", output_norm=True)
    assert passes(lambda: _recursion(state(), state(), state(), *normed)) == PLAN_WITH_NORM


@pytest.mark.parametrize(
    ("memory", "more"),
    # The pre-activations of every block call, four states wide; all other saved tensors are written anyway.
    [("fast", 4 * 2 * (N + 1)), ("balanced", 0), ("small", 0)],
)
def test_saving_costs_no_pass_except_the_pre_activations(memory: Memory, more: int) -> None:
    net = network("seed")
    run = lambda: _recursion_saving(state(), state(), state(), *arguments("seed", net, memory))  # noqa: E731
    assert passes(run) == PLAN + more


class Live(TorchDispatchMode):
    """Tracks the bytes of all live storages, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return found


class FlashLike(torch.autograd.Function):
    """Saves the same tensors as flash attention. On meta tensors, PyTorch would save score matrices."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class FusedNormLike(torch.autograd.Function):
    """Saves the same tensors as CUDA's fused RMSNorm, which on meta tensors consists of float32 passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Any, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(weight), None


def eager_peak(layout: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the peak of the reference's latent recursion with gradients, flash attention and fused norm."""
    monkeypatch.setattr(reference, "attention", lambda q, k, v, *_: FlashLike.apply(q, k, v))
    monkeypatch.setattr(torch.nn.functional, "rms_norm", FusedNormLike.apply)
    net = network(layout)
    with Live() as live:
        y, _ = reference.latent_recursion(net, state(), state(), state(), N)
        y.sum().backward()
    return live.peak


@contextmanager
def nothing_launched() -> Iterator[None]:
    """Like :func:`record`, but without keeping tensors alive."""
    _launch._recorder, _launch._target_override = (lambda _: None), TARGETS["sm_90"]
    try:
        yield
    finally:
        _launch._recorder = _launch._target_override = None


def fused_peak(layout: str, memory: Memory) -> int:
    """Return the same peak for the op."""
    net = network(layout)
    with nothing_launched(), Live() as live:
        rest = arguments(layout, net, memory)
        out, z, saved = _recursion_saving(state(), state(), state(), *rest)
        grad = torch.empty_like(out)
        del out, z
        _recursion_backward(grad, None, saved, True, True, *rest)
    return live.peak


@pytest.mark.parametrize("layout", ["seed", "paper", "paper-tokens"])
def test_a_training_step_peaks_at_half_of_eager(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = eager_peak(layout, monkeypatch)
    share = {memory: fused_peak(layout, memory) / eager for memory in ("fast", "balanced", "small")}
    print(f"{layout}: eager {eager / 2**30:.1f} GiB, {share}")
    assert share["balanced"] <= 0.5
    assert share["small"] < share["balanced"] < share["fast"]
