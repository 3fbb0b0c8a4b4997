"""Complete recursions without gradients, replayed as CUDA graphs."""

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
    """:func:`~trm_kernels.deep_recursion` without gradients, with one CUDA graph per shape bucket.

    Calls that cannot use a graph (no CUDA device, hooks, ...) run the plain recursion;
    :func:`trm_kernels.graph_status` counts them by reason.

    Shapes are rounded up, so that a few graphs cover many shapes. Padded samples are removed from the result.
    A mask excludes padded positions and is created if the call passes none. The result of a padded call
    equals that of a plain call within rounding, and that of a plain call on the padded inputs bit for bit.

    Args:
        net: The network, called as ``net(h)`` or ``net(h, mask=mask)``.
        n, T, output_norm: See :func:`~trm_kernels.deep_recursion`.
        batch: Rounds the batch size up; None keeps it.
        length: Rounds the length up; None keeps it, and ``"auto"`` rounds it if the network accepts a mask.
        modules: Modules that ``net`` and ``output_norm`` read, if these are plain functions.
        frozen: Whether the weights of the networks stay constant, so that no replay folds them again. See
            :func:`~trm_kernels.frozen`; applies until :meth:`thaw`, or for the lifetime of this object.
        clone, cache: See :class:`~trm_kernels.graphs.GraphedFunction`.
        **options: Other options of :func:`~trm_kernels.deep_recursion`.

    Raises:
        ValueError: If ``length`` is set for a network that accepts no mask.

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
        masked = _accepts_mask(net)
        if isinstance(length, str):
            if length != "auto":
                raise ValueError(f"length must be a bucket, None or 'auto', not {length!r}")
            length = eighths if masked else None
        elif length is not None and not masked:
            raise ValueError(
                "this network accepts no mask, so padding would change its results: length must be None"
            )
        arguments.integer("n", n, 0)
        arguments.integer("T", T, 1)
        self.n, self.T = n, T
        buckets = {axis: bucket for axis, bucket in (("B", batch), ("L", length)) if bucket is not None}
        read = [module for module in (net, output_norm, *modules) if isinstance(module, nn.Module)]
        self._end_freeze = finalize(self, Frozen(*read).open().close) if frozen else None
        # A partial, not a method: it holds no reference to this object, whose deletion ends the freeze.
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
        """Run the recursion without gradients on x, y, z [B, L, D] and mask [B, L]; returns (y, z)."""
        with torch.no_grad():
            return self.graphed(x, y, z, mask)

    def thaw(self) -> None:
        """End the freeze of ``frozen=True``: later calls compute with the current weights."""
        if self._end_freeze is not None:
            self._end_freeze()


def _recursion(
    net: Network, x: Tensor, y: Tensor, z: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    return deep_recursion(net, x, y, z, mask=mask, **options)


def graphed(net: Network, n: int, T: int, **options: Any) -> GraphedRecursion:
    """Build a :class:`GraphedRecursion`: ``y, z = graphed(net, n=6, T=3)(x, y, z, mask=mask)``."""
    return GraphedRecursion(net, n, T, **options)


def _accepts_mask(net: Network) -> bool:
    config = getattr(net, "config", None)
    if getattr(config, "mixer", None) == "tokens":
        return False
    function = net.forward if isinstance(net, nn.Module) else net
    try:
        return "mask" in inspect.signature(function).parameters
    except ValueError:  # a builtin
        return False
