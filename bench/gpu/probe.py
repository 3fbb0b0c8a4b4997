"""What the machine is, and whether the kernels are right on it."""

from __future__ import annotations

import time

import torch

from bench.gpu.child import Context
from llm_trm.benchmark import limits
from llm_trm.benchmark.environment import run_record


def run(context: Context) -> None:
    """The run's record and the measured limits; raises RuntimeError where there is no CUDA GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("bench.gpu needs a CUDA GPU, and PyTorch sees none here")
    device = torch.device("cuda")
    record = run_record(device)
    record.pop("commit")
    measured = limits.measure(device, torch.bfloat16)
    figures = {
        "matmul_tflops": measured.flops * 1e-12,
        "copy_gbps": measured.bandwidth * 1e-9,
        "cache_mib": measured.cache_bytes / 2**20,
    }
    print(f"{record['machine']['device']}: {figures}, {record['versions']}", flush=True)
    context.line({"name": "probe", "record": record} | figures)


def run_check(context: Context) -> None:
    """One check of :mod:`bench.gpu.smoke`."""
    from bench.gpu.smoke import CHECKS, Setting

    name = context.argument["check"]
    torch.manual_seed(0)
    begun = time.monotonic()
    figures = CHECKS[name](Setting(torch.device("cuda")))
    seconds = round(time.monotonic() - begun, 2)
    print(f"{context.task.name}: {figures}", flush=True)
    context.line({"name": context.task.name, "ok": True, "figures": figures, "seconds": seconds})
