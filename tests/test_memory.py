"""What a recursion moves and keeps, counted without a GPU: tensors without data, launches recorded."""

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
from trm_kernels.ops.recursion import Numbers, Tensors, _recursion, _recursion_backward, _recursion_saving

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
    """The op's arguments behind the states."""
    config = net.config
    parameters = [parameter.detach() for block in net.layers for parameter in block_parameters(block)]
    cos = torch.empty(LENGTH, config.head_dim // 2, device="meta") if config.rotary else None
    weight = torch.empty(WIDTH, dtype=DTYPE, device="meta") if output_norm else None
    eps = 1e-6 if output_norm else None
    numbers = Numbers(layout, N, HEADS, BATCH, LENGTH, config.norm_eps, eps, 0.0, DTYPE, memory)
    return parameters, [], weight, *Tensors(cos=cos, sin=cos), *numbers


def passes(run: Callable[[], object]) -> float:
    """[B, L, D] tensors that the launches of ``run`` read and write, row statistics left out."""
    with record(TARGETS["sm_90"]) as launches:
        run()
    tensors = [arg for launch in launches for arg in launch.args if isinstance(arg, Tensor)]
    moved = [t.numel() * t.element_size() for t in tensors if t.shape[:-1] == (BATCH, LENGTH)]
    return sum(moved) / STATE


#: Of a seed block: projections 1 + 3, attention 3 + 1, output 1 + residual 1 + 1, MLP 1 + 4 and 4 + 1 + 1.
BLOCK = 22
#: x + y + z: three read, x + y and the sum written.
START = 5
#: n - 1 times the last GEMM of a call reads x + y; once it reads y and writes both z and the next input.
PLAN = START + (N + 1) * 2 * BLOCK + (N - 1) + 2
#: A norm behind every call: the sum is written by the GEMM and read by a row kernel. Three ends of a call:
#: n - 1 times x + y is read there; once y is, and z and the next input are written; at last y is written.
PLAN_WITH_NORM = PLAN + (N + 1) * 2


def test_a_recursion_moves_what_the_plan_says() -> None:
    net = network("seed")
    found = passes(lambda: _recursion(state(), state(), state(), *arguments("seed", net, "fast")))
    assert found == PLAN == 320
    normed = arguments("seed", net, "fast", output_norm=True)
    assert passes(lambda: _recursion(state(), state(), state(), *normed)) == PLAN_WITH_NORM


@pytest.mark.parametrize(
    ("memory", "more"),
    # The pre-activations, four states wide, of every block call; what else is kept is written anyway.
    [("fast", 4 * 2 * (N + 1)), ("balanced", 0), ("small", 0)],
)
def test_keeping_costs_no_pass_but_the_pre_activations(memory: Memory, more: int) -> None:
    net = network("seed")
    run = lambda: _recursion_saving(state(), state(), state(), *arguments("seed", net, memory))  # noqa: E731
    assert passes(run) == PLAN + more


class Live(TorchDispatchMode):
    """Follows the bytes of all storages that are alive, and their peak."""

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
    """Keeps what flash attention keeps. On meta tensors PyTorch's own would hold score matrices."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class FusedNormLike(torch.autograd.Function):
    """Keeps what the fused RMSNorm of CUDA keeps; on meta tensors it is made of several float32 passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Any, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(weight), None


def eager_peak(layout: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a latent recursion with gradient by the reference, flash attention and a fused norm granted."""
    monkeypatch.setattr(reference, "attention", lambda q, k, v, *_: FlashLike.apply(q, k, v))
    monkeypatch.setattr(torch.nn.functional, "rms_norm", FusedNormLike.apply)
    net = network(layout)
    with Live() as live:
        y, _ = reference.latent_recursion(net, state(), state(), state(), N)
        y.sum().backward()
    return live.peak


@contextmanager
def nothing_launched() -> Iterator[None]:
    """As :func:`record`, which would keep every tensor alive."""
    _launch._recorder, _launch._target_override = (lambda _: None), TARGETS["sm_90"]
    try:
        yield
    finally:
        _launch._recorder = _launch._target_override = None


def fused_peak(layout: str, memory: Memory) -> int:
    """The same by the op."""
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
