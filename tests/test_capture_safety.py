"""Nothing that goes into a graph waits for the device or copies from the host, which a capture forbids.

Seen on ``meta`` tensors, which take the place of those on a GPU: they hold no data to wait for, and an
operation that has one of them and one of the host is a copy. Triton's kernels are recorded, not launched.
Not seen: ``torch.tensor``, and torch's own fused AdamW, which runs on no such tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.test_training import BATCH, LENGTH, Sorter
from trm_kernels import (
    Packing,
    ParameterAverage,
    TinyRecursiveNetwork,
    TrainingStep,
    capturable_adam_atan2,
    deep_recursion,
)

pytestmark = pytest.mark.interpreter

META = torch.device("meta")
#: What reads a number, or the size of its result, from the device.
_FORBIDDEN = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2"}


class Watch(TorchDispatchMode):
    """Notes operations that wait for the device, or have tensors here and there."""

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
    """The launches; ``meta`` tensors are served as those of a GPU."""
    from trm_kernels import fused_checks
    from trm_kernels.ops import _launch
    from trm_kernels.ops import recursion as op
    from trm_kernels.ops._library import wants_gradient

    def recursion(*arguments: Any) -> Any:
        return (op._differentiable if wants_gradient(*arguments) else op._recursion)(*arguments)

    # What the ops run, where the dispatcher would have such tensors give shapes alone.
    monkeypatch.setattr(op, "recursion", recursion)
    monkeypatch.setattr(op, "recursion_saving", op._recursion_saving)
    monkeypatch.setattr(op, "recursion_gradient", op._recursion_backward)
    monkeypatch.setattr(fused_checks, "refuses", lambda *_: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no meta device
    with _launch.record(_launch.TARGETS["sm_90"]) as launches:
        yield launches


def test_the_watch_sees_what_a_capture_forbids() -> None:
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
        except (NotImplementedError, RuntimeError):  # there is no data
            pass
        assert watch.found, culprit


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
    program = step._program((tokens, tokens, torch.ones(BATCH, LENGTH, device=META)))
    step._run(program)  # warms up
    recorded.clear()
    with Watch() as watch:
        step._run(program)
    assert not watch.found
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
