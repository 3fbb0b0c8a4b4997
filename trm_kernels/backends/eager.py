"""The ``eager`` backend: the reference, plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from trm_kernels.backends import packed
from trm_kernels.backends.registry import ANYWHERE, Backend, PackedRecursion
from trm_kernels.module import FusedModule


def run(net: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    """Run the reference on ``x`` [B, L, D] and ``mask`` [B, L]."""
    return net.forward_eager(x, mask)


BACKEND = Backend(
    "eager",
    "the reference, plain PyTorch",
    unavailable=lambda: None,
    refuses=lambda net, x, mask: None,
    run=run,
    packed=PackedRecursion(packed.refuses, packed.run_recursion),
    auto=(ANYWHERE,),
)
