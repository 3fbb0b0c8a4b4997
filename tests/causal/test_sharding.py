"""Tests of FSDP2 with two CPU processes: it equals data parallelism, and resumes after an interruption.

accelerate only shards on accelerators, although torch supports CPUs, so the processes here override it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from llm_trm.errors import Interrupted
from llm_trm.train.lora.config import LoraTrainingConfig
from tests.causal.lora_world import settings, write_language_model, write_rows
from tests.train.signals import SignalAt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
    ),
]

PROCESSES = 2
#: AdamW's first steps are as large as the learning rate.
RATE = 1e-2
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "SmolLM3DecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def shard_on_cpus() -> None:
    """Make accelerate use FSDP instead of plain CPU processes."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    begin = AcceleratorState.__init__

    def begin_sharded(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = options.get("fsdp_plugin") or FullyShardedDataParallelPlugin()

    AcceleratorState.__init__ = begin_sharded


def entry(rank: int, config: LoraTrainingConfig, port: int, sharded: bool, stop_at: int) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    if sharded:
        os.environ |= SHARDED
        shard_on_cpus()
    from torch.distributed.tensor import DTensor
    from transformers import TrainerCallback

    from llm_trm.train.lora import train

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            kinds = [isinstance(weight, DTensor) for weight in model.parameters()]
            assert all(kinds) if sharded else not any(kinds)

    build = train.LatentTrainer

    def watched(*arguments: Any, **options: Any) -> Any:
        trainer = build(*arguments, **options)
        trainer.add_callback(Watch())
        return trainer

    train.LatentTrainer = watched
    with pytest.raises(Interrupted) if stop_at else contextlib.nullcontext():
        train.train_lora(config, SignalAt(stop_at))
    dist.destroy_process_group()  # gloo's threads may abort a process that exits with one


def run(config: LoraTrainingConfig, *, sharded: bool, stop_at: int = 0) -> None:
    """Train in two processes; the first one gets Ctrl-C at step ``stop_at``, if that is not 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(entry, args=(config, port, sharded, stop_at), nprocs=PROCESSES)


def saved(config: LoraTrainingConfig) -> dict[str, torch.Tensor]:
    return load_file(config.output / "adapter_model.safetensors")


@pytest.mark.parametrize("reasoner", ["sequence", "latents"])
def test_sharded_training_is_data_parallel_training(
    reasoner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    write_language_model(tmp_path / "lm")
    write_rows(tmp_path / "problems.jsonl")
    size = {"d_compressed": 16} if reasoner == "sequence" else {"num_latents": 3}
    config = settings(
        tmp_path,
        output=tmp_path / "parallel",
        reasoner={"reasoner": reasoner, **size},
        steps=4,
        eval_every=2,
        learning_rate=RATE,
    )
    run(config, sharded=False)
    expected = saved(config)
    whole = replace(config, output=tmp_path / "sharded")
    run(whole, sharded=True)
    found = saved(whole)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        # The gradient of a key's bias is only rounding errors, which AdamW scales to full size.
        if "in_proj_bias" not in name:
            torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-2 * RATE, msg=name)
    shutil.rmtree(whole.output / "checkpoint-4")
    (whole.output / "latent.json").unlink()
    run(replace(whole, resume=True), sharded=True)
    again = saved(whole)
    for name, weight in found.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=2e-2 * RATE, msg=name)
    # Both processes stop after a signal to one of them.
    stopped = replace(config, output=tmp_path / "stopped")
    run(stopped, sharded=True, stop_at=3)
    assert (stopped.output / "checkpoint-3").is_dir() and not (stopped.output / "latent.json").exists()
    run(replace(stopped, resume=True), sharded=True)
    again = saved(stopped)
    for name, weight in found.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=2e-2 * RATE, msg=name)
