"""The ``native`` backend: networks and recursions in C++ on the CPU (csrc/).

Shapes: B batch, L sequence, D width, R rows (the valid positions of all samples, one behind the other).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from trm_kernels import native_module, native_weights, prepared
from trm_kernels.backends import checks, rotary
from trm_kernels.backends.checks import (
    block_parameters,
    layout_name,
    output_norm_of,
    refuses_modes,
    refuses_modules,
)
from trm_kernels.backends.registry import Backend, FusedRecursion, Recursion
from trm_kernels.first_order import first_order
from trm_kernels.module import FusedModule
from trm_kernels.native_buffers import take
from trm_kernels.packing import Packing, read_positions

_DTYPES = (torch.float32, torch.bfloat16)


def refuses(net: FusedModule, x: Tensor, mask: Tensor | None) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    if x.device.type != "cpu":
        return f"the input is on {x.device}, the kernels run on CPUs"
    if mask is not None and mask.device != x.device:
        return f"the mask is on {mask.device}, the input on {x.device}"
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype} is neither float32 nor bfloat16"
    if torch.is_autocast_enabled("cpu"):
        return "the kernels compute in float32, autocast asks for less"
    if x.numel() == 0:
        return "the batch is empty"
    if x.shape[0] * x.shape[1] >= 2**31:
        return "the kernels count rows in 32 bits"
    if net.config.n_layers > native_module.MOST_BLOCKS:
        return f"{net.config.n_layers} blocks are over {native_module.MOST_BLOCKS}"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "the tensors under a dispatch mode may hold no data"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "the kernels have no rules for torch.func transforms or forward-mode differentiation"
    return _refuses_input(x) or refuses_modes(net) or refuses_modules(net, x) or _refuses_weights(net)


def _refuses_weights(net: FusedModule) -> str | None:
    for block in net.blocks:
        if any(_lacks_memory(parameter) for parameter in block_parameters(block)):
            return "a parameter has no memory of its own"
    return None


def _lacks_memory(tensor: Tensor) -> bool:
    # As where weights are shared out among processes, and for zeros that torch only describes.
    return tensor.data_ptr() == 0 and tensor.numel() > 0


def _refuses_input(x: Tensor) -> str | None:
    if type(x) not in (Tensor, nn.Parameter):
        return f"the input is a {type(x).__name__}, which may hold no data"
    if x.is_inference() and torch.is_grad_enabled():
        return "an input was made in inference mode, and cannot be saved for a backward"
    if _lacks_memory(x):
        return "an input has no memory of its own"
    return None


def refuses_recursion(net: FusedModule, states: Sequence[Tensor], recursion: Recursion) -> str | None:
    """Why a recursion over a network that the kernels serve must call it step by step, or None."""
    if recursion.precision is not None:
        return f"precision={recursion.precision!r} is for GPUs"
    for state in states:
        if (reason := _refuses_input(state)) is not None:
            return reason
    return checks.refuses_recursion(net, states, recursion)


def slower(net: FusedModule, x: Tensor) -> str | None:
    """Why eager would be faster, or None: a few rows wait for weights, which packing reads once more.

    Measured with n = 2 on two cores: in training, 1 row of width 256 takes 1.1 times eager's time, 4 of width
    512 1.35 times, 16 0.8 times; in inference 1 row of width 256 0.7 times, of width 1,024 twice, 4 of width
    512 0.9 times.
    """
    rows, d = x.shape[0] * x.shape[1], net.config.d_model
    trains = torch.is_grad_enabled()
    fewest, narrowest = (16, 256) if trains else (4, 512)
    if rows < fewest and d >= narrowest:
        return f"{rows} rows of width {d} wait for weights alone"
    if x.dtype == torch.bfloat16 and rows * d >= (_AMX_TRAINS if trains else _AMX_INFERS) and _has_amx():
        return "PyTorch multiplies bfloat16 by AMX on this processor, the kernels in float32"
    return None


#: Rows times width from which PyTorch's bfloat16 is faster than our float32 where the processor has AMX. In
#: inference eager takes 0.6 times as long at 2,048 rows of width 256, and as long at 97 of 512; in training
#: as long at 2,048 of 256 (two cores of a Sapphire Rapids).
_AMX_INFERS, _AMX_TRAINS = 3 << 14, 1 << 19


def _has_amx() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


def run(net: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    """Run a network or block on ``x`` [B, L, D] and ``mask`` [B, L]."""
    call = _Call(net, (x,), mask, (None, None), torch.is_grad_enabled())
    rows, _ = call.recursion(None, call.pack(x), None, 0, recompute=False)
    return call.unpack(rows)


def run_recursion(net: FusedModule, states: Sequence[Tensor], asked: Recursion) -> tuple[Tensor, Tensor]:
    """T - 1 latent recursions without gradient and one with, on states [B, L, D] of one dtype."""
    n, read = asked.n, asked.read
    with_gradients = asked.with_gradients and torch.is_grad_enabled()
    call = _Call(net, states, asked.mask, output_norm_of(asked), with_gradients)
    given_z = states[2]
    x, y, z = map(call.pack, states)

    def recursion(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        new_y, new_z = call.recursion(x if n > 0 else None, y, z, n, recompute=asked.memory == "small")
        return new_y, z if new_z is None else new_z

    with torch.no_grad():
        for _ in range(asked.T - 1):
            y, z = recursion(y, z)
    with torch.set_grad_enabled(with_gradients):
        y, z = recursion(y, z)
        y = call.unpack(y)
        return (y if read is None else read_positions(y, read)), given_z if n == 0 else call.unpack(z)


class _Call:
    """One network, applied to states of one shape and dtype.

    Args:
        states: What the network will be applied to, each [B, L, D].
        output_norm: As :func:`~trm_kernels.backends.checks.output_norm_of` gives it.
        with_gradients: Whether a recursion will record gradients, if there is anything to record.
    """

    def __init__(
        self,
        net: FusedModule,
        states: Sequence[Tensor],
        mask: Tensor | Packing | None,
        output_norm: tuple[Tensor | None, float | None],
        with_gradients: bool,
    ) -> None:
        config = net.config
        self.net, self.dtype, self.shape = net, states[0].dtype, states[0].shape
        self.kernels: Any = native_module.network(config)
        self.layout = layout_name(config)
        self.parameters = [parameter for block in net.blocks for parameter in block_parameters(block)]
        # The kernels divide by 1 - p in float32.
        self.dropout = min(config.dropout, 1.0 - 2.0**-24) if net.training else 0.0
        self.weight, eps = output_norm
        self.output_eps = -1.0 if eps is None else eps
        given = (*states, *self.parameters, *(() if self.weight is None else (self.weight,)))
        self.records = with_gradients and any(tensor.requires_grad for tensor in given)
        self.packing = _packing(mask)
        self._lay_rows()
        self.packed = self._packed()

    def _lay_rows(self) -> None:
        """Fill in rows (R) and the tensors that describe them; they live as long as this object."""
        batch, length, _ = self.shape
        positions = None
        self.nothing_valid = self.packing is not None and int(self.packing.count) == 0
        if self.packing is None:
            self.rows = batch * length
            self._starts = torch.arange(0, self.rows + 1, length, dtype=torch.int32)
        else:
            # Where nothing is valid there is one row all the same.
            self.rows = self.packing.rows
            self._starts = self.packing.starts.clone()
            self._starts[-1] = self.rows
        self._tables: tuple[Tensor | None, Tensor | None] = None, None
        if self.net.config.rotary:
            like = torch.empty((), dtype=torch.float32)
            self._tables = rotary.tables(self.net.config, length, like)
            if self.packing is not None:
                positions = self.packing.positions().to(torch.int32)
        self._positions = positions
        addresses = _addresses((self._starts, *self._tables, positions))
        self.batch = native_module.module().Batch(self.rows, batch, *addresses)

    def pack(self, x: Tensor) -> Tensor:
        """Rows [R, D] in float32, of ``x`` [B, L, D]."""
        rows = x if self.packing is None else self.packing.pack(x)
        return rows.reshape(self.rows, -1).to(torch.float32)

    def unpack(self, rows: Tensor) -> Tensor:
        """``rows`` [R, D] as states [B, L, D] of the input's dtype; zeros at padding."""
        if self.packing is None:
            return rows.view(self.shape).to(self.dtype)
        if self.nothing_valid:
            rows = rows * 0.0  # and so is its gradient
        return self.packing.unpack(rows).to(self.dtype)

    def recursion(
        self, x: Tensor | None, y: Tensor, z: Tensor | None, n: int, *, recompute: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One latent recursion on rows [R, D]; with n = 0, and z or not, one call of the network."""
        numbers = _Numbers(n, self.output_eps, self.dropout, _seed() if self.dropout > 0.0 else 0, recompute)
        states = x, y, z
        if self.records and torch.is_grad_enabled():
            # What the graph refers to must not hold the packed weights, which a backward sets free.
            call = copy.copy(self)
            del call.packed
            return _Recursion.apply(call, numbers, self.packed, self.weight, *states, *self.parameters)
        new_y, new_z, _ = self.forward(numbers, self.packed, self.weight, states, keeps=False)
        return new_y, new_z

    def forward(
        self,
        numbers: _Numbers,
        packed: Tensor,
        weight: Tensor | None,
        states: Sequence[Tensor | None],
        *,
        keeps: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """New y and z [R, D] from x, y and z, and what the backward reads; ``weight``: the output norm's."""
        tensors = [_plain(tensor) for tensor in (*states, weight)]
        recursion = numbers.recursion(tensors)
        threads = native_module.threads(self.rows)
        workspace = take(self.kernels.workspace_size(self.batch, recursion, False, threads))
        kept = take(self.kernels.kept_size(self.batch, recursion)) if keeps else None
        shape = self.rows, self.shape[2]
        y, z = torch.empty(shape), torch.empty(shape) if numbers.n > 0 else None
        self.kernels.forward(self.batch, recursion, *_addresses((packed, kept, workspace, y, z)), threads)
        return y, z, kept

    def backward(
        self,
        numbers: _Numbers,
        saved: Sequence[Tensor | None],
        gradients_out: tuple[Tensor | None, Tensor | None],
    ) -> list[Tensor | None]:
        """Gradients of the output norm's weight, of x, y and z, and of the parameters.

        Args:
            saved: What the forward kept, the packed weights, the output norm's weight, the parameters.
            gradients_out: Those of the new y and z [R, D].
        """
        kept, packed, weight, *given = saved
        weight = _plain(weight)
        recursion = numbers.recursion((None, None, None, weight))
        threads = native_module.threads(self.rows)
        workspace = take(self.kernels.workspace_size(self.batch, recursion, True, threads))
        shape = self.rows, self.shape[2]
        dy_out, dz_out = (_plain(gradient) for gradient in gradients_out)
        if dy_out is None:
            dy_out = torch.zeros(shape)
        dx = torch.empty(shape) if numbers.n > 0 else None
        dy, dz = torch.empty(shape), torch.empty(shape)
        dweight = None if weight is None else torch.empty_like(weight)
        parameters = self.block_tensors([tensor for tensor in given if tensor is not None])
        gradients = [None if tensor is None else torch.empty_like(tensor) for tensor in parameters]
        self.kernels.backward(
            self.batch,
            recursion,
            _addresses(parameters),
            *_addresses((packed, kept, workspace, dy_out, dz_out, dx, dy, dz)),
            _addresses(gradients),
            0 if dweight is None else dweight.data_ptr(),
            threads,
        )
        return [dweight, dx, dy, dz, *self._parameter_gradients(gradients)]

    def block_tensors(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Parameters as the kernels take them: ten a block (``struct Block`` of csrc/kernels.h)."""
        size = len(parameters) // self.net.config.n_layers
        found: list[Tensor | None] = []
        for i in range(0, len(parameters), size):
            # The paper's layers round their weights to the input's dtype.
            dtype = self.dtype if self.net.config.family == "paper" else None
            p: list[Any] = [_plain(parameter, dtype) for parameter in parameters[i : i + size]]
            if self.layout == "scratch":
                norm1, q, k, v, out, norm2, gate, up, down = p
                qkv, both = torch.cat((q, k, v)), torch.cat((gate, up))
                p = [norm1, qkv, None, out, None, norm2, both, None, down, None]
            elif self.layout == "scratch-tokens":
                norm1, first, first_bias, second, second_bias, norm2, gate, up, down = p
                both = torch.cat((gate, up))
                p = [norm1, first, first_bias, second, second_bias, norm2, both, None, down, None]
            elif self.net.config.family == "paper":
                first, second, up, down = p
                p = [None, first, None, second, None, None, up, None, down, None]
            found += p
        return found

    def _parameter_gradients(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Those of the parameters, from those of :meth:`block_tensors`."""
        given = [gradient for gradient in gradients if gradient is not None]
        if self.net.config.family != "scratch":
            return given
        found: list[Tensor] = []
        size = len(given) // self.net.config.n_layers
        for i in range(0, len(given), size):
            norm1, *mixer, norm2, both, down = given[i : i + size]
            if self.layout == "scratch":
                qkv, out = mixer
                mixer = [*qkv.chunk(3), out]
            found += [norm1, *mixer, norm2, *both.chunk(2), down]
        return found

    def _packed(self) -> Tensor:
        """The packed weights: made for this call if it records, else kept while the weights are the same."""
        if self.records:
            return self._pack()
        form = "native", self.dtype
        kept = prepared.matrices(self.net, self.parameters, form, lambda: [self._pack()])
        if kept is not None:
            return kept[0]
        return native_weights.recall(self.net, self.parameters, form, self.kernels, self._pack)

    def _pack(self) -> Tensor:
        size = self.kernels.packed_size(self.records)
        packed = take(size)
        with torch.no_grad():
            tensors = self.block_tensors(self.parameters)
            threads = native_module.threads(size // self.shape[2])
            self.kernels.pack(_addresses(tensors), self.records, packed.data_ptr(), threads)
        return packed


@dataclass(frozen=True)
class _Numbers:
    """What makes one recursion differ from another on the same rows."""

    n: int
    output_eps: float
    dropout: float
    seed: int
    recompute: bool

    def recursion(self, tensors: Sequence[Tensor | None]) -> Any:
        return native_module.module().Recursion(
            self.n, *_addresses(tensors), self.output_eps, self.dropout, self.seed, self.recompute
        )


class _Recursion(torch.autograd.Function):
    """A latent recursion that keeps what its backward reads."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        numbers: _Numbers,
        packed: Tensor,
        weight: Tensor | None,
        x: Tensor | None,
        y: Tensor,
        z: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        new_y, new_z, kept = call.forward(numbers, packed, weight, (x, y, z), keeps=True)
        ctx.call, ctx.numbers = call, numbers
        # All tensors here: a backward, hooks and checkpoints then free them, and autograd refuses a backward
        # after a parameter was changed in place. The states are not read again.
        ctx.save_for_backward(kept, packed, weight, *parameters)
        ctx.set_materialize_grads(False)
        return new_y, new_z

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_out: Tensor | None, dz_out: Tensor | None = None) -> tuple[Any, ...]:
        found = ctx.call.backward(ctx.numbers, ctx.saved_tensors, (dy_out, dz_out))
        wanted = ctx.needs_input_grad[3:]
        gradients = (g if needs else None for g, needs in zip(found, wanted, strict=True))
        return None, None, None, *gradients


def _plain(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """``tensor`` in float32 (rounded to ``dtype`` first), contiguous, without its history."""
    if tensor is None:
        return None
    rounded = tensor.detach() if dtype is None else tensor.detach().to(dtype)
    return rounded.to(torch.float32).resolve_neg().contiguous()


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _seed() -> int:
    return int(torch.randint(2**62, (1,)).item())


def _packing(mask: Tensor | Packing | None) -> Packing | None:
    """Rows without a gap, or None where every position is valid."""
    given = None
    if isinstance(mask, Packing):
        given, mask = mask, mask.mask
    if mask is None:
        return None
    # Read even where a Packing has lengths: the kernels would read past their buffers if those were wrong.
    lengths: list[int] = (mask != 0).sum(dim=1).tolist()
    if sum(lengths) == mask.numel():
        return None
    if given is not None and given.rows == max(1, sum(lengths)) and given.lengths in (None, tuple(lengths)):
        return given
    return Packing.of(mask, lengths=lengths)


BACKEND = Backend(
    "native",
    "C++ kernels for CPUs",
    unavailable=native_module.unavailable,
    refuses=refuses,
    run=run,
    recursion=FusedRecursion(refuses_recursion, run_recursion),
    slower=slower,
    auto=("cpu",),
)
