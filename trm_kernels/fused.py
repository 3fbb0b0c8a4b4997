"""The ``triton`` backend: a network as a chain of fused blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from trm_kernels import ops, reference
from trm_kernels.config import NetworkConfig
from trm_kernels.network import FusedModule, TransformerBlock

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: A row of the residual stream is normalised in one tile.
_WIDEST = 8192
#: And a token mixer's norm runs over the sequence, for several channels at once: its backward spills
#: 2976 bytes a thread at 8192 positions.
_LONGEST = 2048

#: Submodules of a block that hold parameters, and the parameters that the kernels read from each, in the
#: order of the block's :class:`~trm_kernels.ops.sublayer.Layout`. Spelled out, because walking a module
#: tree on every call takes longer on the host than launching its kernels (0.2 ms a network, measured).
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
    """Which of :data:`trm_kernels.ops.sublayer.LAYOUTS` the blocks of a network follow."""
    return f"{config.family}-tokens" if config.mixer == "tokens" else config.family


def _submodule(block: nn.Module, path: str) -> nn.Module:
    # By the dictionaries: nn.Module.__getattr__ and get_submodule cost several times as much.
    for name in path.split("."):
        child = block._modules[name]
        assert child is not None
        block = child
    return block


def block_parameters(block: nn.Module) -> list[Tensor]:
    """Parameters of a reference block in the order of its :class:`~trm_kernels.ops.sublayer.Layout`."""
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


def _rotary_tables(config: NetworkConfig, x: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous RoPE tables [L, E/2] for ``x``; the same tensors again for the same shape."""
    wide = torch.promote_types(x.dtype, torch.float32)
    arguments = x.shape[1], config.head_dim, config.rope_theta, wide, x.device
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


def run(module: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    """Run a network or block on ``x`` [B, L, D] and ``mask`` [B, L]."""
    from trm_kernels.ops.attention import mask_ends
    from trm_kernels.ops.block import block as fused_block

    config = module.config
    cos = sin = ends = seed = sumsq = None
    if config.rotary:
        cos, sin = _rotary_tables(config, x)
    if mask is not None:
        mask = (mask != 0).to(torch.uint8).contiguous()
        ends = mask_ends(mask)
    layout = layout_name(config)
    dropout = config.dropout if module.training else 0.0
    for block in module.blocks:
        if dropout > 0.0:
            seed = torch.randint(2**62, (1,), device=x.device)
        x, sumsq = fused_block(
            x,
            sumsq,
            block_parameters(block),
            mask,
            ends,
            cos,
            sin,
            seed,
            layout,
            config.n_heads,
            config.norm_eps,
            dropout,
            operand_dtype(x),
        )
        sumsq = None if sumsq.numel() == 0 else sumsq
    return x
