"""FSDP2 on two processes of a CPU: training gives what data parallelism gives, and goes on after a break.

accelerate shards on accelerators alone, though torch can on CPUs; so the processes here tell it to.
"""

from __future__ import annotations

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

from llm_trm.train.lora.config import LoraTrainingConfig, ReasonerSettings
from tests.causal.lora_world import SMALL, settings, write_language_model, write_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
    ),
]

PROCESSES = 2
#: AdamW's first steps are as long as the learning rate.
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
    """Make accelerate's state that of FSDP where it would be that of processes on CPUs."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    begin = AcceleratorState.__init__

    def begin_sharded(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = options.get("fsdp_plugin") or FullyShardedDataParallelPlugin()

    AcceleratorState.__init__ = begin_sharded


def entry(rank: int, config: LoraTrainingConfig, port: int, sharded: bool) -> None:
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
    train.train_lora(config)


def run(config: LoraTrainingConfig, *, sharded: bool) -> dict[str, torch.Tensor]:
    """Train in two processes; what was saved."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(entry, args=(config, port, sharded), nprocs=PROCESSES)
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
        reasoner=ReasonerSettings(reasoner=reasoner, **size, **SMALL),
        steps=4,
        eval_every=2,
        learning_rate=RATE,
    )
    expected = run(config, sharded=False)
    whole = replace(config, output=tmp_path / "sharded")
    found = run(whole, sharded=True)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        # A key's bias has no gradient but rounding errors, which AdamW makes as large as any.
        if "in_proj_bias" not in name:
            torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-2 * RATE, msg=name)
    shutil.rmtree(whole.output / "checkpoint-4")
    (whole.output / "latent.json").unlink()
    again = run(replace(whole, resume=True), sharded=True)
    for name, weight in found.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=2e-2 * RATE, msg=name)
