"""Embeddings of which a step uses few rows, as those of puzzles in arXiv 2510.04871, and their optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from trm_kernels import arguments


class SparseEmbedding(nn.Module):
    """An embedding whose rows are updated by :class:`SparseSignSGD`, and only those that a batch used.

    The table is no parameter but a buffer: with a row for each of a million puzzles, gradients and moments of
    the whole of it would be the larger part of the training's memory. In training the rows of the batch are
    copied into ``rows``, which gets the gradient. All forward passes between two updates must have the same
    ids, as those of one :class:`~trm_kernels.TrainingStep` have.

    Args:
        num_embeddings: Rows N.
        width: Columns E.

    Attributes:
        weights: The table, float32 [N, E], zeros at first; saved with the module.
        rows: What the latest batch used of it, [B, E], the leaf that gradients reach; None before
            :meth:`allocate`.
        ids: Which rows these are, int64 [B]; None before :meth:`allocate`.

    Example:
        >>> embedding = SparseEmbedding(num_puzzles, 512).to(device)
        >>> embedding.allocate(batch_size)
        >>> optimizer = SparseSignSGD([embedding], lr=1e-2, weight_decay=0.1)
    """

    weights: Tensor
    ids: Tensor | None

    def __init__(self, num_embeddings: int, width: int) -> None:
        super().__init__()
        arguments.whole("num_embeddings", num_embeddings, 1)
        arguments.whole("width", width, 1)
        self.register_buffer("weights", torch.zeros(num_embeddings, width, dtype=torch.float32))
        self.register_buffer("ids", None, persistent=False)
        # No buffer: modules move those to devices by calls that autograd would record.
        self.rows: Tensor | None = None

    def allocate(self, batch_size: int) -> None:
        """Make room for training on batches of ``batch_size``; optimizers are to be built after this."""
        shape = (batch_size, self.weights.shape[1])
        self.rows = torch.zeros(
            shape, dtype=self.weights.dtype, device=self.weights.device, requires_grad=True
        )
        self.ids = torch.zeros(batch_size, dtype=torch.int64, device=self.weights.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseEmbedding:
        super()._apply(fn, recurse)
        if self.rows is not None:
            # The same tensor with other data, as modules do with parameters: optimizers hold it.
            self.rows.data = fn(self.rows.data)
            self.rows.grad = None
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the table.

        Args:
            ids: Integers, [B] in training, of any shape without gradient.

        Returns:
            ``[B, E]``: in training the leaf ``rows``, the same tensor each time; in evaluation, and under
            ``torch.no_grad``, without gradient.

        Raises:
            ValueError: In training, another batch size than the allocated one (without one, the first batch
                allocates).
        """
        # Predictions amid training have other batches than the allocated one.
        if not self.training or not torch.is_grad_enabled():
            return F.embedding(ids, self.weights)
        if self.rows is None:
            self.allocate(ids.shape[0])
        assert self.rows is not None and self.ids is not None
        if ids.shape != self.ids.shape:
            raise ValueError(
                f"ids of shape {list(ids.shape)}, but room for {list(self.ids.shape)}: "
                "call allocate(batch_size), then build the optimizer"
            )
        with torch.no_grad():
            self.ids.copy_(ids)
            self.rows.copy_(F.embedding(self.ids, self.weights))
        return self.rows


class SparseSignSGD(Optimizer):
    """Sign-SGD with decoupled weight decay on the rows that a batch used, and nothing else.

    Gradients of equal ids are summed; then ``w * (1 - lr * weight_decay) - lr * sign(sum)``. On rows that few
    batches use, Adam would do much the same. A step consists of device work alone, so that a CUDA graph can
    hold it, and does nothing while ``found_inf`` is set (see :class:`~trm_kernels.AdamATan2`). It sees the
    batch of one process. It has no state: what it trains is saved with the embeddings.

    Args:
        embeddings: Modules on which :meth:`SparseEmbedding.allocate` was called; one group holds their rows.
        lr: Learning rate, a number or a tensor without dimensions on the device.
        weight_decay: Share of a used row that a learning rate of 1 would take away.
        capturable: Says to :class:`~trm_kernels.TrainingStep` that the step may be captured, which needs
            ``lr`` to be a tensor.

    Raises:
        ValueError: A number outside its range, no embedding, or one without rows.
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
        # fused: torch's mark of optimizers that obey found_inf.
        defaults = {"lr": lr, "weight_decay": weight_decay, "capturable": capturable, "fused": True}
        super().__init__(rows, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows of the latest batch; gives what ``closure`` gave.

        Raises:
            RuntimeError: An embedding was allocated anew since this optimizer was built.
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
                raise RuntimeError("allocate() was called since this optimizer was built: build it again")
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
    """New values [B, E] of the rows ``ids`` [B], those of equal ids the same bit for bit."""
    # A product with the matrix of equal ids, [B, B]: how many different ids there are is not known without
    # waiting for the device, and atomic additions would sum in another order each time. In float64, which
    # MPS lacks, TF32 settings do not touch it, and a sum near zero has the right sign.
    same = ids[:, None] == ids
    wide = torch.float32 if gradient.device.type == "mps" else torch.float64
    sums = same.to(wide) @ gradient.to(wide)
    # Rows of one product may be rounded differently: equal ids take that of their first occurrence.
    positions = torch.arange(len(ids), device=ids.device).expand_as(same)
    first = positions.masked_fill(~same, len(ids)).amin(dim=1)
    sign = sums.sign().to(weights.dtype).index_select(0, first)
    old = weights.index_select(0, ids)
    new = old * (1.0 - lr * weight_decay) - lr * sign
    return new if found_inf is None else torch.where(found_inf.reshape(()) > 0, old, new)


class _JointState(Mapping[Tensor, Any]):
    """The states of several optimizers as one."""

    def __init__(self, states: list[Mapping[Tensor, Any]]) -> None:
        self._states = states

    def __getitem__(self, parameter: Tensor) -> Any:
        for state in self._states:
            # Asked first: a defaultdict would make an entry.
            if parameter in state:
                return state[parameter]
        raise KeyError(parameter)

    def __iter__(self) -> Iterator[Tensor]:
        for state in self._states:
            yield from state

    def __len__(self) -> int:
        return sum(map(len, self._states))


class JointOptimizer(Optimizer):
    """Several optimizers stepped as one, for instance by :class:`~trm_kernels.TrainingStep`.

    Its groups are those of the optimizers, the very same dicts, one optimizer after the other. Its state dict
    has torch's form, with parameters numbered through; the tables of :class:`SparseEmbedding` are not in it,
    but in that of their module.

    Args:
        optimizers: With no parameter in common.

    Attributes:
        optimizers: In the order in which they are stepped.

    Raises:
        ValueError: No optimizer, or a parameter that several have.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([group for one in self.optimizers for group in one.param_groups], {})
        self._join()
        for one in self.optimizers:
            # Loading gives an optimizer new groups and a new state.
            one.register_load_state_dict_post_hook(lambda _: self._join())

    def _join(self) -> None:
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]
        self.state = _JointState([one.state for one in self.optimizers])  # type: ignore[assignment]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take up a group that was added to one of the optimizers; ValueError for any other."""
        if not any(param_group is own for one in self.optimizers for own in one.param_groups):
            raise ValueError("none of the joined optimizers has this group: add it to one of them first")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all optimizers, with this one's ``found_inf`` if it has one; gives what ``closure`` gave."""
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
        """Give each optimizer its part of what :meth:`state_dict` gave; ValueError if the groups differ."""
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
