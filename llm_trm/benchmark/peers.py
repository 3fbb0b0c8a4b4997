"""Third-party packages as candidates. Install them with ``pip install "llm-trm[peers]"``."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llm_trm.benchmark.models import Build, Model, State, written_out
from llm_trm.benchmark.workloads import Case
from trm_kernels import reference
from trm_kernels.config import NetworkConfig

INSTALL = 'pip install "llm-trm[peers]"'


def missing(package: str) -> str | None:
    """The reason why a package is unavailable, with the remedy, or None. Does not import the package."""
    if importlib.util.find_spec(package) is not None:
        return None
    return f"{package.replace('_', '-')} is not installed: {INSTALL}"


#: How the network of ``tiny-recursive-model``'s documentation differs from the others.
MIXER_DIFFERS = (
    "the MLP mixer of its documentation instead of attention (tokens through 4 D channels, then D/2), "
    "LayerNorm without bias, a last norm; weights of its own"
)


def mixer_model(*, compiled: bool = False) -> Build:
    """``TinyRecursiveModel`` of the package ``tiny-recursive-model``, with its ``MLPMixer1D``.

    The package's embedding and heads are not used: its recursion is called directly on x, y and z.
    """

    def build(case: Case, state: State) -> Model:
        from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel

        def network() -> nn.Module:
            return MLPMixer1D(dim=case.hidden_size, depth=case.layers, seq_len=case.latents)

        like = next(iter(state.values()))
        with torch.device(like.device):
            net = network().to(like.dtype)
            model = TinyRecursiveModel(
                dim=case.hidden_size,
                num_tokens=1,
                network=net,
                num_refinement_blocks=case.recursions,
                num_latent_refinements=case.steps,
            )
        if compiled:
            model.network = torch.compile(net, dynamic=False, fullgraph=True)
        with torch.device("meta"):
            flops = count_flops(network(), torch.empty(case.batch, case.latents, case.hidden_size))
        return Model(
            net,
            model.refine_latent_then_output_once,
            model.deep_refinement,
            call_flops=flops,
            needs_autocast=True,
        )

    return build


def count_flops(net: nn.Module, x: Tensor) -> int:
    """Number of operations of the matrix products in ``net(x)``; both may be on the ``meta`` device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops()


class LigerRMSNorm(reference.RMSNorm):
    """liger-kernel's RMSNorm with the casting of PyTorch's RMSNorm: the result is rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        return _liger_norm(x, self.weight, self.eps)


def _liger_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    from liger_kernel.ops import LigerRMSNormFunction

    # in_place would overwrite the incoming gradient, which a residual may still need.
    offset, casting, in_place = 0.0, "gemma", False
    return LigerRMSNormFunction.apply(x, weight, eps, offset, casting, in_place)


class LigerSwiGLU(reference.SwiGLU):
    """SwiGLU with liger-kernel's fused product of gate and up projection."""

    def forward(self, x: Tensor) -> Tensor:
        from liger_kernel.ops import LigerSiLUMulFunction

        return self.w2(LigerSiLUMulFunction.apply(self.w1(x), self.w3(x)))


class LigerPackedSwiGLU(reference.PackedSwiGLU):
    """The same with one packed projection. liger-kernel copies the halves, which are not contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        from liger_kernel.ops import LigerSiLUMulFunction

        return self.down_proj(LigerSiLUMulFunction.apply(*self.gate_up_proj(x).chunk(2, dim=-1)))


class LigerBlock(reference.TransformerBlock):
    """The eager block of any family with liger-kernel's RMSNorm and SwiGLU, if the family has them."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        if config.family == "paper":
            self.mlp = LigerPackedSwiGLU(config.d_model, config.d_ff)
            return
        self.norm1 = LigerRMSNorm(config.d_model, config.norm_eps)
        self.norm2 = LigerRMSNorm(config.d_model, config.norm_eps)
        if config.family == "scratch":
            self.ffn = LigerSwiGLU(config.d_model, config.d_ff)

    def _post_norm(self, x: Tensor, mask: Tensor | None, rotary: reference.RotaryTables | None) -> Tensor:
        eps = self.config.norm_eps
        x = _liger_norm(x + self.self_attn(x, mask, rotary), None, eps)
        return _liger_norm(x + self.mlp(x), None, eps)


class LigerNetwork(reference.TinyRecursiveNetwork):
    """The eager network with :class:`LigerBlock`."""

    block_class = LigerBlock


def liger_model() -> Build:
    """The eager network with liger-kernel's RMSNorm and SwiGLU."""
    return written_out(lambda case: LigerNetwork(case.config()))
