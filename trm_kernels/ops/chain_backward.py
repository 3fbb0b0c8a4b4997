"""Backward of a latent recursion: data gradients swept through every block of every network call, then one
weight gradient a matrix over the concatenated calls, or over as many of them as memory allows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trm_kernels.ops.chain import Memory, Saved, block_spec, enter, network_call
from trm_kernels.ops.layouts import Block, Sublayer
from trm_kernels.ops.norm import rms_norm_backward
from trm_kernels.ops.stream import Stream
from trm_kernels.ops.sublayer import Call, Slot
from trm_kernels.ops.sublayer_backward import SublayerGradient, middle_stream, sublayer_backward

#: Bytes of gradients that are kept until their weight gradients are taken: one call's at least. More would
#: save launches, which only small problems feel.
WORKSPACE = 128 * 2**20


@dataclass
class RecursionGradient:
    """Gradients of a recursion's inputs."""

    x: Tensor | None
    y: Tensor
    z: Tensor | None
    output_weight: Tensor | None
    parameters: list[Tensor]  # empty where none was needed


class _Workspace:
    """Memory that the calls of one chunk share: each tensor stacked over the calls."""

    def __init__(self, steps: int, like: Tensor) -> None:
        self.steps = steps
        self._like = like
        self._stacks: dict[str, Tensor] = {}

    def slot(self, name: str, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.steps == 1:
            return self._like.new_empty(shape, dtype=dtype)  # used at once, and free for the next sublayer
        if name not in self._stacks:
            self._stacks[name] = self._like.new_empty((self.steps, *shape), dtype=dtype)
        return self._stacks[name][index]

    def stack(self, name: str, steps: int) -> Tensor:
        return self._stacks[name][:steps]


def _chunk(call: Call, blocks: list[Block], like: Tensor, steps: int, memory: Memory) -> int:
    """Network calls whose weight gradients are taken at once."""
    if memory == "small" or not all(part.folded for block in blocks for part in block.sublayers):
        return 1
    widths = 0
    for block in blocks:
        for part in block.sublayers:
            widths += part.inner + like.shape[2]  # G, and the gradient of the output
        widths += block.mlp.second.shape[1]  # the activation; the attention's output is saved
    bytes_of_call = widths * like.shape[0] * like.shape[1] * call.operand.itemsize
    return max(1, min(steps, WORKSPACE // max(1, bytes_of_call)))


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
        self.gradients = [
            [SublayerGradient(part, call.samples.count) for part in block.sublayers] for block in blocks
        ]
        self.of_output_norm: Tensor | None = None
        last = blocks[-1].mlp
        # Written by one call for the call before it, which may belong to the next chunk.
        self.copies = call.operand != call.residual
        self.entries = None
        if last.folded and self.chunk > 1:
            self.entries = some.new_empty((self.steps, *self.like.shape), dtype=call.operand)

    def recomputed(self, step: int) -> Saved:
        """What the forward of one call keeps, run again from its input."""
        spec = {
            f"{layer}.{name}": ((1, *shape), dtype)
            for layer, block in enumerate(self.blocks)
            for name, (shape, dtype) in block_spec(
                self.call, block, self.like, "fast", last=layer == len(self.blocks) - 1
            ).items()
        }
        again = Saved.empty(spec, self.like, step)
        slots = [again.slot(layer, step) for layer in range(len(self.blocks))]
        stream, _ = enter(self.call, self.blocks, None, self.saved.tensors["in"][step], None, slots[0])
        network_call(self.call, self.blocks, stream, step, slots)
        return again

    def entry(self, step: int) -> dict[str, Tensor | None]:
        """Where the gradient of a network call's output, or its copy, is written by the call after it."""
        place = None if self.entries is None or step < 0 else self.entries[step]
        return {"copy": place} if self.copies else {"out": place}

    def back_output_norm(self, grad: Tensor, slot: Slot) -> Stream:
        norm = self.call.output_norm
        if norm is None:
            return Stream(grad)
        back, of_weight, _ = rms_norm_backward(
            grad, slot["mlp.sum"], norm.weight, None, eps=norm.eps, count=self.call.samples.count
        )
        if of_weight is not None:
            wide = of_weight.to(torch.promote_types(of_weight.dtype, torch.float32))
            self.of_output_norm = wide if self.of_output_norm is None else self.of_output_norm + wide
        return Stream(back)

    def network_call(self, grad: Stream, step: int, index: int, saved: Saved) -> Stream:
        """Back through one network call; ``index``: its place in the chunk."""
        call, blocks = self.call, self.blocks
        last = len(blocks) - 1
        if self.call.output_norm is not None:
            grad = self.back_output_norm(grad.value, saved.slot(last, step))
        if self.entries is not None and grad.operand.data_ptr() != self.entries[step].data_ptr():
            self.entries[step].copy_(grad.value)
            grad = Stream(grad.value, self.entries[step]) if self.copies else Stream(self.entries[step])
        for layer in reversed(range(len(blocks))):
            slot = saved.slot(layer, step)
            mixer, mlp = blocks[layer].sublayers
            of_mixer, of_mlp = self.gradients[layer]
            middle = middle_stream(call, mixer, slot)
            grad = self.sublayer(mlp, of_mlp, grad, f"{layer}.mlp", step, index, slot, middle, saved, layer)
            stream = Stream(slot["in"], sumsq=slot.get("in.sumsq"))
            grad = self.sublayer(
                mixer, of_mixer, grad, f"{layer}.mixer", step, index, slot, stream, saved, layer
            )
        return grad

    def sublayer(
        self,
        part: Sublayer,
        gradient: SublayerGradient,
        grad: Stream,
        name: str,
        step: int,
        index: int,
        slot: Slot,
        stream: Stream,
        saved: Saved,
        layer: int,
    ) -> Stream:
        """Back through one sublayer; its weight gradients are taken here or with the chunk."""
        call, is_mixer = self.call, part is self.blocks[layer].mixer
        # The gradient of this sublayer's input is that of the output of the sublayer in front of it.
        if is_mixer and layer == 0:
            where, in_front = self.entry(step - 1), self.blocks[-1].mlp
        else:
            before = f"{layer}.mixer" if not is_mixer else f"{layer - 1}.mlp"
            in_front = self.blocks[layer].mixer if not is_mixer else self.blocks[layer - 1].mlp
            place = None
            if in_front.folded and self.needed:
                dtype = call.operand
                place = self.workspace.slot(f"{before}.grad", index, tuple(self.like.shape), dtype)
            where = {"copy": place} if self.copies else {"out": place}
        back, products = sublayer_backward(
            call,
            part,
            grad,
            step * len(self.blocks) + layer,
            slot,
            stream,
            gradient,
            lambda kind, shape, dtype: self.workspace.slot(f"{name}.{kind}", index, shape, dtype),
            out=where.get("out"),
            copy=where.get("copy"),
            write_copy=self.copies and in_front.folded,
        )
        if self.needed and self.chunk == 1:
            a = stream.operand if products.a is None else products.a
            inner = slot["attention"] if products.inner is None else products.inner
            gradient.add(products.g, a, products.grad, inner, self.rows)
        return back

    @property
    def rows(self) -> int:
        """Rows of one network call."""
        return self.like.shape[0] * self.like.shape[1]

    def flush(self, first: int, last: int) -> None:
        """Weight gradients of the calls ``first`` to ``last - 1``, whose operands lie in the workspace."""
        steps = last - first
        final = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            names = f"{layer}.mixer", f"{layer}.mlp"
            for part, gradient, name in zip(block.sublayers, self.gradients[layer], names, strict=True):
                mixer = part is block.mixer
                a = self.saved.stack(layer, "in" if mixer else "middle", first, last)
                if not mixer and layer == final:
                    assert self.entries is not None
                    grad = self.entries[first:last]
                else:
                    grad = self.workspace.stack(f"{name}.grad", steps)
                inner = (
                    self.saved.stack(layer, "attention", first, last)
                    if mixer
                    else self.workspace.stack(f"{name}.inner", steps)
                )
                g = self.workspace.stack(f"{name}.g", steps)
                gradient.add(g, a, grad, inner, self.rows)


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
    """Back through :func:`~trm_kernels.ops.chain.recursion_forward`.

    Args:
        saved: What the forward kept.
        grad_y, grad_z: Gradients of the new y and z [B, L, D], contiguous, residual dtype.
        pair: Whether there was an x.
        needed: Whether any parameter of the blocks wants a gradient.
    """
    sweep = _Sweep(call, blocks, saved, n, memory, needed)
    grad = Stream(grad_y)
    of_pair: Tensor | None = None
    of_y = grad_y
    wide = torch.promote_types(call.residual, torch.float32)
    last = n + 1
    while last > 0:
        first = max(0, last - sweep.chunk)
        for step in reversed(range(first, last)):
            source = sweep.recomputed(step) if memory == "small" else saved
            back = sweep.network_call(grad, step, step - first, source)
            if step == n:
                # A copy: its memory is where the next call keeps its own gradient.
                of_y = back.value.clone() if n > 0 else back.value
                if n > 0 and grad_z is not None:
                    back = Stream(back.value + grad_z)
            elif pair or n > 0:
                of_pair = back.value.to(wide, copy=True) if of_pair is None else of_pair.add_(back.value)
            grad = back
        if needed and sweep.chunk > 1:
            sweep.flush(first, last)
        last = first
    of_parameters = []
    if needed:
        of_parameters = [
            total for pair_of in sweep.gradients for gradient in pair_of for total in gradient.totals()
        ]
    if n == 0:
        return RecursionGradient(None, of_y, None, sweep.of_output_norm, of_parameters)
    assert of_pair is not None
    of_x = of_pair.to(call.residual)
    return RecursionGradient(
        of_x if pair else None, of_y + of_x, grad.value, sweep.of_output_norm, of_parameters
    )
