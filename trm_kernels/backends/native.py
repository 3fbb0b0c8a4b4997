"""The ``native`` backend: networks and recursions in C++ on the CPU (csrc/).

Shapes: B batch, L sequence, D width, R rows (the valid positions of all samples, one after another).
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
    """Return why the kernels cannot handle this call, or None if they can."""
    if x.device.type != "cpu":
        return f"the input is on {x.device}, but the kernels run on CPUs"
    if mask is not None and mask.device != x.device:
        return f"the mask is on {mask.device}, but the input is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype} is neither float32 nor bfloat16"
    if torch.is_autocast_enabled("cpu"):
        return "the kernels compute in float32, but autocast requests a lower precision"
    if x.numel() == 0:
        return "the batch is empty"
    if x.shape[0] * x.shape[1] >= 2**31:
        return "the kernels count rows in 32 bits"
    if net.config.n_layers > native_module.MAX_BLOCKS:
        return f"{net.config.n_layers} blocks exceed the maximum of {native_module.MAX_BLOCKS}"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "tensors under a dispatch mode may hold no data"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "the kernels do not support torch.func transforms or forward-mode differentiation"
    return _refuses_input(x) or refuses_modes(net) or refuses_modules(net, x) or _refuses_weights(net)


def _refuses_weights(net: FusedModule) -> str | None:
    for block in net.blocks:
        if any(_lacks_memory(parameter) for parameter in block_parameters(block)):
            return "a parameter has no memory of its own"
    return None


def _lacks_memory(tensor: Tensor) -> bool:
    # For example weights sharded across processes, and torch's zero tensors without storage.
    return tensor.data_ptr() == 0 and tensor.numel() > 0


def _refuses_input(x: Tensor) -> str | None:
    if type(x) not in (Tensor, nn.Parameter):
        return f"the input is a {type(x).__name__}, which may hold no data"
    if x.is_inference() and torch.is_grad_enabled():
        return "an input was created in inference mode and cannot be saved for a backward"
    if _lacks_memory(x):
        return "an input has no memory of its own"
    return None


def refuses_recursion(net: FusedModule, states: Sequence[Tensor], recursion: Recursion) -> str | None:
    """Return why a recursion must call a supported network step by step, or None."""
    if recursion.precision is not None:
        return f"precision={recursion.precision!r} requires a GPU"
    for state in states:
        if (reason := _refuses_input(state)) is not None:
            return reason
    return checks.refuses_recursion(net, states, recursion)


def slower(net: FusedModule, x: Tensor) -> str | None:
    """Return why eager would be faster, or None.

    Few rows are bound by reading the weights, and packing reads them once more.

    Time relative to eager, measured with n = 2 on two cores. In training: 1.1 for 1 row of width 256, 1.35
    for 4 rows of width 512, 0.8 for 16 rows of width 512. In inference: 0.7 for 1 row of width 256, 2 for 1
    row of width 1,024, 0.9 for 4 rows of width 512.
    """
    rows, d = x.shape[0] * x.shape[1], net.config.d_model
    trains = torch.is_grad_enabled()
    min_rows, min_width = (16, 256) if trains else (4, 512)
    if rows < min_rows and d >= min_width:
        return f"{rows} rows of width {d} are bound by reading weights"
    if x.dtype == torch.bfloat16 and rows * d >= (_AMX_TRAINING if trains else _AMX_INFERENCE) and _has_amx():
        return "PyTorch multiplies bfloat16 with AMX on this processor, while the kernels use float32"
    return None


#: Rows times width above which PyTorch's bfloat16 is faster than our float32 on processors with AMX. In
#: inference, eager takes 0.6 times as long for 2,048 rows of width 256 and equally long for 97 rows of width
#: 512. In training, it takes equally long for 2,048 rows of width 256 (two cores of a Sapphire Rapids).
_AMX_INFERENCE, _AMX_TRAINING = 3 << 14, 1 << 19


def _has_amx() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())


def run(net: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    """Run a network or block on ``x`` [B, L, D] and ``mask`` [B, L]."""
    call = _Call(net, (x,), mask, (None, None), torch.is_grad_enabled())
    rows, _ = call.recursion(None, call.pack(x), None, 0, recompute=False)
    return call.unpack(rows)


def run_recursion(net: FusedModule, states: Sequence[Tensor], request: Recursion) -> tuple[Tensor, Tensor]:
    """Run T - 1 latent recursions without gradients and one with, on states [B, L, D] of one dtype."""
    n, read = request.n, request.read
    with_gradients = request.with_gradients and torch.is_grad_enabled()
    call = _Call(net, states, request.mask, output_norm_of(request), with_gradients)
    given_z = states[2]
    x, y, z = map(call.pack, states)

    def recursion(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        new_y, new_z = call.recursion(x if n > 0 else None, y, z, n, recompute=request.memory == "small")
        return new_y, z if new_z is None else new_z

    with torch.no_grad():
        for _ in range(request.T - 1):
            y, z = recursion(y, z)
    with torch.set_grad_enabled(with_gradients):
        y, z = recursion(y, z)
        y = call.unpack(y)
        return (y if read is None else read_positions(y, read)), given_z if n == 0 else call.unpack(z)


class _Call:
    """One network, applied to states of one shape and dtype.

    Args:
        states: Inputs of the network, each [B, L, D].
        output_norm: Result of :func:`~trm_kernels.backends.checks.output_norm_of`.
        with_gradients: Whether a recursion records gradients, if anything requires them.
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
        """Set the number of rows R and create the tensors that describe them, kept alive by this object."""
        batch, length, _ = self.shape
        positions = None
        self.nothing_valid = self.packing is not None and int(self.packing.count) == 0
        if self.packing is None:
            self.rows = batch * length
            self._starts = torch.arange(0, self.rows + 1, length, dtype=torch.int32)
        else:
            # There is at least one row, even if nothing is valid.
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
        """Return ``x`` [B, L, D] as float32 rows [R, D]."""
        rows = x if self.packing is None else self.packing.pack(x)
        return rows.reshape(self.rows, -1).to(torch.float32)

    def unpack(self, rows: Tensor) -> Tensor:
        """Return ``rows`` [R, D] as states [B, L, D] in the input's dtype, with zeros at padding."""
        if self.packing is None:
            return rows.view(self.shape).to(self.dtype)
        if self.nothing_valid:
            rows = rows * 0.0  # also zeroes the gradient
        return self.packing.unpack(rows).to(self.dtype)

    def recursion(
        self, x: Tensor | None, y: Tensor, z: Tensor | None, n: int, *, recompute: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run one latent recursion on rows [R, D]. With n = 0: one call of the network, with or without z."""
        settings = _Settings(
            n, self.output_eps, self.dropout, _seed() if self.dropout > 0.0 else 0, recompute
        )
        states = x, y, z
        if self.records and torch.is_grad_enabled():
            # The graph must not hold the packed weights through this object: the backward frees them.
            call = copy.copy(self)
            del call.packed
            return _Recursion.apply(call, settings, self.packed, self.weight, *states, *self.parameters)
        new_y, new_z, _ = self.forward(settings, self.packed, self.weight, states, keeps=False)
        return new_y, new_z

    def forward(
        self,
        settings: _Settings,
        packed: Tensor,
        weight: Tensor | None,
        states: Sequence[Tensor | None],
        *,
        keeps: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the new y and z [R, D] and the data for the backward; ``weight`` is the output norm's."""
        tensors = [_plain(tensor) for tensor in (*states, weight)]
        recursion = settings.recursion(tensors)
        threads = native_module.threads(self.rows)
        workspace = take(self.kernels.workspace_size(self.batch, recursion, False, threads))
        kept = take(self.kernels.kept_size(self.batch, recursion)) if keeps else None
        shape = self.rows, self.shape[2]
        y, z = torch.empty(shape), torch.empty(shape) if settings.n > 0 else None
        self.kernels.forward(self.batch, recursion, *_addresses((packed, kept, workspace, y, z)), threads)
        return y, z, kept

    def backward(
        self,
        settings: _Settings,
        saved: Sequence[Tensor | None],
        gradients_out: tuple[Tensor | None, Tensor | None],
    ) -> list[Tensor | None]:
        """Return the gradients of the output norm's weight, of x, y and z, and of the parameters.

        Args:
            saved: Data kept by the forward, packed weights, the output norm's weight, and the parameters.
            gradients_out: Gradients of the new y and z [R, D].
        """
        kept, packed, weight, *given = saved
        weight = _plain(weight)
        recursion = settings.recursion((None, None, None, weight))
        threads = native_module.threads(self.rows)
        workspace = take(self.kernels.workspace_size(self.batch, recursion, True, threads))
        shape = self.rows, self.shape[2]
        dy_out, dz_out = (_plain(gradient) for gradient in gradients_out)
        if dy_out is None:
            dy_out = torch.zeros(shape)
        dx = torch.empty(shape) if settings.n > 0 else None
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
        """Convert parameters to the kernels' format: ten per block (``struct Block`` in csrc/kernels.h)."""
        size = len(parameters) // self.net.config.n_layers
        found: list[Tensor | None] = []
        for i in range(0, len(parameters), size):
            # The paper's layers cast their weights to the input's dtype.
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
        """Convert gradients of :meth:`block_tensors` to gradients of the parameters."""
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
        """Return packed weights: new ones if the call records gradients, else cached ones if unchanged."""
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
class _Settings:
    """Non-tensor arguments of one recursion."""

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
    """A latent recursion that saves the data for its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        settings: _Settings,
        packed: Tensor,
        weight: Tensor | None,
        x: Tensor | None,
        y: Tensor,
        z: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        new_y, new_z, kept = call.forward(settings, packed, weight, (x, y, z), keeps=True)
        ctx.call, ctx.settings = call, settings
        # Save all tensors here, so that a backward, hooks and checkpoints can free them, and autograd detects
        # parameters modified in place. The states are not needed.
        ctx.save_for_backward(kept, packed, weight, *parameters)
        ctx.set_materialize_grads(False)
        return new_y, new_z

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_out: Tensor | None, dz_out: Tensor | None = None) -> tuple[Any, ...]:
        found = ctx.call.backward(ctx.settings, ctx.saved_tensors, (dy_out, dz_out))
        wanted = ctx.needs_input_grad[3:]
        gradients = (g if needs else None for g, needs in zip(found, wanted, strict=True))
        return None, None, None, *gradients


def _plain(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return ``tensor`` as float32 (rounded to ``dtype`` first), contiguous and detached."""
    if tensor is None:
        return None
    rounded = tensor.detach() if dtype is None else tensor.detach().to(dtype)
    return rounded.to(torch.float32).resolve_neg().contiguous()


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _seed() -> int:
    return int(torch.randint(2**62, (1,)).item())


def _packing(mask: Tensor | Packing | None) -> Packing | None:
    """Return a packing without unused rows, or None if every position is valid."""
    given = None
    if isinstance(mask, Packing):
        given, mask = mask, mask.mask
    if mask is None:
        return None
    # Read the mask even if a Packing has lengths: wrong lengths would make the kernels read out of bounds.
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
