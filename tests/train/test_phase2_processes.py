"""Phase 2 in processes that are killed, and in two that share the work."""

from __future__ import annotations

import multiprocessing
import signal
import socket
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trm.files import read_json
from llm_trm.train.run.checkpoints import Checkpoints
from llm_trm.weights import read_tensors
from tests.killing import check_kills, finished
from tests.train import worker
from tests.train.toy import content_of, write_toy


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.train.worker"])
    return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


def test_killed_at_random_moments_ends_with_the_same_weights(
    context: ForkServerContext, toy: Path, tmp_path: Path
) -> None:
    options = {"epochs": 3, "save_every": 2, "dropout": 0.1, "halt_loss": "bce", "track": "jsonl"}

    def start(output: Path) -> BaseProcess:
        process = context.Process(target=worker.run, args=(toy, output, options))
        process.start()
        return process

    check_kills(start, content_of, tmp_path, kills=20)


def share(
    context: ForkServerContext,
    toy: Path,
    output: Path,
    options: dict[str, Any],
    stop_after: int | None = None,
    number: int | None = None,
) -> list[int | None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (toy, output, options, stop_after, number)
    processes: list[BaseProcess] = [
        context.Process(target=worker.run_rank, args=(rank, 2, port, *arguments)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    return finished(processes)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("steps_per_update", [1, 2])
def test_two_processes_do_what_one_does_with_twice_the_batch(
    steps_per_update: int, context: ForkServerContext, toy: Path, tmp_path: Path
) -> None:
    # Adam makes whole steps of a gradient that is zero but for rounding: that of the biases of keys, which
    # softmax cancels. They are left out.
    options = {"epochs": 2, "learning_rate": 1e-3, "steps_per_update": steps_per_update}
    one, two = tmp_path / "one", tmp_path / "two"
    assert share(context, toy, two, options | {"batch_size": 4}) == [0, 0]
    process = context.Process(target=worker.run, args=(toy, one, options | {"batch_size": 8}))
    process.start()
    assert finished([process]) == [0]

    ends = [Checkpoints(output).last for output in (one, two)]
    histories = [read_json(end / "state.json", "")["history"] for end in ends]
    for alone, shared in zip(*histories, strict=True):
        for part in ("train", "validation"):
            for name in ("mse", "cosine", "relative_error"):
                assert shared[part][name] == pytest.approx(alone[part][name], rel=1e-4), name
    weights = [read_tensors(end / "state.safetensors", "") for end in ends]
    for name, alone in weights[0].items():
        if name.startswith(("weights.", "average.")):
            shared = weights[1][name]
            if name.endswith("in_proj_bias"):
                alone, shared = (torch.cat((bias.chunk(3)[0], bias.chunk(3)[2])) for bias in (alone, shared))
            torch.testing.assert_close(shared, alone, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_go_on_bit_for_bit(context: ForkServerContext, toy: Path, tmp_path: Path) -> None:
    options = {"epochs": 2, "batch_size": 4, "save_every": 3, "dropout": 0.1, "halt_loss": "bce"}
    assert share(context, toy, tmp_path / "a", options) == [0, 0]
    assert share(context, toy, tmp_path / "b", options, stop_after=5)[0] == 7
    assert share(context, toy, tmp_path / "b", options) == [0, 0]
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_a_signal_to_one_process_stops_both_after_the_same_batch(
    context: ForkServerContext, toy: Path, tmp_path: Path
) -> None:
    # They agree every second batch. The main process alone is sent the signal, after the first one.
    options = {"epochs": 2, "batch_size": 4, "dropout": 0.1, "log_every": 2}
    assert share(context, toy, tmp_path / "a", options) == [0, 0]
    assert share(context, toy, tmp_path / "b", options, 1, signal.SIGTERM) == [9, 9]
    assert Checkpoints(tmp_path / "b").last.name == "batch-00000002"
    assert share(context, toy, tmp_path / "b", options) == [0, 0]
    last = Checkpoints(tmp_path / "a").last
    ends = [
        read_tensors(tmp_path / name / "checkpoints" / last.name / "state.safetensors", "") for name in "ab"
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
