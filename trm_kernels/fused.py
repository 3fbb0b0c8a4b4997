"""The ``triton`` backend: a network as a chain of fused blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trm_kernels import ops, reference
from trm_kernels.network import FusedModule, TransformerBlock

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: A row of the residual stream is normalised in one tile.
_WIDEST = 8192
#: Modules whose parameters the kernels read past their ``forward``: any other type (a LoRA wrapper, a
#: quantised layer) computes something else.
_KNOWN = (
    reference.TransformerBlock,
    TransformerBlock,
    reference.RMSNorm,
    reference.SeedAttention,
    reference.ScratchAttention,
    reference.PaperAttention,
    reference.RotaryFrequencies,
    reference.GeluMixer,
    reference.SwiGLU,
    reference.PackedSwiGLU,
    reference.CastedLinear,
    nn.Linear,
    nn.GELU,
    nn.Sequential,
)


def layout_name(module: FusedModule) -> str:
    """Which of :data:`trm_kernels.ops.block.LAYOUTS` the module's blocks follow."""
    config = module.config
    return f"{config.family}-tokens" if config.mixer == "tokens" else config.family


def block_parameters(block: nn.Module) -> list[Tensor]:
    """Parameters of a reference block in the order of its :class:`~trm_kernels.ops.block.Layout`."""
    assert isinstance(block, reference.TransformerBlock)
    family, tokens = block.config.family, block.config.mixer == "tokens"
    names = {
        ("seed", False): (
            "norm1.weight self_attn.in_proj_weight self_attn.in_proj_bias self_attn.out_proj.weight "
            "self_attn.out_proj.bias norm2.weight mlp.0.weight mlp.0.bias mlp.2.weight mlp.2.bias"
        ),
        ("scratch", False): (
            "norm1.weight mixer.q_proj.weight mixer.k_proj.weight mixer.v_proj.weight mixer.o_proj.weight "
            "norm2.weight ffn.w1.weight ffn.w3.weight ffn.w2.weight"
        ),
        ("scratch", True): (
            "norm1.weight mixer.mlp1.weight mixer.mlp1.bias mixer.mlp2.weight mixer.mlp2.bias "
            "norm2.weight ffn.w1.weight ffn.w3.weight ffn.w2.weight"
        ),
        ("paper", False): (
            "self_attn.qkv_proj.weight self_attn.o_proj.weight mlp.gate_up_proj.weight mlp.down_proj.weight"
        ),
        ("paper", True): (
            "mlp_t.gate_up_proj.weight mlp_t.down_proj.weight mlp.gate_up_proj.weight mlp.down_proj.weight"
        ),
    }[family, tokens]
    return [block.get_parameter(name) for name in names.split()]


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
    if x.numel() == 0:
        return "the batch is empty"
    if config.d_model > _WIDEST:
        return f"d_model {config.d_model} is over {_WIDEST}"
    if config.mixer == "attention" and config.head_dim > 256:
        return f"head size {config.head_dim} is over 256"
    if config.mixer == "tokens" and x.shape[1] > _WIDEST:
        return f"sequence length {x.shape[1]} of a token mixer is over {_WIDEST}"
    if mask is not None and mask.device != x.device:
        return f"the mask is on {mask.device}, the input on {x.device}"
    return _refuses_modules(module, x)


def _refuses_modules(module: FusedModule, x: Tensor) -> str | None:
    autocast = torch.is_autocast_enabled(x.device.type)
    for block in module.blocks:
        for name, child in block.named_modules():
            if type(child) not in _KNOWN and child is not module:
                return f"submodule {name or 'block'} is a {type(child).__name__}, not one of the family's"
            if child is not module and (child._forward_hooks or child._forward_pre_hooks):
                return f"submodule {name or 'block'} has forward hooks, which fused kernels would skip"
        for name, parameter in block.named_parameters():
            if type(parameter) not in (nn.Parameter, Tensor):
                return f"parameter {name} is a {type(parameter).__name__}: shard or wrap whole networks"
            if parameter.device != x.device:
                return f"parameter {name} is on {parameter.device}, the input on {x.device}"
            if parameter.dtype != x.dtype and not autocast and module.config.family != "paper":
                return (
                    f"parameter {name} is {parameter.dtype}, the input {x.dtype}: use autocast or one dtype"
                )
    return None


def run(module: FusedModule, x: Tensor, mask: Tensor | None) -> Tensor:
    """Run a network or block on ``x`` [B, L, D] and ``mask`` [B, L]."""
    from trm_kernels.ops.attention import mask_ends
    from trm_kernels.ops.block import block as fused_block

    config = module.config
    cos = sin = ends = seed = sumsq = None
    if config.rotary:
        tables = reference.rotary_tables(x.shape[1], config.head_dim, config.rope_theta, x)
        cos, sin = (table.contiguous() for table in tables)
    if mask is not None:
        mask = (mask != 0).to(torch.uint8)
        ends = mask_ends(mask)
    dropout = config.dropout if module.training and config.family != "paper" else 0.0
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
            layout_name(module),
            config.n_heads,
            config.norm_eps,
            dropout,
            operand_dtype(x),
        )
        sumsq = None if sumsq.numel() == 0 else sumsq
    return x
