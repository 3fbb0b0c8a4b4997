"""A latent recursion as one chain of kernels: n times ``z = net(x + y + z)``, then ``y = net(y + z)``.

A pre-norm block with attention has five kernels:

    1. QKV GEMM; its epilogue applies the row scale of the norm that is folded into the weights
    2. attention
    3. output GEMM + bias + residual; it also writes the row sums of squares for the next norm
    4. first MLP GEMM, with the row scale, bias and activation
    5. second MLP GEMM + bias + residual; in a network's last block also + x + y, the next call's input

One kernel before them adds x + y + z. If a norm ends the network call (a post-norm block, ``SequenceTRM``'s
``output_norm``), a row kernel applies it and adds x + y. Without gradients, the other norms of a post-norm
block need no kernel: the GEMMs that read the rows scale them, and the norm of a token mixer with up to 128
positions is applied in the epilogue of its second GEMM, whose tile holds complete rows. In training, a row
kernel applies each of them. It also applies the norms before token mixers and all norms in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trm_kernels.config import Memory
from trm_kernels.ops.attention import attention_forward
from trm_kernels.ops.attention_common import Samples
from trm_kernels.ops.gemm import sumsq_parts
from trm_kernels.ops.layouts import Block
from trm_kernels.ops.stream import Stream, rows_of, start
from trm_kernels.ops.sublayer import Call, Slot, first_half, last_half, second_half

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]


def block_spec(call: Call, block: Block, like: Tensor, memory: Memory, *, last: bool) -> Spec:
    """Return name, shape and dtype of each tensor that a block call saves; ``like``: the stream."""
    batch, length, width = like.shape
    rows = batch * length
    wide = torch.promote_types(like.dtype, torch.float32)
    spec: Spec = {}

    def stream(key: str, folded: bool) -> None:
        spec[key] = (batch, length, width), call.operand if folded else call.residual
        if folded:
            spec[f"{key}.sumsq"] = (rows, sumsq_parts(width)), wide

    mixer, mlp = block.sublayers
    stream("in", mixer.folded)
    if mixer.layout.tokens:
        spec["mixer.pre"] = (batch, mixer.inner, width), call.operand
    else:
        spec["qkv"] = (batch, length, 3 * width), call.operand
        spec["attention"] = (batch, length, width), call.operand
        spec["lse"] = (call.n_heads, rows), wide
    if call.layout.pre_norm:
        stream("middle", mlp.folded)
    else:
        spec["mixer.sum"] = spec["mlp.sum"] = (batch, length, width), call.residual
    if memory == "fast":
        spec["mlp.pre"] = (batch, length, mlp.inner), call.operand
    if last and call.output_norm is not None:
        spec["mlp.sum"] = (batch, length, width), call.residual
    return spec


def saved_spec(call: Call, blocks: list[Block], like: Tensor, steps: int, memory: Memory) -> Spec:
    """Return the spec of what a recursion of ``steps`` network calls saves, stacked over the steps."""
    if memory == "small":
        return {"in": ((steps, *like.shape), call.residual)}
    return {
        f"{layer}.{name}": ((steps, *shape), dtype)
        for layer, block in enumerate(blocks)
        for name, (shape, dtype) in block_spec(
            call, block, like, memory, last=layer == len(blocks) - 1
        ).items()
    }


@dataclass
class Saved:
    """Tensors saved for the backward, each stacked over the network calls from ``first`` on."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    first: int = 0

    @classmethod
    def empty(cls, spec: Spec, like: Tensor, first: int = 0) -> Saved:
        """Allocate the tensors of ``spec`` on the device of ``like``."""
        tensors = {name: like.new_empty(shape, dtype=dtype) for name, (shape, dtype) in spec.items()}
        return cls(tensors, first)

    def slot(self, layer: int, step: int) -> Slot:
        """Return the tensors of one block call, by name."""
        lead = f"{layer}."
        return {
            name[len(lead) :]: tensor[step - self.first]
            for name, tensor in self.tensors.items()
            if name.startswith(lead)
        }

    def stack(self, layer: int, name: str, first: int, last: int) -> Tensor:
        """Return a tensor of the calls ``first`` to ``last - 1``, stacked."""
        return self.tensors[f"{layer}.{name}"][first - self.first : last - self.first]


def _part(slot: Slot, name: str) -> Slot:
    """Return the part of a slot that belongs to sublayer ``name``."""
    lead = f"{name}."
    return {key[len(lead) :]: tensor for key, tensor in slot.items() if key.startswith(lead)}


def network_call(
    call: Call,
    blocks: list[Block],
    stream: Stream,
    step: int,
    slots: list[Slot],
    *,
    addend: Tensor | None = None,
    keep: bool = True,
    next_slot: Slot | None = None,
    read: Tensor | None = None,
) -> tuple[Tensor | None, Stream | None]:
    """Call the network once; returns its output, and the next call's input.

    Args:
        stream: The input.
        step: Index of the call in the recursion, which distinguishes its dropout from that of other calls.
        slots: Tensors in which each block saves data for the backward.
        addend, keep: See :func:`~trm_kernels.ops.sublayer.last_half`.
        next_slot: Slot of the first block in the next call.
        read: Rows of the output to compute, int64 [N]; the output is then [1, N, D]. The last block drops all
            other rows after its mixer.
    """
    mask = call.samples.mask
    for layer, block in enumerate(blocks):
        slot, mixer, mlp = slots[layer], block.mixer, block.mlp
        mixer_slot, mlp_slot = _part(slot, "mixer"), _part(slot, "mlp")
        save = bool(slot)
        if mixer.layout.tokens:
            inner = first_half(call, mixer, stream, mixer_slot.get("pre"), save=save)
        else:
            qkv = first_half(call, mixer, stream, slot.get("qkv"), save=save)
            heads = call.heads(mixer, step * len(blocks) + layer)
            inner, _ = attention_forward(qkv, heads, out=slot.get("attention"), lse=slot.get("lse"))
            if read is not None and layer + 1 == len(blocks):
                inner, stream = rows_of(inner, read), stream.rows(read)
                call, mask, read = replace(call, samples=Samples(1, read.shape[0])), None, None
        stream = second_half(call, mixer, inner, stream, mixer_slot, mlp, slot, "middle")
        inner = first_half(call, mlp, stream, mlp_slot.get("pre"), save="pre" in mlp_slot)
        if layer + 1 < len(blocks):
            reader = blocks[layer + 1].mixer
            stream = second_half(
                call, mlp, inner, stream, mlp_slot, reader, slots[layer + 1], "in", mask=mask
            )
    out, following = last_half(
        call,
        blocks[-1].mlp,
        inner,
        stream,
        mlp_slot,
        addend=addend,
        keep=keep,
        mask=mask,
        reader=blocks[0].mixer,
        reader_slot=next_slot or {},
    )
    if read is not None and out is not None:
        out = rows_of(out, read)
    return out, following


def enter(
    call: Call, blocks: list[Block], x: Tensor | None, y: Tensor | None, z: Tensor | None, slot: Slot
) -> tuple[Stream, Tensor | None]:
    """Compute the input of the first network call, x + y + z, and the pair x + y."""
    reader = blocks[0].mixer
    if x is None and (y is None or z is None) and not reader.folded and "in" not in slot:
        only = y if z is None else z
        assert only is not None
        return Stream(only), None
    stream, pair, _ = start(x, y, z, count=call.samples.count, outputs=call.outputs(reader, slot, "in"))
    assert stream is not None
    return stream, pair


def recursion_forward(
    call: Call,
    blocks: list[Block],
    x: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    n: int,
    memory: Memory | None,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Mapping[str, Tensor]]:
    """Run a latent recursion on contiguous x, y, z [B, L, D]; with n = 0, a single call ``net(y + z)``.

    Args:
        memory: What to save for the backward; None for nothing.
        read: Rows of the new y to compute, int64 [N]; only without ``memory``.

    Returns:
        The new y, the new z (None if n is 0), and the saved tensors by name.
    """
    saved = Saved()
    if memory is None:
        tokens, masked = call.layout.mixer.tokens, call.samples.mask is not None
        call = replace(call, deferred=not (call.layout.pre_norm or tokens or masked))
    else:
        saved = Saved.empty(saved_spec(call, blocks, y, n + 1, memory), y)
    layers = range(len(blocks))
    inputs_only = memory == "small"

    def slots(step: int) -> list[Slot]:
        return [{} if inputs_only else saved.slot(layer, step) for layer in layers]

    def entry(step: int) -> Slot:
        if not inputs_only:
            return saved.slot(0, step)
        # Otherwise the kernel would save a rounded copy instead of the stream.
        return {"in": saved.tensors["in"][step]} if call.rounds(blocks[0].mixer) is None else {}

    stream, pair = enter(call, blocks, x, y, z, entry(0))
    new_z: Tensor | None = None
    for step in range(n + 1):
        if inputs_only and stream.value.data_ptr() != saved.tensors["in"][step].data_ptr():
            saved.tensors["in"][step].copy_(stream.value)
        last_z, answer = step == n - 1, step == n
        # The next call adds x + y to this output; after the last z it adds only y.
        addend = y if last_z else pair
        out, following = network_call(
            call,
            blocks,
            stream,
            step,
            slots(step),
            addend=None if answer else addend,
            keep=answer or last_z,
            next_slot=None if answer else entry(step + 1),
            read=read if answer else None,
        )
        if last_z:
            new_z = out
        if following is not None:
            stream = following
    assert out is not None
    return out, new_z, saved.tensors
