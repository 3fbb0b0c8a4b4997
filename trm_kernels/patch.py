"""Replace the tiny networks inside a third-party model with fused networks that share their weights.

:func:`patch` recognises models by their structure and never imports them. It knows one implementation of
each family of :class:`~trm_kernels.config.NetworkConfig`:

- ``seed``: a module with ``layers`` of blocks ``norm1 self_attn norm2 mlp`` (anonx3247/llm-trm);
- ``scratch``: an ``nn.ModuleList`` of blocks ``norm1 mixer norm2 ffn``
  (dino65-dev/TRM-Tiny-Recursive-Model);
- ``paper``: a module with ``layers`` of blocks ``self_attn mlp`` or ``mlp_t mlp``
  (SamsungSAILMontreal/TinyRecursiveModels).

It leaves anything that it does not recognise with certainty unchanged, and reports it.
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
    """Outcome for one network or loop.

    Attributes:
        path: Path of the network in the model, or of the method that contains the loop.
        kind: ``"network"`` or ``"loop"``.
        family: The family that its structure resembles.
        outcome: ``"swapped"`` or ``"left"``.
        reason: Reason for the outcome.
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
    """Everything that :func:`patch` found. Print it, or read its entries."""

    entries: tuple[PatchEntry, ...]

    @property
    def swapped(self) -> tuple[PatchEntry, ...]:
        """Entries that now run on this library."""
        return tuple(entry for entry in self.entries if entry.outcome == "swapped")

    @property
    def left(self) -> tuple[PatchEntry, ...]:
        """Entries that run as before."""
        return tuple(entry for entry in self.entries if entry.outcome == "left")

    def __str__(self) -> str:
        return "\n".join(map(str, self.entries)) or "found no tiny recursive network"


def patch(model: nn.Module, *, probe: bool = True, backend: str | None = None) -> PatchReport:
    """Replace the tiny networks and recursion loops inside ``model``, in place.

    The fused networks use the same parameter objects as the networks they replace, so existing optimizers
    continue to work and the keys of ``model.state_dict()`` stay the same. Move the model to its device and
    dtype first. One result differs: the output of a fused network is zero at masked positions.

    Args:
        model: The model that owns the networks. It is modified.
        probe: Compare outputs and gradients of each network and loop with those of its replacement on random
            inputs, and keep the original if they differ. The comparison runs in eval mode, without dropout
            also in training mode, and with and without a mask if the family supports one. False relies on
            structure and names only.
        backend: Backend of the fused networks, see :class:`~trm_kernels.TinyRecursiveNetwork`.

    Returns:
        A report of what was swapped, what was left, and why.

    Raises:
        ValueError: If ``backend`` is unknown.

    Example:
        >>> print(patch(model))  # doctest: +SKIP
        swapped network net [seed]: equal on the probe, error 1.2e-07
    """
    if backend is not None:
        backends.validate_name(backend)
    sites = list(find_sites(model))
    networks = [_patch_network(model, site, probe, backend) for site in sites]
    loops = {  # by owner, because one owner may have two networks in its loop
        id(site.owner): list(_patch_loops(site, network, probe))
        for site, network in zip(sites, networks, strict=True)
        if site.owner is not None
    }
    return PatchReport((*networks, *(entry for found in loops.values() for entry in found)))


class ReasoningModule(TinyRecursiveNetwork):
    """A paper network with the call signature of the official ``L_level``."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, input_injection: Tensor, cos_sin: Pair | None = None
    ) -> Tensor:
        """Apply the network to ``hidden_states + input_injection`` [B, L, D].

        The tables in ``cos_sin`` are ignored: :func:`patch` compared them with this network's tables.
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
    """The recursion methods of the seed models, over a fused ``net``."""

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


#: The official model has no entry, because its loop is inline in ``forward``.
_LOOPS: dict[Family, type] = {"seed": SeedLoops, "scratch": ScratchLoops}


def _patch_network(model: nn.Module, site: Site, probe: bool, backend: str | None) -> PatchEntry:
    try:
        require(not isinstance(site.network, FusedModule), "already runs on this library")
        require(site.owner is not None, "the network is the model itself: patch the module that owns it")
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
    """Build a fused network that holds the parameters and persistent buffers of the network at ``site``."""
    # The meta device allocates nothing and leaves the global random state unchanged.
    with torch.device("meta"):
        if site.family == "scratch":
            fused: FusedModule = BlockList(config, backend=backend)
        else:
            kind = ReasoningModule if site.family == "paper" else TinyRecursiveNetwork
            fused = kind.from_config(config, backend=backend)
    theirs, ours = site.network.state_dict(keep_vars=True), fused.state_dict()
    for key in sorted(theirs.keys() ^ ours.keys()):
        raise Mismatch(f"it has {key}, unlike the family" if key in theirs else f"it has no {key}")
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
    """Bind a recursion method to the owner of a fused network; return the evidence of the probe."""
    assert site.owner is not None
    fused = site.owner.get_submodule(site.path.rpartition(".")[2])
    if not isinstance(fused, FusedModule):
        raise Mismatch("its network was not swapped")
    original, ours = getattr(site.owner, method.__name__), MethodType(method, site.owner)
    require(getattr(original, "__func__", None) is not method, "already runs on this library")
    found, known = parameter_names(original), parameter_names(ours)
    require(found == known, f"its parameters are ({', '.join(found)}), not ({', '.join(known)})")
    evidence = probe_loop(site, fused, original, ours) if probe else "not probed"
    setattr(site.owner, method.__name__, ours)
    return evidence
