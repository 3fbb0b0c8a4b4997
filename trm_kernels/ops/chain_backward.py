"""Backward of a latent recursion: data gradients through every block of every network call, then one weight
gradient per matrix over the concatenated calls, or over as many calls as fit into memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trm_kernels.config import Memory
from trm_kernels.ops.chain import Saved, enter, network_call, saved_spec
from trm_kernels.ops.layouts import Block, Sublayer
from trm_kernels.ops.norm import rms_norm_backward
from trm_kernels.ops.stream import Stream
from trm_kernels.ops.sublayer import Call, Slot
from trm_kernels.ops.sublayer_backward import SublayerGradient, middle_stream, sublayer_backward

#: Maximum bytes of gradients kept until their weight gradients are computed (at least those of one call).
#: More would save launches, which matters only for small problems.
WORKSPACE = 128 * 2**20


@dataclass
class RecursionGradient:
    """Gradients of a recursion's inputs."""

    x: Tensor | None
    y: Tensor
    z: Tensor | None
    output_weight: Tensor | None
    parameters: list[Tensor]  # empty if none was needed


class _Workspace:
    """Memory of one chunk of calls, with each tensor stacked over the calls."""

    def __init__(self, steps: int, like: Tensor) -> None:
        self.steps = steps
        self._like = like
        self._stacks: dict[str, Tensor] = {}

    def slot(self, name: str, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.steps == 1:
            return self._like.new_empty(
                shape, dtype=dtype
            )  # used immediately, then free for the next sublayer
        if name not in self._stacks:
            self._stacks[name] = self._like.new_empty((self.steps, *shape), dtype=dtype)
        return self._stacks[name][index]

    def stack(self, name: str, steps: int) -> Tensor:
        return self._stacks[name][:steps]


def _chunk(call: Call, blocks: list[Block], like: Tensor, steps: int, memory: Memory) -> int:
    """Return the number of network calls whose weight gradients are computed together."""
    if memory == "small" or not all(part.folded for block in blocks for part in block.sublayers):
        return 1
    widths = 0
    for block in blocks:
        for part in block.sublayers:
            widths += part.inner + like.shape[2]  # G, and the gradient of the output
        widths += block.mlp.second.shape[1]  # the activation; the attention output is saved
    bytes_of_call = widths * like.shape[0] * like.shape[1] * call.operand.itemsize
    return max(1, min(steps, WORKSPACE // max(1, bytes_of_call)))


Kind = Literal["mixer", "mlp"]


@dataclass(frozen=True)
class _Visit:
    """One block in one network call, with the tensors that its forward saved."""

    layer: int
    step: int
    index: int  # index of the call in its chunk
    slot: Slot


class _Sweep:
    """State of one backward pass."""

    def __init__(
        self, call: Call, blocks: list[Block], saved: Saved, n: int, memory: Memory, needed: bool
    ) -> None:
        self.call, self.blocks, self.saved, self.memory, self.needed = call, blocks, saved, memory, needed
        self.steps = n + 1
        some = next(iter(saved.tensors.values()))
        self.like = saved.tensors["in" if memory == "small" else "0.in"][0]
        self.chunk = _chunk(call, blocks, self.like, self.steps, memory)
        self.workspace = _Workspace(self.chunk, some)
        self.gradients: list[dict[Kind, SublayerGradient]] = [
            {
                "mixer": SublayerGradient(block.mixer, call.samples.count),
                "mlp": SublayerGradient(block.mlp, call.samples.count),
            }
            for block in blocks
        ]
        self.grad_output_norm: Tensor | None = None
        # Each call writes an entry for the call before it, which may belong to the next chunk.
        self.copies = call.operand != call.residual
        self.entries = None
        if self.chunk > 1:
            self.entries = some.new_empty((self.steps, *self.like.shape), dtype=call.operand)

    def recomputed(self, step: int) -> Saved:
        """Run the forward of one call again from its input, and return its saved tensors."""
        spec = saved_spec(self.call, self.blocks, self.like, 1, "fast")
        again = Saved.empty(spec, self.like, step)
        slots = [again.slot(layer, step) for layer in range(len(self.blocks))]
        stream, _ = enter(self.call, self.blocks, None, self.saved.tensors["in"][step], None, slots[0])
        network_call(self.call, self.blocks, stream, step, slots)
        return again

    def entry(self, step: int) -> dict[str, Tensor | None]:
        """Return the output argument with which the next call writes the gradient of this call's output."""
        return self.output(None if self.entries is None or step < 0 else self.entries[step])

    def output(self, target: Tensor | None) -> dict[str, Tensor | None]:
        """Return ``target`` as the output argument that a GEMM reads: the copy if the stream is wider."""
        return {"copy": target} if self.copies else {"out": target}

    def back_output_norm(self, grad: Tensor, slot: Slot) -> Stream:
        norm = self.call.output_norm
        if norm is None:
            return Stream(grad)
        back, grad_weight, _ = rms_norm_backward(
            grad, slot["mlp.sum"], norm.weight, None, eps=norm.eps, count=self.call.samples.count
        )
        if grad_weight is not None:
            wide = grad_weight.to(torch.promote_types(grad_weight.dtype, torch.float32))
            self.grad_output_norm = wide if self.grad_output_norm is None else self.grad_output_norm + wide
        return Stream(back)

    def network_call(self, grad: Stream, step: int, index: int, saved: Saved) -> Stream:
        """Backward through one network call; ``index`` is its index in the chunk."""
        if self.call.output_norm is not None:
            grad = self.back_output_norm(grad.value, saved.slot(len(self.blocks) - 1, step))
        if self.entries is not None and grad.operand.data_ptr() != self.entries[step].data_ptr():
            self.entries[step].copy_(grad.value)
            grad = Stream(grad.value, self.entries[step]) if self.copies else Stream(self.entries[step])
        for layer in reversed(range(len(self.blocks))):
            visit = _Visit(layer, step, index, saved.slot(layer, step))
            middle = middle_stream(self.call, self.blocks[layer].mixer, visit.slot)
            grad = self.sublayer(visit, "mlp", grad, middle)
            entered = Stream(visit.slot["in"], sumsq=visit.slot.get("in.sumsq"))
            grad = self.sublayer(visit, "mixer", grad, entered)
        return grad

    def sublayer(self, visit: _Visit, kind: Kind, grad: Stream, stream: Stream) -> Stream:
        """Backward through one sublayer with input ``stream``; adds weight gradients unless chunked."""
        part, gradient = getattr(self.blocks[visit.layer], kind), self.gradients[visit.layer][kind]
        previous, output = self.previous(visit, kind)
        back, products = sublayer_backward(
            self.call,
            part,
            grad,
            visit.step * len(self.blocks) + visit.layer,
            visit.slot,
            stream,
            gradient,
            lambda name, shape, dtype: self.workspace.slot(
                f"{visit.layer}.{kind}.{name}", visit.index, shape, dtype
            ),
            write_copy=self.copies and previous.folded,
            **output,
        )
        if self.needed and self.chunk == 1:
            a = stream.operand if products.a is None else products.a
            inner = visit.slot["attention"] if products.inner is None else products.inner
            gradient.add(products.g, a, products.grad, inner, self.rows)
        return back

    def previous(self, visit: _Visit, kind: Kind) -> tuple[Sublayer, dict[str, Tensor | None]]:
        """Return the previous sublayer, and the output argument for the gradient of its output."""
        layer = visit.layer
        if kind == "mixer" and layer == 0:
            return self.blocks[-1].mlp, self.entry(visit.step - 1)
        name, part = f"{layer}.mixer", self.blocks[layer].mixer
        if kind == "mixer":
            name, part = f"{layer - 1}.mlp", self.blocks[layer - 1].mlp
        target = None
        if part.folded and self.needed:
            shape = tuple(self.like.shape)
            target = self.workspace.slot(f"{name}.grad", visit.index, shape, self.call.operand)
        return part, self.output(target)

    @property
    def rows(self) -> int:
        """Number of rows of one network call."""
        return self.like.shape[0] * self.like.shape[1]

    def flush(self, first: int, last: int) -> None:
        """Add the weight gradients of the calls ``first`` to ``last - 1`` from the workspace."""
        steps = last - first

        def stacked(name: str) -> Tensor:
            return self.workspace.stack(name, steps)

        for layer, gradients in enumerate(self.gradients):
            gradients["mixer"].add(
                stacked(f"{layer}.mixer.g"),
                self.saved.stack(layer, "in", first, last),
                stacked(f"{layer}.mixer.grad"),
                self.saved.stack(layer, "attention", first, last),
                self.rows,
            )
            grad_output = None if self.entries is None else self.entries[first:last]
            if layer + 1 < len(self.blocks) or grad_output is None:
                grad_output = stacked(f"{layer}.mlp.grad")
            gradients["mlp"].add(
                stacked(f"{layer}.mlp.g"),
                self.saved.stack(layer, "middle", first, last),
                grad_output,
                stacked(f"{layer}.mlp.inner"),
                self.rows,
            )


def recursion_backward(
    call: Call,
    blocks: list[Block],
    saved: Saved,
    n: int,
    grad_y: Tensor,
    grad_z: Tensor | None,
    *,
    pair: bool,
    memory: Memory,
    needed: bool,
) -> RecursionGradient:
    """Backward of :func:`~trm_kernels.ops.chain.recursion_forward`.

    Args:
        saved: Tensors that the forward saved.
        grad_y, grad_z: Gradients of the new y and z [B, L, D], contiguous, in the residual dtype.
        pair: Whether x was passed.
        needed: Whether any parameter of the blocks requires a gradient.
    """
    sweep = _Sweep(call, blocks, saved, n, memory, needed)
    grad = Stream(grad_y)
    grad_pair: Tensor | None = None
    grad_old_y = grad_y
    wide = torch.promote_types(call.residual, torch.float32)
    last = n + 1
    while last > 0:
        first = max(0, last - sweep.chunk)
        for step in reversed(range(first, last)):
            source = sweep.recomputed(step) if memory == "small" else saved
            back = sweep.network_call(grad, step, step - first, source)
            if step == n:
                # A copy, because the next call overwrites this memory with its own gradient.
                grad_old_y = back.value.clone() if n > 0 else back.value
                if n > 0 and grad_z is not None:
                    back = Stream(back.value + grad_z)
            else:
                grad_pair = (
                    back.value.to(wide, copy=True) if grad_pair is None else grad_pair.add_(back.value)
                )
            grad = back
        if needed and sweep.chunk > 1:
            sweep.flush(first, last)
        last = first
    grad_parameters = []
    if needed:
        grad_parameters = [
            total
            for gradients in sweep.gradients
            for gradient in gradients.values()
            for total in gradient.totals()
        ]
    if n == 0:
        return RecursionGradient(None, grad_old_y, None, sweep.grad_output_norm, grad_parameters)
    assert grad_pair is not None
    grad_x = grad_pair.to(call.residual)
    return RecursionGradient(
        grad_x if pair else None, grad_old_y + grad_x, grad.value, sweep.grad_output_norm, grad_parameters
    )
