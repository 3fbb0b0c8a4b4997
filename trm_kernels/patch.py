"""Swap the tiny networks inside somebody else's model for fused ones, weights shared.

:func:`patch` recognises models by their structure and never imports them. It knows three origins, one for
each family of :class:`~trm_kernels.config.NetworkConfig`:

- ``seed``: a module with ``layers`` of blocks ``norm1 self_attn norm2 mlp`` (anonx3247/llm-trm);
- ``scratch``: an ``nn.ModuleList`` of blocks ``norm1 mixer norm2 ffn``
  (dino65-dev/TRM-Tiny-Recursive-Model);
- ``paper``: a module with ``layers`` of blocks ``self_attn mlp`` or ``mlp_t mlp``
  (SamsungSAILMontreal/TinyRecursiveModels).

What it does not know for certain it leaves alone, and says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trm_kernels import backends, recursion
from trm_kernels.config import Family, NetworkConfig
from trm_kernels.module import FusedModule
from trm_kernels.network import DispatchingModule, TinyRecursiveNetwork, TransformerBlock
from trm_kernels.patching.match import Mismatch, Site, find_sites, match, parameter_names, require
from trm_kernels.patching.probe import probe_loop, probe_network

Kind = Literal["network", "loop"]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PatchEntry:
    """What became of one network or loop.

    Attributes:
        path: Path of the network in the model, or of the owner and the method that holds the loop.
        kind: ``"network"`` or ``"loop"``.
        family: The family that it looks like.
        outcome: ``"swapped"`` or ``"left"``.
        reason: What the outcome rests on.
    """

    path: str
    kind: Kind
    family: Family
    outcome: Literal["swapped", "left"]
    reason: str

    def __str__(self) -> str:
        return f"{self.outcome:8}{self.kind} {self.path or '(the model)'} [{self.family}]: {self.reason}"


@dataclass(frozen=True)
class PatchReport:
    """Everything that :func:`patch` found. ``print`` it, or read its entries."""

    entries: tuple[PatchEntry, ...]

    @property
    def swapped(self) -> tuple[PatchEntry, ...]:
        """What runs on this library now."""
        return tuple(entry for entry in self.entries if entry.outcome == "swapped")

    @property
    def left(self) -> tuple[PatchEntry, ...]:
        """What runs as before."""
        return tuple(entry for entry in self.entries if entry.outcome == "left")

    def __str__(self) -> str:
        return "\n".join(map(str, self.entries)) or "found no tiny recursive network"


def patch(model: nn.Module, *, probe: bool = True, backend: str | None = None) -> PatchReport:
    """Swap the tiny networks and recursion loops inside ``model``, in place.

    The fused networks hold the very parameters of those they replace: optimizers built before go on
    working, and the keys of ``model.state_dict()`` stay. Move the model to its device and dtype first.
    One thing differs: at masked positions a fused network gives zeros.

    Args:
        model: The model that owns the networks. It is changed.
        probe: Compare each network and loop with its replacement on random inputs, and leave those that
            differ: outputs and gradients, in eval mode, without dropout in training mode too, with and
            without a mask where the family takes one. False trusts structure and names alone.
        backend: Backend of the fused networks, as for :class:`~trm_kernels.TinyRecursiveNetwork`.

    Returns:
        A report of what was swapped, what was left, and why.

    Raises:
        ValueError: ``backend`` names no backend.

    Example:
        >>> print(patch(model))  # doctest: +SKIP
        swapped network net [seed]: equal on the probe, error 1.2e-07
    """
    if backend is not None:
        backends.validate_name(backend)
    sites = list(find_sites(model))
    networks = [_patch_network(model, site, probe, backend) for site in sites]
    loops = {  # a model may own two networks of its loop
        id(site.owner): list(_patch_loops(site, network, probe))
        for site, network in zip(sites, networks, strict=True)
        if site.owner is not None
    }
    return PatchReport((*networks, *(entry for found in loops.values() for entry in found)))


class ReasoningModule(TinyRecursiveNetwork):
    """A paper network that is called as the official ``L_level`` is."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, input_injection: Tensor, cos_sin: Pair | None = None
    ) -> Tensor:
        """Apply the network to ``hidden_states + input_injection`` [B, L, D].

        The tables in ``cos_sin`` are not read: :func:`patch` compared them with this network's own.
        """
        config = self.config
        if config.mixer == "attention" and (cos_sin is not None) != config.rope:
            given = "without" if cos_sin is None else "with"
            raise ValueError(f"this network was patched with rope={config.rope}, but called {given} cos_sin")
        return super().forward(hidden_states + input_injection)


class BlockList(DispatchingModule, nn.ModuleList):
    """A fused network that is also the ``nn.ModuleList`` of its blocks, for models that iterate over it."""

    def __init__(self, config: NetworkConfig, *, backend: str | None = None) -> None:
        options = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "n_layers"}
        super().__init__(TransformerBlock(**options, backend=backend) for _ in range(config.n_layers))
        self.config = config
        self.backend = backend

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self)

    def forward_eager(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self:
            assert isinstance(block, TransformerBlock)
            x = block.forward_eager(x, mask)
        return x


class SeedLoops:
    """The recursion methods of the seed's models, over a fused ``net``."""

    net: TinyRecursiveNetwork
    n_latent_steps: int
    n_deep_recursions: int

    def latent_recursion(self, x: Tensor, y: Tensor, z: Tensor) -> Pair:
        return recursion.latent_recursion(self.net, x, y, z, self.n_latent_steps)

    def run_deep_recursion(self, x: Tensor, y: Tensor, z: Tensor, with_gradients: bool = True) -> Pair:
        n, cycles = self.n_latent_steps, max(self.n_deep_recursions, 1)
        return recursion.deep_recursion(self.net, x, y, z, n, cycles, with_gradients=with_gradients)

    def _latent_recursion_with_mask(self, x: Tensor, y: Tensor, z: Tensor, mask: Tensor | None) -> Pair:
        norm = getattr(self, "output_norm", None)
        return recursion.latent_recursion(self.net, x, y, z, self.n_latent_steps, mask=mask, output_norm=norm)

    def _deep_recursion_with_mask(self, x: Tensor, y: Tensor, z: Tensor, mask: Tensor | None) -> Pair:
        norm = getattr(self, "output_norm", None)
        n, cycles = self.n_latent_steps, max(self.n_deep_recursions, 1)
        return recursion.deep_recursion(self.net, x, y, z, n, cycles, mask=mask, output_norm=norm)


class ScratchLoops:
    """The recursion methods of the from-scratch model, over a fused ``network``."""

    network: BlockList
    n_recursions: int

    def apply_network(self, x: Tensor) -> Tensor:
        return self.network(x)

    def one_recursion_cycle(self, x: Tensor, y: Tensor, z: Tensor, include_input: bool = True) -> Pair:
        question = x if include_input else torch.zeros_like(y)
        return recursion.latent_recursion(self.network, question, y, z, self.n_recursions)


#: The official model has no entry: its loop is written out inside ``forward``.
_LOOPS: dict[Family, type] = {"seed": SeedLoops, "scratch": ScratchLoops}


def _patch_network(model: nn.Module, site: Site, probe: bool, backend: str | None) -> PatchEntry:
    try:
        require(not isinstance(site.network, FusedModule), "already runs on this library")
        require(site.owner is not None, "it is the model itself: patch the module that owns it")
        config, tables = match(site)
        fused = _build(site, config, backend)
        evidence = probe_network(site, fused, tables) if probe else "not probed"
    except Mismatch as mismatch:
        return PatchEntry(site.path, "network", site.family, "left", str(mismatch))
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is site.network:
                setattr(parent, name, fused)
    return PatchEntry(site.path, "network", site.family, "swapped", evidence)


def _build(site: Site, config: NetworkConfig, backend: str | None) -> FusedModule:
    """A fused network that holds the parameters and the saved buffers of the one at ``site``."""
    # On the meta device nothing is allocated, and the global random state stays as it is.
    with torch.device("meta"):
        if site.family == "scratch":
            fused: FusedModule = BlockList(config, backend=backend)
        else:
            kind = ReasoningModule if site.family == "paper" else TinyRecursiveNetwork
            fused = kind.from_config(config, backend=backend)
    theirs, ours = site.network.state_dict(keep_vars=True), fused.state_dict()
    for key in sorted(theirs.keys() ^ ours.keys()):
        raise Mismatch(f"it has {key}, the family not" if key in theirs else f"it lacks {key}")
    for key, tensor in theirs.items():
        found, known = list(tensor.shape), list(ours[key].shape)
        require(found == known, f"{key} has shape {found}, the family's has {known}")
        path, _, name = key.rpartition(".")
        setattr(fused.get_submodule(path), name, tensor)
    training = {path: module.training for path, module in site.network.named_modules()}
    for path, module in fused.named_modules():
        module.training = training.get(path, site.network.training)
    return fused


def _patch_loops(site: Site, network: PatchEntry, probe: bool) -> Iterator[PatchEntry]:
    owner, loops = site.owner, _LOOPS.get(site.family)
    prefix = f".{site.path}".rpartition(".")[0]
    methods: list[Callable[..., Any]] = []
    if loops is not None and all(hasattr(owner, needed) for needed in inspect.get_annotations(loops)):
        methods = [function for function in vars(loops).values() if inspect.isfunction(function)]
    methods = [method for method in methods if hasattr(owner, method.__name__)]
    if not methods:
        how = "is fused" if network.outcome == "swapped" else "runs as before"
        reason = f"inline in forward; every call of the network inside it {how}"
        yield PatchEntry(f"{prefix}.forward".lstrip("."), "loop", site.family, "left", reason)
    for method in methods:
        path = f"{prefix}.{method.__name__}".lstrip(".")
        try:
            evidence = _patch_loop(site, method, probe)
        except Mismatch as mismatch:
            yield PatchEntry(path, "loop", site.family, "left", str(mismatch))
        else:
            yield PatchEntry(path, "loop", site.family, "swapped", evidence)


def _patch_loop(site: Site, method: Callable[..., Any], probe: bool) -> str:
    """Bind a recursion method to the owner of a fused network; return what speaks for it."""
    assert site.owner is not None
    fused = site.owner.get_submodule(site.path.rpartition(".")[2])
    if not isinstance(fused, FusedModule):
        raise Mismatch("its network was left")
    original, ours = getattr(site.owner, method.__name__), MethodType(method, site.owner)
    require(getattr(original, "__func__", None) is not method, "already runs on this library")
    taken, known = parameter_names(original), parameter_names(ours)
    require(taken == known, f"it takes ({', '.join(taken)}), not ({', '.join(known)})")
    evidence = probe_loop(site, fused, original, ours) if probe else "not probed"
    setattr(site.owner, method.__name__, ours)
    return evidence
