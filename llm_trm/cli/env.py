"""``llm-trm env``."""

from __future__ import annotations

import json
from typing import Any

import click

from llm_trm.cli.memory_plan import PlanOptions, plan_report, print_plan
from llm_trm.cli.options.combinations import reject_given
from llm_trm.cli.options.settings import settings_options
from llm_trm.settings import settings_of


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
    """What ``llm-trm env`` prints."""
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


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for a bug report or a script.")
@click.option("--plan", is_flag=True, help="Print the memory that a language model with a recursion needs.")
@settings_options(PlanOptions, config_file=False)
@click.pass_context
def env(context: click.Context, /, as_json: bool, plan: bool, given: dict[str, Any]) -> None:
    """Print versions, devices, and which backends work here.

    A backend that does not work is printed with the reason, and each device with the backend that `auto`
    selects on it. CUDA graphs are tested by capturing a tiny one.

    With --plan, print instead what a language model with a recursion needs: parameters, weights, optimizer,
    keys and values, activations. Only its configuration is read, and that of SmolLM3-3B is known offline.
    Everything is counted, except the activations, which are estimated. All other options need --plan.

    \b
    Examples:
      llm-trm env
      llm-trm env --json > env.json
      llm-trm env --plan --context 1024 --batch-size 4 --gradient-checkpointing
      llm-trm env --plan --inference --context 65000
      llm-trm env --plan --model arithmetic --reasoner sequence --d-compressed 32 --context 256
    """
    if not plan:
        names = [one.name for one in settings_of(PlanOptions)]
        reject_given(context, names, "applies only to a plan: add --plan")
    facts = plan_report(PlanOptions(**given)) if plan else report()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    elif plan:
        print_plan(facts)
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
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
        details.append(f"auto selects {entry['auto']}")
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
    line("CUDA graphs", f"unavailable, calls run without them: {reason}" if reason else "available")
    line("TRM_GRAPHS", facts["TRM_GRAPHS"] or "not set")
    for text in facts["tiles"]:
        line("tiles", text)
