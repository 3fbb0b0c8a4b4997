"""The memory that a language model with a recursion needs, for ``llm-trm env --plan``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llm_trm.choices import ReasonerKind
from llm_trm.memory import format_bytes
from llm_trm.ranges import BATCH, DEPTH, LENGTH, NO_OR_WIDTH, WIDTH
from llm_trm.settings import Settings, setting


@dataclass(frozen=True)
class PlanOptions(Settings):
    """Options of ``llm-trm env --plan``."""

    model: str = setting("HuggingFaceTB/SmolLM3-3B", "Language model: a name on the hub, or a folder.")
    reasoner: ReasonerKind = setting("latents", "Kind of recursion.")
    num_latents: int = setting(
        256, "Number M of latents, with --reasoner latents.", LENGTH, was=("--latents",)
    )
    d_compressed: int = setting(256, "Width D' of the reasoning state, with --reasoner sequence.", WIDTH)
    soft_tokens: int = setting(1, "Number K of soft tokens, with --reasoner sequence.", DEPTH)
    context: int = setting(4096, "Tokens per sample, including its answer.", LENGTH)
    batch_size: int = setting(1, "Samples per batch.", BATCH)
    dtype: Literal["bf16", "fp16", "fp32"] = setting(
        "bf16", "Precision of the frozen weights; trained weights are float32."
    )
    training: bool = setting(True, "With a backward pass, or without.", None, "--train/--inference")
    lora_r: int = setting(16, "Rank of the adapters; 0 for none.", NO_OR_WIDTH)
    gradient_checkpointing: bool = setting(
        False, "Recompute the activations of the decoder's layers in the backward pass."
    )


def plan_report(asked: PlanOptions) -> dict[str, Any]:
    """What ``llm-trm env --plan`` prints.

    Raises:
        InputError: No such model, or settings that describe no model.
    """
    import torch

    from llm_trm.models.causal import TRMConfig
    from llm_trm.models.causal.plan import PlanSettings, decoder_config, make_plan

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    config = TRMConfig(
        decoder_config(asked.model),
        reasoner=asked.reasoner,
        num_latents=asked.num_latents,
        d_compressed=asked.d_compressed,
        soft_tokens=asked.soft_tokens,
    )
    settings = PlanSettings(
        asked.context,
        asked.batch_size,
        dtypes[asked.dtype],
        asked.training,
        asked.lora_r,
        asked.gradient_checkpointing,
    )
    plan = make_plan(config, settings)
    return {
        "model": asked.model,
        "settings": {
            "reasoner": asked.reasoner,
            "soft_tokens": config.tokens_per_thought,
            "context": asked.context,
            "batch_size": asked.batch_size,
            "dtype": asked.dtype,
            "training": asked.training,
            "lora_r": asked.lora_r,
            "gradient_checkpointing": asked.gradient_checkpointing,
        },
        "parameters": {
            "language model": plan.language_model,
            **{f"reasoner: {part}": count for part, count in plan.reasoner.items()},
            "adapters": plan.adapters,
            "trained": plan.trained,
        },
        "bytes": {
            "weights": plan.weights,
            "gradients": plan.gradients,
            "optimizer": plan.optimizer,
            "keys and values": plan.keys_and_values,
            "states": plan.states,
            "activations": plan.activations,
            "total": plan.total,
        },
        "devices": {
            torch.cuda.get_device_name(index): torch.cuda.get_device_properties(index).total_memory
            for index in range(torch.cuda.device_count())
        },
    }


def print_plan(facts: dict[str, Any]) -> None:
    """Print a plan of :func:`plan_report`."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    settings, found = facts["settings"], facts["bytes"]
    use = "training" if settings["training"] else "inference"
    console.print(
        f"[bold]{escape(facts['model'])}[/bold], {use}: {settings['batch_size']} x {settings['context']} "
        f"tokens, {settings['soft_tokens']} soft tokens per thought, {settings['dtype']}"
    )
    console.print("[bold]parameters[/bold]")
    for name, count in facts["parameters"].items():
        console.print(f"  {name:<24} {count:>15,}")
    console.print("[bold]memory[/bold]")
    for name, size in found.items():
        kind = "  (estimate)" if name == "activations" else ""
        console.print(f"  {name:<24} {format_bytes(size):>15}{kind}")
    for name, size in facts["devices"].items():
        verdict = "fits into" if found["total"] <= size else "[bold]does not fit into[/bold]"
        console.print(f"  {verdict} the {format_bytes(size)} of {escape(name)}")
