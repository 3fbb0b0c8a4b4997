"""Measures memory and speed of SmolLM3-3B's shape with random weights in users' commands."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.gpu.context import Context
from bench.pretend import pretending
from llm_trm.benchmark.protocol import synchronize

#: HuggingFaceTB/SmolLM3-3B's config.json, read 2026-11. Every fourth layer has no RoPE.
SMOLLM3_3B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 65536,
    "no_rope_layer_interval": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0},
    "tie_word_embeddings": True,
}
_PATIENCE = 30.0


def run(context: Context) -> None:
    """Measure the full shape on the GPU."""
    line = measure(SMOLLM3_3B, torch.device("cuda"), lambda what: context.doing(what, _PATIENCE))
    print(line, flush=True)
    context.line({"name": context.task.name} | line)


def measure(
    settings: dict[str, Any],
    device: torch.device,
    doing: Callable[[str], None],
    *,
    problems: int = 8,
    new_tokens: int = 64,
) -> dict[str, Any]:
    """Think about a few problems as in ``llm-trm datagen``, then generate with an untrained recursion.

    Args:
        settings: Settings of the decoder.
        device: Device of the model.
        doing: Called with a description of each step.
        problems: Number of problems, which are processed in one batch.
        new_tokens: Number of tokens of the thinking and of an answer.

    Returns:
        Seconds, peak GPU memory in bytes, and tokens per second.
    """
    from llm_trm.data.generation import ThinkingDataGenerator
    from llm_trm.data.generation_config import DataGenConfig, Limits
    from llm_trm.data.tags import END_THINK, THINK
    from llm_trm.models.causal import TRMForCausalLM
    from llm_trm.models.loading import ThinkingModel
    from llm_trm.models.tiny import tiny_tokenizer

    doing("building the model")
    tokenizer: Any = tiny_tokenizer()
    model = build(settings, tokenizer, device)
    think, end_think = tokenizer.convert_tokens_to_ids([THINK, END_THINK])
    doing("datagen")
    line: dict[str, Any] = {}
    with _measured(line, "datagen", device), tempfile.TemporaryDirectory() as folder:
        config = DataGenConfig(
            model="random weights",
            output=Path(folder) / "pairs",
            num_samples=problems,
            batch_size=problems,
            limits=Limits(thinking=new_tokens),
            device=device.type,  # type: ignore[arg-type]
        )
        thinking = ThinkingModel(config.model, model, tokenizer, think, end_think)
        line["pairs"] = ThinkingDataGenerator(config, model=thinking).run().samples
    if pretending():
        return line  # the rest reads positions of tokens, which a simulated GPU cannot provide
    recursive: Any = TRMForCausalLM.wrap(
        model,
        think_token_id=think,
        end_think_token_id=end_think,
        num_latents=min(256, settings["hidden_size"]),
    )
    recursive.to(device, model.dtype).eval()
    prompts = torch.randint(32, 128, (problems, 64), device=device)
    prompts[:, -1] = think
    for name in ("warm-up", "generate"):  # the warm-up compiles
        doing(name)
        with _measured(line, name, device):
            tokens = recursive.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
            )
    line["tokens_per_s"] = problems * (tokens.shape[1] - prompts.shape[1]) / line["generate seconds"]
    return line


@contextmanager
def _measured(line: dict[str, Any], name: str, device: torch.device) -> Iterator[None]:
    """Record the duration in seconds and, on a GPU, the peak memory in bytes."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.monotonic()
    yield
    synchronize(device)
    line[f"{name} seconds"] = time.monotonic() - start
    if device.type == "cuda":
        line[f"{name} peak bytes"] = torch.cuda.max_memory_allocated(device)


def build(settings: dict[str, Any], tokenizer: Any, device: torch.device) -> Any:
    """A bfloat16 decoder with these settings and random weights on ``device``."""
    from transformers import AutoModelForCausalLM, SmolLM3Config

    config = SmolLM3Config(
        **settings,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    return model.eval().requires_grad_(False)
