"""Two gloo processes, with DDP and with FSDP2 sharding complete networks, compared to one process."""

from __future__ import annotations

import copy
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tests.foreign import seed
from trm_kernels import RecursionMixin, TinyRecursiveNetwork, patch

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)

WORLD = 2


class Model(nn.Module, RecursionMixin):
    """A model with parameters outside its networks, so that sharding by network leaves some at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.net = TinyRecursiveNetwork(32, 2, 4)
        self.n_latent_steps, self.n_deep_recursions = 2, 2

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.deep_recursion(h, torch.zeros_like(h), torch.zeros_like(h))[0]


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return gradients of the mean over samples, by parameter name."""
    model(x).square().sum(dim=(1, 2)).mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def shared() -> tuple[Model, Tensor]:
    torch.manual_seed(7)
    return Model(), torch.randn(2 * WORLD, 5, 8)


def compare(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        bound = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=bound, msg=name)


def data_parallel(rank: int) -> None:
    model, x = shared()
    expected = step(copy.deepcopy(model), x)
    wrapped = nn.parallel.DistributedDataParallel(model)
    compare(step(wrapped, x.chunk(WORLD)[rank]), expected)


def sharded_by_network(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model, x = shared()
    expected = step(copy.deepcopy(model), x)
    fully_shard(model.net)
    fully_shard(model)
    gradients = step(model, x.chunk(WORLD)[rank])
    compare({name: gradient.full_tensor() for name, gradient in gradients.items()}, expected)
    torch.optim.AdamW(model.parameters(), 1e-3).step()
    assert torch.isfinite(model(x)).all()


def sharded_by_layer(rank: int) -> None:
    """patch() keeps a network whose layers are sharded separately, because its parent would see DTensors."""
    from torch.distributed.fsdp import fully_shard

    model = seed.TRM()
    for layer in model.net.layers:
        fully_shard(layer)
    report = patch(model)
    assert not report.swapped, report
    reason = report.entries[0].reason
    assert "has hooks" in reason or "DTensor" in reason, reason


CHECKS = (data_parallel, sharded_by_network, sharded_by_layer)


def entry(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    try:
        for check in CHECKS:
            check(rank)
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all checks with one start of the processes, which takes longer than the checks."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    mp.spawn(entry, args=(str(tmp_path / "store"),), nprocs=WORLD)
