"""Embeddings of which each step uses few rows, such as the puzzle embeddings of arXiv 2510.04871.

This module also contains their optimizer, and one that steps several optimizers together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from trm_kernels import arguments


class SparseEmbedding(nn.Module):
    """An embedding of which :class:`SparseSignSGD` updates only the rows that a batch uses.

    The table is a buffer, not a parameter: with one row per puzzle and a million puzzles, its gradient and
    moments would dominate the memory of training. In training, the rows of the batch are copied into
    ``rows``, which receives the gradient. All forward passes between two updates must use the same ids, as
    those of one :class:`~trm_kernels.TrainingStep` do.

    Args:
        num_embeddings: Number of rows N.
        width: Number of columns E.

    Attributes:
        weights: The table, float32 [N, E], initialised to zeros and saved with the module.
        rows: Rows of the latest batch, [B, E], the leaf that receives gradients; None before
            :meth:`allocate`.
        ids: Indices of these rows, int64 [B]; None before :meth:`allocate`.

    Example:
        >>> embedding = SparseEmbedding(num_puzzles, 512).to(device)
        >>> embedding.allocate(batch_size)
        >>> optimizer = SparseSignSGD([embedding], lr=1e-2, weight_decay=0.1)
    """

    weights: Tensor
    ids: Tensor | None

    def __init__(self, num_embeddings: int, width: int) -> None:
        super().__init__()
        arguments.integer("num_embeddings", num_embeddings, 1)
        arguments.integer("width", width, 1)
        self.register_buffer("weights", torch.zeros(num_embeddings, width, dtype=torch.float32))
        self.register_buffer("ids", None, persistent=False)
        # Not a buffer: modules move buffers between devices with operations that autograd would record.
        self.rows: Tensor | None = None

    def allocate(self, batch_size: int) -> None:
        """Allocate ``rows`` and ``ids`` for batches of ``batch_size``. Build the optimizer after this."""
        shape = (batch_size, self.weights.shape[1])
        self.rows = torch.zeros(
            shape, dtype=self.weights.dtype, device=self.weights.device, requires_grad=True
        )
        self.ids = torch.zeros(batch_size, dtype=torch.int64, device=self.weights.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseEmbedding:
        super()._apply(fn, recurse)
        if self.rows is not None:
            # Replace the data but keep the tensor, as modules do with parameters: the optimizer refers to it.
            self.rows.data = fn(self.rows.data)
            self.rows.grad = None
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows of the table.

        Args:
            ids: Integers: [B] in training, any shape without gradients.

        Returns:
            The rows [B, E]. In training this is always the same leaf ``rows``; in evaluation mode and under
            ``torch.no_grad`` it has no gradient.

        Raises:
            ValueError: In training, if the batch size differs from the allocated one. Without
                :meth:`allocate`, the first batch allocates.
        """
        # Predictions during training may have another batch size than the allocated one.
        if not self.training or not torch.is_grad_enabled():
            return F.embedding(ids, self.weights)
        if self.rows is None:
            self.allocate(ids.shape[0])
        assert self.rows is not None and self.ids is not None
        if ids.shape != self.ids.shape:
            raise ValueError(
                f"ids have shape {list(ids.shape)}, but {list(self.ids.shape)} was allocated: "
                "call allocate(batch_size), then build the optimizer"
            )
        with torch.no_grad():
            self.ids.copy_(ids)
            self.rows.copy_(F.embedding(self.ids, self.weights))
        return self.rows


class SparseSignSGD(Optimizer):
    """Sign-SGD with decoupled weight decay, only on the rows that a batch uses.

    Gradients of equal ids are summed; the new row is ``w * (1 - lr * weight_decay) - lr * sign(sum)``. Adam
    behaves similarly on rows that few batches use. A step consists only of device work, so a CUDA graph can
    capture it, and does nothing while ``found_inf`` is set (see :class:`~trm_kernels.AdamATan2`). It uses
    the batch of one process only. It has no state; the embeddings save the rows that it trains.

    Args:
        embeddings: Modules on which :meth:`SparseEmbedding.allocate` was called. Their rows form one group.
        lr: Learning rate: a number, or a 0-dimensional tensor on the device.
        weight_decay: Decoupled weight decay coefficient of the used rows.
        capturable: Whether :class:`~trm_kernels.TrainingStep` may capture the step, which requires ``lr`` to
            be a tensor.

    Raises:
        ValueError: If a number is out of range, or if there is no embedding or one without rows.
    """

    def __init__(
        self,
        embeddings: Iterable[SparseEmbedding],
        lr: float | Tensor = 1e-2,
        *,
        weight_decay: float = 0.1,
        capturable: bool = False,
    ) -> None:
        if not isinstance(lr, Tensor):
            arguments.real("lr", lr)
        arguments.real("weight_decay", weight_decay)
        self._embeddings = list(embeddings)
        rows = [embedding.rows for embedding in self._embeddings if embedding.rows is not None]
        if len(rows) < len(self._embeddings):
            raise ValueError("an embedding has no rows to train: call its allocate(batch_size) first")
        # fused=True tells torch that the optimizer supports found_inf.
        defaults = {"lr": lr, "weight_decay": weight_decay, "capturable": capturable, "fused": True}
        super().__init__(rows, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows of the latest batch and return the result of ``closure``.

        Raises:
            RuntimeError: If an embedding was reallocated after this optimizer was built.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        (group,) = self.param_groups
        leaves: list[Tensor] = group["params"]
        for embedding, rows in zip(self._embeddings, leaves, strict=True):
            if embedding.rows is not rows or embedding.ids is None:
                raise RuntimeError("allocate() was called after this optimizer was built: build it again")
            if rows.grad is not None:
                new = _descend(
                    embedding.weights, embedding.ids, rows.grad, group["lr"], group["weight_decay"], found_inf
                )
                embedding.weights.index_copy_(0, embedding.ids, new)
        return loss


def _descend(
    weights: Tensor,
    ids: Tensor,
    gradient: Tensor,
    lr: float | Tensor,
    weight_decay: float,
    found_inf: Tensor | None,
) -> Tensor:
    """Return new values [B, E] of the rows ``ids`` [B], bitwise equal for equal ids."""
    # Sum with a product by the [B, B] matrix of equal ids: counting distinct ids would synchronise with the
    # device, and atomic additions would sum in a different order each time. In float64, which MPS lacks, TF32
    # settings do not apply and a sum near zero has the right sign.
    same = ids[:, None] == ids
    wide = torch.float32 if gradient.device.type == "mps" else torch.float64
    sums = same.to(wide) @ gradient.to(wide)
    # Rows of one product may be rounded differently, so equal ids use the row of their first occurrence.
    positions = torch.arange(len(ids), device=ids.device).expand_as(same)
    first = positions.masked_fill(~same, len(ids)).amin(dim=1)
    sign = sums.sign().to(weights.dtype).index_select(0, first)
    old = weights.index_select(0, ids)
    new = old * (1.0 - lr * weight_decay) - lr * sign
    return new if found_inf is None else torch.where(found_inf.reshape(()) > 0, old, new)


class _JointState(Mapping[Tensor, Any]):
    """A combined view of the states of several optimizers."""

    def __init__(self, states: list[Mapping[Tensor, Any]]) -> None:
        self._states = states

    def __getitem__(self, parameter: Tensor) -> Any:
        for state in self._states:
            # Test first, because reading a defaultdict would create an entry.
            if parameter in state:
                return state[parameter]
        raise KeyError(parameter)

    def __iter__(self) -> Iterator[Tensor]:
        for state in self._states:
            yield from state

    def __len__(self) -> int:
        return sum(map(len, self._states))


class JointOptimizer(Optimizer):
    """Several optimizers stepped as one, for example by :class:`~trm_kernels.TrainingStep`.

    Its parameter groups are the group dicts of the optimizers, in order. Its state dict has torch's format,
    with consecutively numbered parameters. It does not contain the tables of :class:`SparseEmbedding`, which
    the state dict of their module contains.

    Args:
        optimizers: Optimizers without common parameters.

    Attributes:
        optimizers: The optimizers, in step order.

    Raises:
        ValueError: If there is no optimizer, or if several share a parameter.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([group for one in self.optimizers for group in one.param_groups], {})
        self._join()
        for one in self.optimizers:
            # load_state_dict replaces an optimizer's groups and state.
            one.register_load_state_dict_post_hook(lambda _: self._join())

    def _join(self) -> None:
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]
        self.state = _JointState([one.state for one in self.optimizers])  # type: ignore[assignment]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group that one of the optimizers already has; raises ValueError for any other group."""
        if not any(param_group is own for one in self.optimizers for own in one.param_groups):
            raise ValueError("no joined optimizer has this group: add it to one of them first")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all optimizers, passing on ``found_inf`` if set, and return the result of ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for one in self.optimizers:
            if found_inf is None:
                one.step()
                continue
            one.found_inf = found_inf  # type: ignore[attr-defined]
            try:
                one.step()
            finally:
                del one.found_inf  # type: ignore[attr-defined]
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load each optimizer's part of :meth:`state_dict`; raises ValueError if the groups differ."""
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        start = 0
        for one in self.optimizers:
            own = groups[start : start + len(one.param_groups)]
            start += len(own)
            numbers = {number for group in own for number in group["params"]}
            state = {number: state for number, state in state_dict["state"].items() if number in numbers}
            one.load_state_dict({"state": state, "param_groups": own})
