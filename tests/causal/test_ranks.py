"""Tests that two processes that think at different positions run the same passes, with one's results."""

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

from tests.causal.tiny import REASONERS, THINK, tiny_trm

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)

#: Samples of two processes: with two and one ``<think>``, and with none.
ROWS = (
    [[5, 6, THINK, 7, 8, THINK, 9, 10], [11, 12, 13, 14, 15, THINK, 16, 17]],
    [[18, 19, 20, 21, 22, 23, 24, 25], [26, 27, 28, 29, 3, 4, 5, 6]],
)


def gradients(model: nn.Module, rows: list[list[int]]) -> dict[str, Tensor]:
    """Gradients of the mean loss by parameter name."""
    ids = torch.tensor(rows)
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name.removeprefix("module."): weight.grad for name, weight in model.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def entry(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=len(ROWS), timeout=timedelta(seconds=60)
    )
    try:
        for reasoner in REASONERS:
            model = tiny_trm(reasoner=reasoner, halting="none").train()
            wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
            found = gradients(wrapped, ROWS[rank])
            # A single process runs only the rounds that its own samples need.
            model.model._rounds = lambda think, first: int(think.sum(1).max())
            expected = gradients(model, [row for rows in ROWS for row in rows])
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                bound = 1e-5 * gradient.abs().max().item()
                torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=bound, msg=name)
    finally:
        dist.destroy_process_group()


def test_one_process_thinks_and_the_other_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    mp.spawn(entry, args=(str(tmp_path / "store"),), nprocs=len(ROWS))
