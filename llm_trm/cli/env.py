"""``llm-trm env``."""

from __future__ import annotations

import json
from typing import Any

import click


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
    from trm_kernels import backends, dispatch, graphs

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
def env(as_json: bool) -> None:
    """Print versions, devices, and which backends work here.

    A backend that does not work is printed with its reason, and each device with the backend that `auto`
    takes on it. Whether CUDA graphs work is found out by capturing a tiny one.

    \b
    Examples:
      llm-trm env
      llm-trm env --json > env.json
    """
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
