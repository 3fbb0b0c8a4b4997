"""The ``triton`` backend: networks and recursions as chains of kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from trm_kernels import ops, prepared, reference
from trm_kernels.config import FLOAT32_EPS, NetworkConfig
from trm_kernels.network import FusedModule, TransformerBlock
from trm_kernels.packing import Packing

if TYPE_CHECKING:
    from trm_kernels.ops.chain import Memory

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: A row of the residual stream is normalised in one tile.
_WIDEST = 8192
#: And a token mixer's norm runs over the sequence, for several channels at once: its backward spills
#: 2976 bytes a thread at 8192 positions.
_LONGEST = 2048

#: Submodules of a block that hold parameters, and the parameters that the kernels read from each, in the order
#: of its :class:`~trm_kernels.ops.layouts.Layout`. Spelled out, because walking a module tree on every call
#: takes longer on the host than launching its kernels (0.2 ms a network, measured).
_READ: dict[str, tuple[tuple[str, str], ...]] = {
    "seed": (
        ("norm1", "weight"),
        ("self_attn", "in_proj_weight in_proj_bias"),
        ("self_attn.out_proj", "weight bias"),
        ("norm2", "weight"),
        ("mlp.0", "weight bias"),
        ("mlp.2", "weight bias"),
    ),
    "scratch": (
        ("norm1", "weight"),
        ("mixer.q_proj", "weight"),
        ("mixer.k_proj", "weight"),
        ("mixer.v_proj", "weight"),
        ("mixer.o_proj", "weight"),
        ("norm2", "weight"),
        ("ffn.w1", "weight"),
        ("ffn.w3", "weight"),
        ("ffn.w2", "weight"),
    ),
    "scratch-tokens": (
        ("norm1", "weight"),
        ("mixer.mlp1", "weight bias"),
        ("mixer.mlp2", "weight bias"),
        ("norm2", "weight"),
        ("ffn.w1", "weight"),
        ("ffn.w3", "weight"),
        ("ffn.w2", "weight"),
    ),
    "paper": (
        ("self_attn.qkv_proj", "weight"),
        ("self_attn.o_proj", "weight"),
        ("mlp.gate_up_proj", "weight"),
        ("mlp.down_proj", "weight"),
    ),
    "paper-tokens": (
        ("mlp_t.gate_up_proj", "weight"),
        ("mlp_t.down_proj", "weight"),
        ("mlp.gate_up_proj", "weight"),
        ("mlp.down_proj", "weight"),
    ),
}
#: Submodules whose ``forward`` the kernels replace without reading a parameter of their own.
_REPLACED = {
    "seed": ("mlp", "mlp.1"),
    "scratch": ("mixer", "ffn"),
    "scratch-tokens": ("mixer", "ffn"),
    "paper": ("self_attn", "mlp"),
    "paper-tokens": ("mlp_t", "mlp"),
}
#: What those submodules may be: another type (a LoRA wrapper, a quantised layer) computes something else.
_KNOWN = frozenset(
    (
        reference.TransformerBlock,
        TransformerBlock,
        reference.RMSNorm,
        reference.SeedAttention,
        reference.ScratchAttention,
        reference.PaperAttention,
        reference.GeluMixer,
        reference.SwiGLU,
        reference.PackedSwiGLU,
        reference.CastedLinear,
        nn.Linear,
        nn.GELU,
        nn.Sequential,
    )
)


def layout_name(config: NetworkConfig) -> str:
    """Which of :data:`trm_kernels.ops.layouts.LAYOUTS` the blocks of a network follow."""
    return f"{config.family}-tokens" if config.mixer == "tokens" else config.family


def _submodule(block: nn.Module, path: str) -> nn.Module:
    # By the dictionaries: nn.Module.__getattr__ and get_submodule cost several times as much.
    for name in path.split("."):
        child = block._modules[name]
        assert child is not None
        block = child
    return block


def block_parameters(block: nn.Module) -> list[Tensor]:
    """Parameters of a reference block in the order of its :class:`~trm_kernels.ops.layouts.Layout`."""
    assert isinstance(block, reference.TransformerBlock)
    named = _named_parameters(block, layout_name(block.config))
    return [parameter for _, parameter in named if parameter is not None]


def _named_parameters(block: nn.Module, layout: str) -> Iterator[tuple[str, Tensor | None]]:
    for path, names in _READ[layout]:
        parameters = _submodule(block, path)._parameters
        for name in names.split():
            yield path, parameters[name]


def operand_dtype(x: Tensor) -> torch.dtype:
    """The dtype that GEMM operands are rounded to: autocast's where it is on, else that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def refuses(module: FusedModule, x: Tensor, mask: Tensor | None) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    config = module.config
    if ops.INTERPRET:
        if x.device.type != "cpu":
            return f"TRITON_INTERPRET=1 runs on CPU tensors, and the input is on {x.device}"
        if torch.bfloat16 in (x.dtype, operand_dtype(x)):
            return "TRITON_INTERPRET=1 multiplies the bit patterns of bfloat16"
    elif x.device.type != "cuda":
        return f"the input is on {x.device}, the kernels run on a GPU"
    if x.dtype not in _DTYPES and not (ops.INTERPRET and x.dtype == torch.float64):
        return f"dtype {x.dtype} is not one of float32, bfloat16, float16"
    if x.dtype != torch.float32 and operand_dtype(x) != x.dtype:
        return f"a {x.dtype} stream under autocast to {operand_dtype(x)}: eager would widen it"
    if x.numel() == 0:
        return "the batch is empty"
    if config.d_model > _WIDEST:
        return f"d_model {config.d_model} is over {_WIDEST}"
    if config.mixer == "attention" and config.head_dim > 256:
        return f"head size {config.head_dim} is over 256"
    if config.mixer == "tokens" and x.shape[1] > _LONGEST:
        return f"sequence length {x.shape[1]} of a token mixer is over {_LONGEST}"
    if not torch.compiler.is_compiling():
        if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            return "the kernels have no rules for torch.func transforms or forward-mode differentiation"
        if x.is_inference() and torch.is_grad_enabled():
            return "the input was made in inference mode, and cannot be saved for a backward"
    if mask is not None and mask.device != x.device:
        return f"the mask is on {mask.device}, the input on {x.device}"
    return _refuses_modules(module, x)


def _refuses_modules(module: FusedModule, x: Tensor) -> str | None:
    layout = layout_name(module.config)
    one_dtype = not torch.is_autocast_enabled(x.device.type) and module.config.family != "paper"
    for block in module.blocks:
        if type(block) not in _KNOWN:
            return f"a block is a {type(block).__name__}, not one of the family's"
        if block is not module and _is_hooked(block):
            return "a block has hooks or a forward of its own, which fused kernels would skip"
        for path in (*_REPLACED[layout], *(path for path, _ in _READ[layout])):
            child = _submodule(block, path)
            if type(child) not in _KNOWN:
                return f"submodule {path} is a {type(child).__name__}, not one of the family's"
            if _is_hooked(child):
                return f"submodule {path} has hooks or a forward of its own, which fused kernels would skip"
            if isinstance(child, nn.GELU) and child.approximate != "none":
                return f"submodule {path} is GELU({child.approximate!r}), the kernels compute it with erf"
        for path, parameter in _named_parameters(block, layout):
            if parameter is None:
                return f"{path} lacks a parameter that the family has"
            if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
                kind = type(parameter).__name__
                return f"a parameter of {path} is a {kind}: shard or wrap whole networks"
            if parameter.device != x.device:
                return f"a parameter of {path} is on {parameter.device}, the input on {x.device}"
            if one_dtype and parameter.dtype != x.dtype:
                return (
                    f"a parameter of {path} is {parameter.dtype}, the input {x.dtype}: use one, or autocast"
                )
    return None


def _is_hooked(child: nn.Module) -> bool:
    """Whether calling ``child`` does more than its class says."""
    forward = child._forward_hooks or child._forward_pre_hooks
    backward = child._backward_hooks or child._backward_pre_hooks
    return bool(forward) or bool(backward) or "forward" in child.__dict__


def _rotary_tables(config: NetworkConfig, length: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous RoPE tables [L, E/2] for states like ``x``; the same tensors again for the same shape."""
    wide = torch.promote_types(x.dtype, torch.float32)
    arguments = length, config.head_dim, config.rope_theta, wide, x.device
    if torch.compiler.is_compiling():
        return _make_tables(*arguments)
    # What a captured graph computes exists only in its own memory and only after a replay; what a dispatch
    # mode makes may be no real tensor.
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing or torch._C._len_torch_dispatch_stack() > 0 or type(x) not in (Tensor, nn.Parameter):
        return _make_tables(*arguments)
    return _cached_tables(*arguments)


def _make_tables(
    length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    like = torch.empty((), dtype=dtype, device=device)
    cos, sin = reference.rotary_tables(length, head_dim, theta, like)
    return cos.contiguous(), sin.contiguous()


@functools.lru_cache(maxsize=32)
def _cached_tables(
    length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    # Tensors made in inference mode could not be saved for a later backward.
    with torch.inference_mode(False):
        return _make_tables(length, head_dim, theta, dtype, device)


def _matrices(
    module: FusedModule, parameters: list[Tensor], layout: str, operand: torch.dtype
) -> list[Tensor]:
    """The matrices that the kernels read: kept in inference, made here in training."""
    from trm_kernels.ops.layouts import LAYOUTS, prepare

    if torch.compiler.is_compiling():
        return []  # launches cannot be traced: the op makes them itself
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    # A captured graph must fold again on every replay, as the weights may change between replays. Under a
    # dispatch mode tensors may hold no data.
    keeps = not (torch.is_grad_enabled() or module.training or capturing)
    keeps = keeps and torch._C._len_torch_dispatch_stack() == 0
    with torch.no_grad():
        if not keeps:
            return prepare(LAYOUTS[layout], parameters, operand)
        key = prepared.key_of(parameters, operand)
        matrices = prepared.recall(module, key)
        if matrices is None:
            # Tensors made in inference mode could not be saved for a later backward.
            with torch.inference_mode(False):
                matrices = prepare(LAYOUTS[layout], parameters, operand)
            prepared.keep(module, key, matrices)
        return matrices


class _Prepared:
    """One network, ready to be applied to states of one shape and dtype."""

    def __init__(
        self, module: FusedModule, like: Tensor, mask: Tensor | None, packing: Packing | None, n: int
    ) -> None:
        from trm_kernels.ops.attention_common import mask_ends
        from trm_kernels.ops.recursion import Numbers, Tensors

        config = module.config
        self.layout = layout_name(config)
        self.operand = operand_dtype(like)
        self.parameters = [parameter for block in module.blocks for parameter in block_parameters(block)]
        self.matrices = _matrices(module, self.parameters, self.layout, self.operand)
        batch, length, _ = like.shape
        cos = sin = ends = starts = count = None
        if packing is not None:
            batch, length, starts, count = packing.batch, packing.length, packing.starts, packing.count
        if config.rotary:
            cos, sin = _rotary_tables(config, length, like)
            if packing is not None:
                positions = packing.positions()
                cos, sin = cos[positions], sin[positions]
        if mask is not None:
            mask = (mask != 0).to(torch.uint8).contiguous()
            ends = mask_ends(mask)
        self.dropout = config.dropout if module.training else 0.0
        self.device = like.device
        self.tensors = Tensors(mask, ends, starts, count, cos, sin)
        self.numbers = Numbers(
            self.layout,
            n,
            config.n_heads,
            batch,
            length,
            config.norm_eps,
            None,
            self.dropout,
            self.operand,
            "fast",
        )

    def __call__(
        self,
        x: Tensor | None,
        y: Tensor,
        z: Tensor | None,
        output_weight: Tensor | None = None,
        output_eps: float | None = None,
        memory: Memory = "balanced",
    ) -> tuple[Tensor, Tensor]:
        """One latent recursion, or, with n = 0, one network call."""
        from trm_kernels.ops.recursion import recursion

        tensors = self.tensors
        if self.dropout > 0.0:
            tensors = tensors._replace(seed=torch.randint(2**62, (1,), device=self.device))
        numbers = self.numbers._replace(output_eps=output_eps, memory=memory)
        return recursion(x, y, z, self.parameters, self.matrices, output_weight, *tensors, *numbers)


def run(module: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    """Run a network or block on ``x`` [B, L, D] and ``mask`` [B, L]."""
    return _Prepared(module, x, mask, None, n=0)(None, x, None, memory="fast")[0]


def fusible_norm(output_norm: object) -> bool:
    """Whether a recursion may apply ``output_norm`` in its own kernels."""
    known = type(output_norm) in (reference.RMSNorm, nn.RMSNorm)
    return output_norm is None or (
        known and isinstance(output_norm, nn.Module) and not _is_hooked(output_norm)
    )


def refuses_recursion(module: FusedModule, states: Sequence[Tensor], output_norm: object) -> str | None:
    """Why a recursion over a network that the kernels serve must call it step by step, or None."""
    if _is_hooked(module):
        return "the network has hooks or a forward of its own, which a fused recursion would skip"
    if not fusible_norm(output_norm):
        return f"output_norm is a {type(output_norm).__name__}, not an RMSNorm"
    if output_norm is not None and not module.config.pre_norm:
        return "a post-norm network has no use for output_norm"
    if output_norm is not None:
        weight = getattr(output_norm, "weight", None)
        shape = output_norm.normalized_shape if isinstance(output_norm, nn.RMSNorm) else weight.shape  # type: ignore[union-attr]
        if tuple(shape) != (module.config.d_model,):
            return f"output_norm normalises {list(shape)}, not the width {module.config.d_model}"
        if weight is not None and weight.device != states[0].device:
            return f"output_norm is on {weight.device}, the states on {states[0].device}"
    if any(state.device != states[0].device for state in states):
        return "x, y and z are on different devices"
    return None


def run_recursion(
    module: FusedModule,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    n: int,
    *,
    T: int,
    mask: Tensor | None,
    output_norm: nn.Module | None,
    with_gradients: bool,
    memory: Memory,
) -> tuple[Tensor, Tensor]:
    """T - 1 latent recursions without gradient and one with, on states [B, L, D] of one dtype."""
    packing = None if mask is None else Packing.of(mask)
    if packing is not None:
        x, y, z = packing.pack(x), packing.pack(y), packing.pack(z)
    network = _Prepared(module, y, None, packing, n)
    weight: Tensor | None = None
    eps: float | None = None
    if output_norm is not None:
        weight = output_norm.weight  # type: ignore[assignment]
        eps = FLOAT32_EPS if output_norm.eps is None else output_norm.eps  # type: ignore[assignment]

    def recursion(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        new_y, new_z = network(x if n > 0 else None, y, z, weight, eps, memory)
        return new_y, z if n == 0 else new_z

    with torch.no_grad():
        for _ in range(T - 1):
            y, z = recursion(y, z)
    with torch.set_grad_enabled(with_gradients and torch.is_grad_enabled()):
        y, z = recursion(y, z)
        if packing is not None:
            y, z = packing.unpack(y), packing.unpack(z)
        return y, z
