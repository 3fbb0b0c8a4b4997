"""``llm-trm env``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from llm_trm.cli.options.types import BATCH, DEPTH, LENGTH, NO_OR_WIDTH, WIDTH
from llm_trm.memory import format_bytes


def _devices() -> list[dict[str, Any]]:
    import torch

    import trm_kernels

    found: list[dict[str, Any]] = [{"device": "cpu", "name": None, "capability": None}]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        found.append({"device": f"cuda:{index}", "name": name, "capability": f"{major}.{minor}"})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": None, "capability": None})
    for entry in found:
        with trm_kernels.use_backend("auto"), torch.no_grad(), torch.device(entry["device"]):
            choice = trm_kernels.TinyRecursiveNetwork(64).selected_backend(torch.randn(1, 16, 64))
        entry["auto"] = choice.name
        entry["passed_over"] = choice.passed_over
    return found


def report() -> dict[str, Any]:
    """Everything that ``llm-trm env`` prints."""
    import os

    import torch

    from llm_trm.benchmark.environment import run_record
    from trm_kernels import backends, graphs
    from trm_kernels.ops import dispatch

    record = run_record(torch.device("cpu"))
    return {
        "versions": record["versions"],
        "commit": record["commit"],
        "machine": {key: record["machine"][key] for key in ("cpu", "cpus", "threads", "os")},
        "devices": _devices(),
        "backends": {
            name: {"summary": backend.summary, "unavailable": backend.unavailable()}
            for name, backend in backends.BACKENDS.items()
        },
        "TRM_BACKEND": os.environ.get("TRM_BACKEND"),
        "graphs": {"unavailable": graphs.unavailable()},
        "TRM_GRAPHS": os.environ.get("TRM_GRAPHS"),
        "tiles": dispatch.describe(),
    }


_PLAN_OPTIONS = (
    click.option("--model", default="HuggingFaceTB/SmolLM3-3B", help="Language model: a name or a folder."),
    click.option(
        "--reasoner", type=click.Choice(["latents", "sequence"]), default="latents", help="What recurs."
    ),
    click.option("--latents", type=LENGTH, default=256, help="M latents of --reasoner latents."),
    click.option("--d-compressed", type=WIDTH, default=256, help="D' of --reasoner sequence."),
    click.option("--soft-tokens", type=DEPTH, default=1, help="K soft tokens of --reasoner sequence."),
    click.option("--context", type=LENGTH, default=4096, help="Tokens of a sample, with its answer."),
    click.option("--batch-size", type=BATCH, default=1, help="Samples at once."),
    click.option(
        "--dtype",
        type=click.Choice(["bf16", "fp16", "fp32"]),
        default="bf16",
        help="Of the weights that are not trained; those that are take float32.",
    ),
    click.option("--train/--inference", "training", default=True, help="With a backward pass, or without."),
    click.option("--lora-r", type=NO_OR_WIDTH, default=16, help="Rank of the adapters; 0 for none."),
    click.option(
        "--gradient-checkpointing", is_flag=True, help="Gradient checkpointing of the decoder's layers."
    ),
)


def _plan_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_PLAN_OPTIONS):
        command = option(command)
    return command


@click.command(context_settings={"show_default": True})
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for a bug report or a script.")
@click.option("--plan", is_flag=True, help="Print the memory that a language model with a recursion takes.")
@_plan_options
@click.pass_context
def env(ctx: click.Context, /, as_json: bool, plan: bool, **settings: Any) -> None:
    """Print versions, devices, and which backends work here.

    A backend that does not work is printed with its reason, and each device with the backend that `auto`
    takes on it. Whether CUDA graphs work is found out by capturing a tiny one.

    With --plan, print instead what a language model with a recursion takes: parameters, weights, optimizer,
    keys and values, activations. Its configuration alone is read, and that of SmolLM3-3B is known offline.
    Everything is counted but the activations, which are estimated. All other options need --plan.

    \b
    Examples:
      llm-trm env
      llm-trm env --json > env.json
      llm-trm env --plan --context 1024 --batch-size 4 --gradient-checkpointing
      llm-trm env --plan --inference --context 65000
      llm-trm env --plan --model arithmetic --reasoner sequence --d-compressed 32 --context 256
    """
    if plan:
        print_plan(plan_report(**settings), as_json)
        return
    given = click.core.ParameterSource.COMMANDLINE
    for name in settings:
        if ctx.get_parameter_source(name) == given:
            raise click.UsageError(f"--{name.replace('_', '-')} describes a plan: add --plan")
    facts = report()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)

    def line(key: str, value: object) -> None:
        console.print(f"  [bold]{key:<12}[/bold] {escape(str(value))}")

    console.print("[bold]versions[/bold]")
    for name, version in facts["versions"].items():
        line(name, version or "-")
    line("commit", facts["commit"] or "-")
    console.print("[bold]machine[/bold]")
    for key, value in facts["machine"].items():
        line(key, value)
    console.print("[bold]devices[/bold]")
    for entry in facts["devices"]:
        details = [entry["name"], entry["capability"] and f"compute capability {entry['capability']}"]
        details.append(f"auto takes {entry['auto']}")
        line(entry["device"], ", ".join(detail for detail in details if detail))
    console.print("[bold]backends[/bold]")
    for name, backend in facts["backends"].items():
        reason = backend["unavailable"]
        state = f"unavailable: {reason}" if reason else "available"
        line(name, f"{state} ({backend['summary']})")
    chosen, known = facts["TRM_BACKEND"] or "not set", ("auto", *facts["backends"])
    flaw = "" if chosen in ("not set", *known) else f" (unknown: choose from {', '.join(known)})"
    line("TRM_BACKEND", f"{chosen}{flaw}")
    reason = facts["graphs"]["unavailable"]
    line("CUDA graphs", f"unavailable, calls run without: {reason}" if reason else "available")
    line("TRM_GRAPHS", facts["TRM_GRAPHS"] or "not set")
    for text in facts["tiles"]:
        line("tiles", text)


def plan_report(
    *,
    model: str,
    reasoner: Any,
    latents: int,
    d_compressed: int,
    soft_tokens: int,
    context: int,
    batch_size: int,
    dtype: str,
    training: bool,
    lora_r: int,
    gradient_checkpointing: bool,
) -> dict[str, Any]:
    """Everything that ``llm-trm env --plan`` prints.

    Raises:
        InputError: No such model, or settings that describe none.
    """
    import torch

    from llm_trm.models.causal import TRMConfig
    from llm_trm.models.causal.plan import PlanSettings, decoder_config, make_plan

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    config = TRMConfig(
        decoder_config(model),
        reasoner=reasoner,
        num_latents=latents,
        d_compressed=d_compressed,
        soft_tokens=soft_tokens,
    )
    settings = PlanSettings(context, batch_size, dtypes[dtype], training, lora_r, gradient_checkpointing)
    plan = make_plan(config, settings)
    return {
        "model": model,
        "settings": {
            "reasoner": reasoner,
            "soft_tokens": config.tokens_per_thought,
            "context": context,
            "batch_size": batch_size,
            "dtype": dtype,
            "training": training,
            "lora_r": lora_r,
            "gradient_checkpointing": gradient_checkpointing,
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


def print_plan(facts: dict[str, Any], as_json: bool) -> None:
    """Print what :func:`plan_report` found."""
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    settings, found = facts["settings"], facts["bytes"]
    use = "training" if settings["training"] else "inference"
    console.print(
        f"[bold]{escape(facts['model'])}[/bold], {use}: {settings['batch_size']} x {settings['context']} "
        f"tokens, {settings['soft_tokens']} soft tokens a thought, {settings['dtype']}"
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
