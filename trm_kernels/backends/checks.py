"""The parameters that kernels read from a module, and checks whether they can handle it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_internals

from trm_kernels import ops, reference
from trm_kernels.backends.registry import Recursion
from trm_kernels.config import FLOAT32_EPS, NetworkConfig
from trm_kernels.module import FusedModule

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Maximum width: a row of the residual stream is normalised in one tile.
_MAX_WIDTH = 8192
#: Maximum sequence length of a token mixer, whose norm runs along the sequence for several channels at once:
#: its backward spills 2976 bytes per thread at 8192 positions.
_MAX_LENGTH = 2048

#: Submodules of a block that hold parameters, and the parameters that the kernels read from each, in the
#: order of its :class:`~trm_kernels.ops.layouts.Layout`. Listed explicitly, because walking a module tree in
#: every call takes longer on the host than launching its kernels (0.2 ms per network, measured).
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
#: Submodules without parameters of their own whose ``forward`` the kernels replace.
_REPLACED = {
    "seed": ("mlp", "mlp.1"),
    "scratch": ("mixer", "ffn"),
    "scratch-tokens": ("mixer", "ffn"),
    "paper": ("self_attn", "mlp"),
    "paper-tokens": ("mlp_t", "mlp"),
}
#: Allowed types of blocks and these submodules: other types (a LoRA wrapper, a quantised layer) compute
#: something else. A subclass that computes the same as its base adds itself.
KNOWN: set[type[nn.Module]] = {
    reference.TransformerBlock,
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
}


def layout_name(config: NetworkConfig) -> str:
    """Return the name in :data:`trm_kernels.ops.layouts.LAYOUTS` of the layout of a network's blocks."""
    return f"{config.family}-tokens" if config.mixer == "tokens" else config.family


def _submodule(block: nn.Module, path: str) -> nn.Module:
    # Access the dictionaries: nn.Module.__getattr__ and get_submodule take several times as long.
    for name in path.split("."):
        child = block._modules[name]
        assert child is not None
        block = child
    return block


def block_parameters(block: nn.Module) -> list[Tensor]:
    """Return a reference block's parameters in the order of its :class:`~trm_kernels.ops.layouts.Layout`."""
    assert isinstance(block, reference.TransformerBlock)
    named = _named_parameters(block, layout_name(block.config))
    return [parameter for _, parameter in named if parameter is not None]


def _named_parameters(block: nn.Module, layout: str) -> Iterator[tuple[str, Tensor | None]]:
    for path, names in _READ[layout]:
        parameters = _submodule(block, path)._parameters
        for name in names.split():
            yield path, parameters.get(name)


def operand_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to which GEMM operands are rounded: autocast's if enabled, else that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def refuses(module: FusedModule, x: Tensor, mask: Tensor | None) -> str | None:
    """Return why the kernels cannot handle this call, or None if they can."""
    config = module.config
    if ops.INTERPRET:
        if x.device.type != "cpu":
            return f"TRITON_INTERPRET=1 runs on CPU tensors, but the input is on {x.device}"
        if not ops.INTERPRETS_BFLOAT16 and torch.bfloat16 in (x.dtype, operand_dtype(x)):
            return "TRITON_INTERPRET=1 multiplies the bit patterns of bfloat16"
    elif x.device.type != "cuda":
        return f"the input is on {x.device}, but the kernels run on a GPU"
    if x.dtype not in _DTYPES and not (ops.INTERPRET and x.dtype == torch.float64):
        return f"dtype {x.dtype} is not one of float32, bfloat16, float16"
    if x.dtype != torch.float32 and operand_dtype(x) != x.dtype:
        return f"under autocast to {operand_dtype(x)} eager would widen a {x.dtype} stream"
    if x.numel() == 0:
        return "the batch is empty"
    if config.d_model > _MAX_WIDTH:
        return f"d_model {config.d_model} exceeds the maximum of {_MAX_WIDTH}"
    if config.mixer == "attention" and config.head_dim > 256:
        return f"head size {config.head_dim} exceeds the maximum of 256"
    if config.mixer == "tokens" and x.shape[1] > _MAX_LENGTH:
        return f"sequence length {x.shape[1]} of a token mixer exceeds the maximum of {_MAX_LENGTH}"
    if not torch.compiler.is_compiling():
        if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            return "the kernels do not support torch.func transforms or forward-mode differentiation"
        if x.is_inference() and torch.is_grad_enabled():
            return "the input was created in inference mode and cannot be saved for a backward"
    if mask is not None and mask.device != x.device:
        return f"the mask is on {mask.device}, but the input is on {x.device}"
    return refuses_modes(module) or refuses_modules(module, x)


def refuses_modules(module: FusedModule, x: Tensor) -> str | None:
    """Return why the modules inside ``module`` must be called one by one, or None."""
    if module_internals._global_forward_hooks or module_internals._global_forward_pre_hooks:
        return "there are global module hooks, which fused kernels would skip"
    if module.overridden & {"forward_eager", "blocks"}:
        return f"{type(module).__name__} overrides forward_eager or blocks"
    layout = layout_name(module.config)
    one_dtype = not torch.is_autocast_enabled(x.device.type) and module.config.family != "paper"
    for block in module.blocks:
        if type(block) not in KNOWN:
            return f"a block is a {type(block).__name__}, not one of the family's"
        if block is not module and is_hooked(block):
            return "a block has hooks or its own forward, which fused kernels would skip"
        for path in (*_REPLACED[layout], *(path for path, _ in _READ[layout])):
            child = _submodule(block, path)
            if type(child) not in KNOWN:
                return f"submodule {path} is a {type(child).__name__}, not one of the family's"
            if is_hooked(child):
                return f"submodule {path} has hooks or its own forward, which fused kernels would skip"
            if isinstance(child, nn.GELU) and child.approximate != "none":
                return f"submodule {path} is GELU({child.approximate!r}), but the kernels use erf"
        for path, parameter in _named_parameters(block, layout):
            if parameter is None:
                return f"{path} has no parameter where the family has one"
            if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
                kind = type(parameter).__name__
                return f"a parameter of {path} is a {kind}: shard or wrap whole networks"
            if parameter.device != x.device:
                return f"a parameter of {path} is on {parameter.device}, but the input is on {x.device}"
            if one_dtype and parameter.dtype != x.dtype:
                return (
                    f"a parameter of {path} is {parameter.dtype}, but the input is {x.dtype}: "
                    "use the same dtype, or autocast"
                )
    return None


def refuses_modes(module: FusedModule) -> str | None:
    """Return why the attention layers' dropout requires calling blocks one by one, or None."""
    if module.config.dropout > 0.0:
        name = "mixer" if module.config.family == "scratch" else "self_attn"
        for block in module.blocks:
            attention = block._modules.get(name)
            if attention is not None and attention.training != module.training:
                return "an attention layer is in another mode (train or eval) than the network"
    return None


def is_hooked(child: nn.Module) -> bool:
    """Whether calling ``child`` does more than its class defines."""
    forward = child._forward_hooks or child._forward_pre_hooks
    backward = child._backward_hooks or child._backward_pre_hooks
    return bool(forward) or bool(backward) or "forward" in child.__dict__


def refuses_skipping(module: FusedModule) -> str | None:
    """Return why a recursion must call the network, or None if reading its blocks computes the same."""
    if is_hooked(module):
        return "the network has hooks or its own forward, which would be skipped"
    if module.overridden:
        return f"{type(module).__name__} has its own {min(module.overridden)}, which would be skipped"
    return None


def refuses_recursion(module: FusedModule, states: Sequence[Tensor], recursion: Recursion) -> str | None:
    """Return why a recursion must call a supported network step by step, or None."""
    output_norm = recursion.output_norm
    if (reason := refuses_skipping(module)) is not None:
        return reason
    if any(state.device != states[0].device for state in states):
        return "x, y and z are on different devices"
    if output_norm is not None and (reason := _refuses_norm(module.config, output_norm, states[0])):
        return reason
    return None if recursion.precision is None else _refuses_fp8(states[0])


def output_norm_of(recursion: Recursion) -> tuple[Tensor | None, float | None]:
    """Return the weight [D] and eps of a supported output norm; eps is None if there is no norm."""
    norm = recursion.output_norm
    if norm is None:
        return None, None
    assert isinstance(norm, (reference.RMSNorm, nn.RMSNorm))
    return norm.weight, FLOAT32_EPS if norm.eps is None else norm.eps


def _refuses_norm(config: NetworkConfig, norm: object, state: Tensor) -> str | None:
    if type(norm) not in (reference.RMSNorm, nn.RMSNorm):
        return f"output_norm is a {type(norm).__name__}, not an RMSNorm"
    assert isinstance(norm, (reference.RMSNorm, nn.RMSNorm))
    if is_hooked(norm):
        return "output_norm has hooks or its own forward, which a fused recursion would skip"
    if not config.pre_norm:
        return "a post-norm network does not support output_norm"
    weight = norm.weight
    shape = norm.normalized_shape if isinstance(norm, nn.RMSNorm) else weight.shape
    if tuple(shape) != (config.d_model,):
        return f"output_norm normalises {list(shape)}, not the width {config.d_model}"
    if weight is not None and weight.device != state.device:
        return f"output_norm is on {weight.device}, but the states are on {state.device}"
    return None


def _refuses_fp8(state: Tensor) -> str | None:
    if ops.INTERPRET:
        return None
    if torch.version.hip is not None:
        return "fp8 requires an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(state.device)
    return None if major >= 9 else f"the GPU has compute capability {major}.{minor}; fp8 needs 9.0 or newer"
