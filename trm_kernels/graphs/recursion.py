"""Whole recursions without gradient, replayed as CUDA graphs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn

from trm_kernels import arguments
from trm_kernels.graphs.buckets import Bucket, eighths
from trm_kernels.graphs.cache import GraphCache
from trm_kernels.graphs.function import GraphedFunction
from trm_kernels.prepared import Frozen
from trm_kernels.recursion import Network, deep_recursion


class GraphedRecursion:
    """:func:`~trm_kernels.deep_recursion` without gradient, one CUDA graph for each bucket of shapes.

    Calls that no graph can serve (no CUDA device, hooks, ...) run the recursion as it is, visibly:
    :func:`trm_kernels.graph_status` counts them by reason.

    Shapes are rounded up, so that few graphs serve many. Padded samples are dropped from the result. Padded
    positions are masked out, by a mask that is made where the call gives none: a padded call computes what
    the plain one does within rounding, and bit for bit what the plain one does on the padded inputs.

    Args:
        net: The network; called as ``net(h)`` or ``net(h, mask=mask)``.
        n, T, output_norm: As for :func:`~trm_kernels.deep_recursion`.
        batch: How the batch size is rounded up; None keeps it.
        length: How the length is rounded up; None keeps it, and ``"auto"`` rounds it for a network that takes
            a mask.
        modules: Modules that ``net`` and ``output_norm`` read, where these are plain functions.
        frozen: Whether the networks keep their weights, so that no replay has to fold them again:
            :func:`~trm_kernels.frozen`, until :meth:`thaw` or as long as this object lives.
        clone, cache: As for :class:`~trm_kernels.graphs.GraphedFunction`.
        **options: Further options of :func:`~trm_kernels.deep_recursion`.

    Raises:
        ValueError: ``length`` is given for a network that takes no mask.

    Example:
        >>> fast = GraphedRecursion(net, n=6, T=3)
        >>> y, z = fast(x, y, z, mask=mask)
    """

    def __init__(
        self,
        net: Network,
        n: int,
        T: int,
        *,
        output_norm: Callable[[Tensor], Tensor] | None = None,
        batch: Bucket | None = eighths,
        length: Bucket | str | None = "auto",
        modules: Iterable[nn.Module] = (),
        frozen: bool = False,
        clone: bool = True,
        cache: GraphCache | None = None,
        **options: Any,
    ) -> None:
        masked = _takes_mask(net)
        if isinstance(length, str):
            if length != "auto":
                raise ValueError(f"length must be a bucket, None or 'auto', not {length!r}")
            length = eighths if masked else None
        elif length is not None and not masked:
            raise ValueError(
                "this network takes no mask, so that padding would change its results: length must be None"
            )
        arguments.whole("n", n, 0)
        arguments.whole("T", T, 1)
        self.n, self.T = n, T
        buckets = {axis: bucket for axis, bucket in (("B", batch), ("L", length)) if bucket is not None}
        read = [module for module in (net, output_norm, *modules) if isinstance(module, nn.Module)]
        self._promise = finalize(self, Frozen(*read).open().close) if frozen else None
        # It does not hold this object, which ends its promise as soon as nobody holds it.
        recursion = functools.partial(
            _recursion, net, n=n, T=T, output_norm=output_norm, with_gradients=False, **options
        )
        self.graphed = GraphedFunction(
            recursion,
            modules=read,
            axes=("BL", "BL", "BL", "BL"),
            out_axes=("BL", "BL"),
            buckets=buckets,
            masks={3: "L"},
            clone=clone,
            cache=cache,
        )

    def __call__(
        self, x: Tensor, y: Tensor, z: Tensor, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run n T net calls without gradient: x, y, z [B, L, D], mask [B, L] or None; gives (y, z)."""
        with torch.no_grad():
            return self.graphed(x, y, z, mask)

    def thaw(self) -> None:
        """End what ``frozen=True`` began: from here on calls compute with the weights as they are."""
        if self._promise is not None:
            self._promise()


def _recursion(
    net: Network, x: Tensor, y: Tensor, z: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    return deep_recursion(net, x, y, z, mask=mask, **options)


def graphed(net: Network, n: int, T: int, **options: Any) -> GraphedRecursion:
    """A :class:`GraphedRecursion` of ``net``: ``y, z = graphed(net, n=6, T=3)(x, y, z, mask=mask)``."""
    return GraphedRecursion(net, n, T, **options)


def _takes_mask(net: Network) -> bool:
    config = getattr(net, "config", None)
    if getattr(config, "mixer", None) == "tokens":
        return False
    function = net.forward if isinstance(net, nn.Module) else net
    try:
        return "mask" in inspect.signature(function).parameters
    except ValueError:  # a builtin
        return False
