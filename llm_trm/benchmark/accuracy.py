"""Errors against float64, checked by the tolerance rule of ``trm_kernels.testing``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from llm_trm.benchmark.models import State, reference_network, written_out
from llm_trm.benchmark.steps import Inputs, Step
from llm_trm.benchmark.training import float64_gradients
from llm_trm.benchmark.workloads import Case
from trm_kernels.testing import ErrorPool, ToleranceRule

#: Maximum B * L * D per chunk of the float64 run, which needs about 3 KB per element.
_CHUNK_ELEMENTS = 2**22


def float64_truth(case: Case, state: State, inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients of the reference in float64 on input set 0, by the names of :meth:`Step.results`.

    The batch is processed in chunks, since samples are independent and parameter gradients add up over them.
    """
    size = max(1, _CHUNK_ELEMENTS // (case.latents * case.hidden_size))
    if case.mode == "step":
        return float64_gradients(case, state, inputs, size)
    x, y, z = inputs[0]
    # MPS has no float64.
    device = torch.device("cpu") if x.device.type == "mps" else x.device
    wide = {name: tensor.to(device, torch.float64) for name, tensor in state.items()}
    model = written_out(reference_network)(case, wide)
    parts: dict[str, list[Tensor]] = {"output": [], "x": []}
    sums: dict[str, Tensor] = {}
    for start in range(0, case.batch, size):
        rows = slice(start, start + size)
        question, answer, latent, grad_y = (
            tensor[rows].to(device, torch.float64) for tensor in (x, y, z, inputs.grad_y)
        )
        chunk = Inputs([question], [answer], [latent], grad_y, inputs.labels, inputs.head)
        step = Step(replace(case, batch=len(grad_y)), model, chunk)
        step(0)
        for name, tensor in step.results():
            if name in parts:
                parts[name].append(tensor)
            else:
                sums[name] = sums[name] + tensor if name in sums else tensor
    return {name: torch.cat(tensors) for name, tensors in parts.items() if tensors} | sums


def errors(results: Iterable[tuple[str, Tensor]], truth: dict[str, Tensor]) -> dict[str, ErrorPool]:
    """Relative Frobenius errors of the output and, in training, of all gradients together.

    Each gradient is first scaled to unit norm, so that a wrong bias is not hidden by the weights.
    """
    pools: dict[str, ErrorPool] = {}
    for name, actual in results:
        expected = truth[name]
        if actual.shape != expected.shape:
            raise RuntimeError(f"{name} has shape {list(actual.shape)}, expected {list(expected.shape)}")
        norm = float(expected.norm())
        scale = 1.0 if name == "output" or norm == 0.0 else 1.0 / norm
        difference = actual.detach().to(expected.device, torch.float64) - expected
        pool = pools.setdefault("output" if name == "output" else "gradients", ErrorPool())
        pool.difference += float(difference.norm()) ** 2 * scale**2
        pool.reference += norm**2 * scale**2
    return pools


def broken_rules(dtype: torch.dtype, ours: dict[str, ErrorPool], eager: dict[str, ErrorPool]) -> list[str]:
    """One line for each pool that violates the tolerance rule."""
    return ToleranceRule(dtype, {name: (pool, eager[name]) for name, pool in ours.items()}).failures()
