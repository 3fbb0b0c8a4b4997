"""Captured code never waits for the device or copies from the host, which a capture forbids.

The tests use ``meta`` tensors in place of GPU tensors: they have no data to wait for, and an operation on
both a meta and a host tensor is a copy. Triton kernels are recorded, not launched. Not covered:
``torch.tensor``, and torch's fused AdamW, which does not support meta tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_trm.choices import CellLoss, HaltLoss
from llm_trm.models.puzzle.losses import puzzle_loss
from llm_trm.models.puzzle.paper import PuzzleTRM, PuzzleTRMConfig
from llm_trm.models.sequence_trm import SequenceTRM
from llm_trm.train.phase2.losses import Halting, SupervisionLoss
from tests.backend_double import alter
from tests.test_training import BATCH, LENGTH, Sorter
from trm_kernels import (
    JointOptimizer,
    Packing,
    ParameterAverage,
    SparseSignSGD,
    TinyRecursiveNetwork,
    TrainingStep,
    capturable_adam_atan2,
    deep_recursion,
    use_backend,
)

pytestmark = pytest.mark.interpreter

META = torch.device("meta")
#: Operations that read a number, or the size of their result, from the device.
_FORBIDDEN = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2"}


class Watch(TorchDispatchMode):
    """Records operations that wait for the device, or that mix host and device tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.name.removeprefix("aten::") in _FORBIDDEN:
            self.found.append(func.name())
        out = func(*args, **(kwargs or {}))
        devices = {leaf.device for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
        if len(devices) > 1:
            self.found.append(f"{func.name()} on {devices}")
        return out


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Record launches, and treat ``meta`` tensors as GPU tensors."""
    from trm_kernels.ops import _launch
    from trm_kernels.ops import recursion as op
    from trm_kernels.ops._library import wants_gradient

    def recursion(*arguments: Any) -> Any:
        return (op._differentiable if wants_gradient(*arguments) else op._recursion)(*arguments)

    # Call the implementations of the ops, because the dispatcher would only compute shapes for meta tensors.
    monkeypatch.setattr(op, "recursion", recursion)
    monkeypatch.setattr(op, "recursion_saving", op._recursion_saving)
    monkeypatch.setattr(op, "recursion_gradient", op._recursion_backward)
    alter(monkeypatch, "triton", refuses=lambda *_: None)
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda *_: False
    )  # which does not support the meta device
    with use_backend("triton"), _launch.record(_launch.TARGETS["sm_90"]) as launches:
        yield launches


def test_the_watch_detects_what_a_capture_forbids() -> None:
    x = torch.empty(3, device=META)
    with Watch() as watch:
        torch.where(x > 0, x, 0.0).masked_fill_(x > 0, 2.0)
    assert not watch.found
    for culprit in (
        lambda: torch.ones(3).to(META),
        lambda: x.sum().item(),
        lambda: x.nonzero(),
    ):
        watch = Watch()
        try:
            with watch:
                culprit()
        except (NotImplementedError, RuntimeError):  # meta tensors have no data
            pass
        assert watch.found, culprit


def watched(step: TrainingStep, *batch: Tensor) -> list[str]:
    """Return the operations of a step that a capture forbids."""
    program = step._program(batch)
    step._run(program)  # warms up
    with Watch() as watch:
        step._run(program)
    return watch.found


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step(backend: str, packed: bool, recorded: list[Any]) -> None:
    with META:
        model = Sorter(width=64, dropout=0.1, backend=backend)
    step = TrainingStep(
        model.net,
        model.loss,
        capturable_adam_atan2(model.parameters(), 1e-3),
        n=2,
        T=2,
        output_norm=model.output_norm,
        embed=model.embed,
        mask=lambda tokens, labels, mask: Packing.of(mask) if packed else mask,
        initial=model.initial,
        modules=[model],
        clip_norm=1.0,
        average=ParameterAverage(model.parameters()),
        supervision_steps=2,
        max_steps=4,
        exploration=0.1,
        skip_nonfinite=True,
    )
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64, device=META)
    assert not watched(step, tokens, tokens, torch.ones(BATCH, LENGTH, device=META))
    kernels = {launch.kernel.__name__ for launch in recorded}
    assert ({"weight_gradient_kernel", "attention_backward_q_kernel"} <= kernels) == (backend == "triton")


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["seed", "scratch", "paper"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_recursion_without_gradient(
    backend: str, dtype: torch.dtype, family: str, masked: bool, recorded: list[Any]
) -> None:
    with META:
        net = TinyRecursiveNetwork(64, 2, 4, family=family, backend=backend).to(dtype).eval()
        norm = None if family == "paper" else nn.RMSNorm(64, dtype=dtype)
    x, y, z = (torch.empty(2, 20, 64, dtype=dtype, device=META) for _ in range(3))
    mask = torch.ones(2, 20, dtype=torch.uint8, device=META) if masked else None
    read = torch.zeros(2, 1, dtype=torch.int64, device=META)
    with torch.no_grad(), Watch() as watch:
        deep_recursion(net, x, y, z, 2, 2, mask=mask, output_norm=norm)
        deep_recursion(net, x, y, z, 2, 2, mask=mask, output_norm=norm, read=read)
    assert not watch.found
    assert any(launch.kernel.__name__ == "gemm_kernel" for launch in recorded) == (backend == "triton")


@pytest.mark.parametrize("cell_loss", ["stablemax", "softmax"])
def test_a_step_of_the_puzzle_recipe(cell_loss: CellLoss, recorded: list[Any]) -> None:
    config = PuzzleTRMConfig(5, 6, 3, d_model=64, n_heads=2, puzzle_len=1, puzzle_dim=8)
    with META:
        model = PuzzleTRM(config).train()
        model.puzzle_emb.allocate(BATCH)
        rate = torch.empty((), device=META)
        rows = SparseSignSGD([model.puzzle_emb], rate, capturable=True)
    step = TrainingStep(
        model.net,
        lambda y, z, inputs, labels, puzzles: puzzle_loss(*model.heads(y), labels, cell_loss),
        JointOptimizer([capturable_adam_atan2(model.parameters(), 1e-3), rows]),
        n=1,
        T=2,
        embed=lambda inputs, labels, puzzles: model.embed(inputs, puzzles),
        initial=model.initial,
        clip_norm=1.0,
        max_steps=4,
        exploration=0.1,
        skip_nonfinite=True,
    )
    tokens = torch.zeros(BATCH, 6, dtype=torch.uint8, device=META)
    assert not watched(step, tokens, tokens, torch.zeros(BATCH, dtype=torch.int64, device=META))
    assert recorded


@pytest.mark.parametrize("halt", ["mse", "bce"])
@pytest.mark.parametrize("leaves", ["none", "sample", "batch"])
def test_a_step_of_phase_2(halt: HaltLoss, leaves: Halting, recorded: list[Any]) -> None:
    with META:
        model = SequenceTRM(64, 1, 2)
        loss = SupervisionLoss(model.halt_logits, BATCH, halt=halt, leaves=leaves)

    def mask(context: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        return model.extend_mask(mask) * ~loss.left[:, None]

    step = TrainingStep(
        model.net,
        loss,
        capturable_adam_atan2(model.parameters(), 1e-3),
        n=1,
        T=2,
        output_norm=model.output_norm,
        embed=lambda context, mask, target: model.embed(context),
        mask=mask,
        clip_norm=1.0,
        skip_nonfinite=True,
    )
    context, target = torch.empty(BATCH, 7, 64, device=META), torch.empty(BATCH, 64, device=META)
    assert not watched(step, context, torch.ones(BATCH, 7, dtype=torch.bool, device=META), target)
    assert recorded
