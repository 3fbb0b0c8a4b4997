"""Identifies the machine, and checks the kernels on it."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from bench.gpu.context import Context
from llm_trm.benchmark import limits
from llm_trm.benchmark.environment import run_record
from trm_kernels import TinyRecursiveNetwork


def run(context: Context) -> None:
    """Emit the run's metadata and the measured limits. Raises RuntimeError if there is no CUDA GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("bench.gpu needs a CUDA GPU, but PyTorch sees none")
    device = torch.device("cuda")
    context.doing("loading the libraries", context.left)
    _load_libraries(device)
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


def _load_libraries(device: torch.device) -> None:
    """Load the libraries for the checks, so that five parallel checks do not read a cold disk at once."""
    query = torch.randn(1, 1, 64, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    F.scaled_dot_product_attention(query, query, query).sum().backward()  # cuDNN on Hopper
    torch.mm(*(torch.randn(64, 64, device=device, dtype=torch.float64) for _ in range(2)))
    net = TinyRecursiveNetwork(64, 1, 1, backend="triton").to(device, torch.bfloat16)
    with torch.no_grad():
        net(torch.randn(1, 64, 64, device=device, dtype=torch.bfloat16))
    torch.cuda.synchronize(device)


def run_check(context: Context) -> None:
    """Run one check of :mod:`bench.gpu.smoke`."""
    from bench.gpu.smoke import CHECKS, Setting

    name = context.argument["check"]
    torch.manual_seed(0)
    start = time.monotonic()
    figures = CHECKS[name](Setting(torch.device("cuda")))
    seconds = round(time.monotonic() - start, 2)
    print(f"{context.task.name}: {figures}", flush=True)
    context.line({"name": context.task.name, "ok": True, "figures": figures, "seconds": seconds})
