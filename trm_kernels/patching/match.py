"""Structure of third-party tiny networks: one matcher per family, for :mod:`trm_kernels.patch`.

A matcher returns the :class:`~trm_kernels.config.NetworkConfig` that describes a block, or raises
:class:`Mismatch` with the reason why no config does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trm_kernels.config import Family, NetworkConfig
from trm_kernels.module import FusedModule
from trm_kernels.reference import rotary_tables

Tables = tuple[Tensor, Tensor]

#: Supported dtypes, with the relative error within which equal functions agree. Even models that were
#: converted to float64 computed their RoPE tables in float32.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Mismatch(Exception):
    """The reason why a fused network cannot replace a module."""


def require(holds: object, reason: str) -> None:
    """Raise :class:`Mismatch` with ``reason`` unless ``holds``."""
    if not holds:
        raise Mismatch(reason)


@dataclass(frozen=True)
class Site:
    """A module that resembles a tiny network: its path, its family by name, and the module that owns it."""

    path: str
    network: nn.Module
    family: Family
    owner: nn.Module | None

    @property
    def blocks(self) -> list[Any]:
        """The blocks that the network applies, in order."""
        return list(self.network if isinstance(self.network, nn.ModuleList) else self._layers)

    @property
    def block_paths(self) -> list[str]:
        """The path of each block inside the network."""
        prefix = "" if isinstance(self.network, nn.ModuleList) else "layers."
        return [f"{prefix}{i}" for i in range(len(self.blocks))]

    @property
    def _layers(self) -> nn.ModuleList:
        layers = self.network._modules["layers"]
        assert isinstance(layers, nn.ModuleList)
        return layers


def find_sites(model: nn.Module) -> Iterator[Site]:
    """Yield every module inside ``model`` that has the submodule names of a tiny network."""
    inside_fused = {
        id(child)
        for module in model.modules()
        if isinstance(module, FusedModule)
        for child in module.modules()
        if child is not module
    }
    for path, module in model.named_modules():
        family = None if id(module) in inside_fused else _family(module)
        if family is not None:
            owner = model.get_submodule(path.rpartition(".")[0]) if path else None
            yield Site(path, module, family, owner)


def _family(module: nn.Module) -> Family | None:
    if isinstance(module, FusedModule):
        return module.config.family
    listed = isinstance(module, nn.ModuleList)
    blocks = module if listed else module._modules.get("layers")
    if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
        return None
    names = set(blocks[0]._modules)
    if {"norm1", "mixer", "norm2", "ffn"} <= names:
        return "scratch" if listed else None
    if listed:
        return None
    if {"norm1", "self_attn", "norm2", "mlp"} <= names:
        return "seed"
    packed = "mlp" in names and "gate_up_proj" in blocks[0].get_submodule("mlp")._modules
    return "paper" if packed and names & {"self_attn", "mlp_t"} else None


def parameter_names(function: Callable[..., Any]) -> list[str]:
    """Return the parameter names of a function, without ``self`` for methods."""
    return list(inspect.signature(function).parameters)


def match(site: Site) -> tuple[NetworkConfig, Tables | None]:
    """Describe the network at ``site``.

    Returns:
        Its config, and the RoPE tables if its owner passes them to it.

    Raises:
        Mismatch: If no config describes it.
    """
    _require_plain(site.network)
    match_block = {"seed": _match_seed, "scratch": _match_scratch, "paper": _match_paper}[site.family]
    try:
        _require_signature(site)
        blocks = zip(site.blocks, site.block_paths, strict=True)
        configs = [match_block(block, path) for block, path in blocks]
    except (AttributeError, ValueError) as error:
        raise Mismatch(str(error)) from error
    require(len(set(configs)) == 1, "its blocks differ from one another")
    config = replace(configs[0], n_layers=len(configs))
    if site.family != "paper":
        return config, None
    assert site.owner is not None
    return _match_positions(site.owner, config)


def _match_seed(block: Any, at: str) -> NetworkConfig:
    _require_children(block, at, {"norm1", "self_attn", "norm2", "mlp"})
    attention = block.self_attn
    _require_type(attention, nn.MultiheadAttention, f"{at}.self_attn")
    require(attention.batch_first, f"{at}.self_attn has batch_first=False")
    require(not attention.add_zero_attn, f"{at}.self_attn has add_zero_attn=True")
    config = NetworkConfig(attention.embed_dim, 1, attention.num_heads, attention.dropout)
    for name, norm in (("norm1", block.norm1), ("norm2", block.norm2)):
        _require_type(norm, nn.RMSNorm, f"{at}.{name}")
        wide = torch.promote_types(attention.in_proj_weight.dtype, torch.float32)
        # With eps=None, nn.RMSNorm uses the epsilon of its compute dtype.
        _require_eps(torch.finfo(wide).eps if norm.eps is None else norm.eps, config, f"{at}.{name}")
    _require_type(block.mlp, nn.Sequential, f"{at}.mlp")
    require(len(block.mlp) == 3, f"{at}.mlp has {len(block.mlp)} layers, not Linear, GELU, Linear")
    for i, kind in enumerate((nn.Linear, nn.GELU, nn.Linear)):
        _require_type(block.mlp[i], kind, f"{at}.mlp.{i}")
    _require_exact_gelu(block.mlp[1], f"{at}.mlp.1")
    return config


def _match_scratch(block: Any, at: str) -> NetworkConfig:
    _require_children(block, at, {"norm1", "mixer", "norm2", "ffn"})
    mixer, width = block.mixer, block.norm1.weight.numel()
    if "mlp1" in mixer._modules:
        _require_children(mixer, f"{at}.mixer", {"mlp1", "mlp2", "activation"})
        _require_linears(mixer, f"{at}.mixer", ("mlp1", "mlp2"))
        _require_type(mixer.activation, nn.GELU, f"{at}.mixer.activation")
        _require_exact_gelu(mixer.activation, f"{at}.mixer.activation")
        length = mixer.mlp1.in_features
        config = NetworkConfig(width, 1, family="scratch", mixer="tokens", seq_len=length)
    else:
        projections = ("q_proj", "k_proj", "v_proj", "o_proj")
        _require_children(mixer, f"{at}.mixer", {*projections, "dropout"}, optional="rope")
        _require_linears(mixer, f"{at}.mixer", projections)
        _require_type(mixer.dropout, nn.Dropout, f"{at}.mixer.dropout")
        rotary = "rope" in mixer._modules
        theta = float(mixer.rope.base) if rotary else 10000.0
        config = NetworkConfig(
            width, 1, mixer.num_heads, mixer.dropout.p, family="scratch", rope=rotary, rope_theta=theta
        )
        if rotary:
            _require_tables((mixer.rope.cos_cached, mixer.rope.sin_cached), config)
    _require_children(block.ffn, f"{at}.ffn", {"w1", "w2", "w3"})
    _require_linears(block.ffn, f"{at}.ffn", ("w1", "w2", "w3"))
    for name, norm in (("norm1", block.norm1), ("norm2", block.norm2)):
        _require_eps(norm.eps, config, f"{at}.{name}")
    return config


def _match_paper(block: Any, at: str) -> NetworkConfig:
    tokens = "mlp_t" in block._modules
    _require_children(block, at, {"mlp_t" if tokens else "self_attn", "mlp"})
    _require_weights(block.mlp, f"{at}.mlp", ("gate_up_proj", "down_proj"))
    width = block.mlp.gate_up_proj.weight.shape[1]
    if tokens:
        _require_weights(block.mlp_t, f"{at}.mlp_t", ("gate_up_proj", "down_proj"))
        length = block.mlp_t.gate_up_proj.weight.shape[1]
        config = NetworkConfig(width, 1, family="paper", mixer="tokens", seq_len=length)
    else:
        attention = block.self_attn
        _require_weights(attention, f"{at}.self_attn", ("qkv_proj", "o_proj"))
        heads, groups = attention.num_heads, attention.num_key_value_heads
        require(heads == groups, f"{at}.self_attn has {groups} key-value heads for {heads} heads")
        require(not attention.causal, f"{at}.self_attn is causal")
        config = NetworkConfig(width, 1, heads, family="paper")
    _require_eps(block.norm_eps, config, at)
    return config


def _match_positions(owner: nn.Module, config: NetworkConfig) -> tuple[NetworkConfig, Tables | None]:
    """Add to the config whether RoPE applies, which an official network learns only in each call."""
    owner_config: Any = getattr(owner, "config", None)
    encoding = getattr(owner_config, "pos_encodings", None)
    rotary: Any = getattr(owner, "rotary_emb", None)
    if encoding is None:
        known = rotary is not None or config.mixer == "tokens"
        require(known, "its owner has neither config.pos_encodings nor rotary_emb: use of RoPE is unknown")
    else:
        has = "no rotary_emb" if rotary is None else "a rotary_emb"
        agree = (encoding == "rope") == (rotary is not None)
        require(agree, f"config.pos_encodings is {encoding!r}, but the model has {has}")
    if rotary is None:
        return replace(config, rope=False), None
    tables: Tables = rotary()
    if config.mixer == "attention":
        config = replace(config, rope_theta=float(getattr(owner_config, "rope_theta", config.rope_theta)))
        _require_tables(tables, config)
    return config, tables


def neox_tables(config: NetworkConfig, length: int, like: Tensor) -> Tables:
    """Return RoPE tables in the common format: cosines and sines [L, E], with equal halves of E."""
    cos, sin = rotary_tables(length, config.head_dim, config.rope_theta, like)
    return cos.repeat(1, 2), sin.repeat(1, 2)


def _require_tables(tables: Tables, config: NetworkConfig) -> None:
    length, theta = tables[0].shape[0], config.rope_theta
    tolerance = TOLERANCE[tables[0].dtype] + length * torch.finfo(torch.float32).eps
    for theirs, ours in zip(tables, neox_tables(config, length, tables[0]), strict=True):
        same = theirs.shape == ours.shape and bool(((theirs - ours).abs() <= tolerance).all())
        require(same, f"its RoPE tables are not those of the NeoX layout with theta {theta:g}")


def _require_plain(network: nn.Module) -> None:
    """Reject what a fused network would bypass: hooks, replaced methods, sharded or quantised weights."""
    for path, module in network.named_modules():
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        where = path or "the network"
        require(not any(getattr(module, name) for name in hooks), f"{where} has hooks")
        require("forward" not in vars(module), f"{where} has its own forward, set on the instance")
    parameters = dict(network.named_parameters())
    for path, parameter in parameters.items():
        kind = type(parameter).__name__
        require(type(parameter) is nn.Parameter, f"{path} is a {kind}: sharded, quantised or wrapped")
        require(parameter.dtype in TOLERANCE, f"{path} has dtype {parameter.dtype}")
        require(not parameter.is_meta, f"{path} is on the meta device and has no values yet")
    for attribute in ("dtype", "device"):
        found = sorted({str(getattr(parameter, attribute)) for parameter in parameters.values()})
        require(len(found) == 1, f"its parameters have more than one {attribute}: {', '.join(found)}")


def _require_signature(site: Site) -> None:
    if site.family == "scratch":
        found, known = parameter_names(site.blocks[0].forward), ["x"]
    elif site.family == "seed":
        found, known = parameter_names(site.network.forward), ["x", "mask"]
    else:  # further parameters are passed on to the blocks
        found, known = parameter_names(site.network.forward)[:2], ["hidden_states", "input_injection"]
    require(found == known, f"its forward has parameters ({', '.join(found)}), not ({', '.join(known)})")


def _require_children(module: nn.Module, at: str, names: set[str], optional: str | None = None) -> None:
    found = set(module._modules)
    for name in sorted(found - names - {optional}, key=str):
        raise Mismatch(f"{at} has an unknown child {name!r}")
    for name in sorted(names - found):
        raise Mismatch(f"{at} has no child {name!r}")


def _require_type(module: nn.Module, kind: type[nn.Module], at: str) -> None:
    # Exactly this class, because LoRA and quantisation change a layer by subclassing.
    found = type(module)
    require(found is kind, f"{at} is a {found.__module__}.{found.__qualname__}, not a {kind.__name__}")


def _require_linears(module: nn.Module, at: str, names: Sequence[str]) -> None:
    for name in names:
        _require_type(module.get_submodule(name), nn.Linear, f"{at}.{name}")


def _require_weights(module: nn.Module, at: str, names: Sequence[str]) -> None:
    """Require children that are linear layers of any class: a weight and no submodules."""
    _require_children(module, at, set(names))
    for name in names:
        linear = module.get_submodule(name)
        plain = not linear._modules and linear._parameters.get("weight") is not None
        require(plain, f"{at}.{name} is a {type(linear).__qualname__}, not a plain linear layer")


def _require_exact_gelu(gelu: nn.GELU, at: str) -> None:
    require(gelu.approximate == "none", f"{at} is GELU({gelu.approximate}), but the family uses exact GELU")


def _require_eps(eps: float, config: NetworkConfig, at: str) -> None:
    same = abs(eps - config.norm_eps) <= 1e-3 * config.norm_eps
    require(same, f"{at} has norm eps {eps:.3g}, but the {config.family} family uses {config.norm_eps:.3g}")
