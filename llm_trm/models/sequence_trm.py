"""``SequenceTRM``: a recursion over a compressed context that yields one reasoning state."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from llm_trm.choices import Halting
from llm_trm.models.model_files import ModelFiles
from llm_trm.ranges import DEPTH, LAYERS, SHARE_BELOW_ONE, WIDTH, require_ranges
from trm_kernels import RecursionMixin, TinyRecursiveNetwork, halting_recursion
from trm_kernels.config import FLOAT32_EPS, NetworkConfig

_FILES = ModelFiles("SequenceTRM", "trm", "name a folder that `llm-trm train phase2` wrote")


@dataclass(frozen=True)
class SequenceTRMConfig:
    """Sizes of a :class:`SequenceTRM`.

    Attributes:
        d_compressed: Width D' of the compressed states.
        n_layers, n_heads: Number of blocks of the network, and of attention heads per block.
        n_latent_steps: Latent steps n per recursion.
        n_deep_recursions: Recursions T per supervision step.
        dropout: Dropout probability of attention weights in training.

    Raises:
        ValueError: A value is out of range or has the wrong type.
    """

    d_compressed: Annotated[int, WIDTH] = 256
    n_layers: Annotated[int, LAYERS] = 2
    n_heads: Annotated[int, WIDTH] = 8
    n_latent_steps: Annotated[int, DEPTH] = 6
    n_deep_recursions: Annotated[int, DEPTH] = 3
    dropout: Annotated[float, SHARE_BELOW_ONE] = 0.0

    def __post_init__(self) -> None:
        require_ranges(self)

    @property
    def network(self) -> NetworkConfig:
        """The network's configuration."""
        return NetworkConfig(self.d_compressed, self.n_layers, self.n_heads, self.dropout)

    @property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return self.network.parameters + 3 * self.d_compressed + 1


@dataclass(frozen=True)
class Reasoning:
    """Result of :meth:`SequenceTRM.reason`.

    Attributes:
        state: The reasoning state when each sample halted [B, D'].
        halt_logits: Halting logit at that step [B].
        steps: Supervision steps that each sample took, int32 [B].
    """

    state: Tensor
    halt_logits: Tensor
    steps: Tensor


class SequenceTRM(RecursionMixin, nn.Module):
    """Reads a context [B, L, D'], appends a reasoning token, and refines it by recursion.

    ``output_norm`` follows every call of the network. Parameters have the names and shapes of
    anonx3247/llm-trm (``src/train/phase2_trm.py``), so its state dicts load.

    Args:
        d_compressed, n_layers, n_heads, n_latent_steps, n_deep_recursions, dropout: See
            :class:`SequenceTRMConfig`.
        backend: As for :class:`~trm_kernels.TinyRecursiveNetwork`.
    """

    def __init__(
        self,
        d_compressed: int = 256,
        n_layers: int = 2,
        n_heads: int = 8,
        n_latent_steps: int = 6,
        n_deep_recursions: int = 3,
        dropout: float = 0.0,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.config = SequenceTRMConfig(
            d_compressed, n_layers, n_heads, n_latent_steps, n_deep_recursions, dropout
        )
        self.n_latent_steps, self.n_deep_recursions = n_latent_steps, n_deep_recursions
        self.net = TinyRecursiveNetwork.from_config(self.config.network, backend=backend)
        self.reasoning_token = nn.Parameter(torch.randn(1, 1, d_compressed) * 0.02)
        self.halt_head = nn.Linear(d_compressed, 1)
        self.output_norm = nn.RMSNorm(d_compressed, eps=FLOAT32_EPS)

    @classmethod
    def from_config(cls, config: SequenceTRMConfig, *, backend: str | None = None) -> SequenceTRM:
        """Build a model from its configuration."""
        return cls(**asdict(config), backend=backend)

    def embed(self, context: Tensor) -> Tensor:
        """Append the reasoning token to the context [B, L, D']: [B, L + 1, D']."""
        token = self.reasoning_token.to(context.dtype).expand(context.shape[0], -1, -1)
        return torch.cat((context, token), dim=1)

    def extend_mask(self, mask: Tensor) -> Tensor:
        """Extend a mask of the context [B, L] by the reasoning token, which is valid: [B, L + 1]."""
        return torch.cat((mask, mask.new_ones(mask.shape[0], 1)), dim=1)

    def halt_logits(self, y: Tensor) -> Tensor:
        """Halting logits [B] of y [B, L + 1, D']; a sample halts if its logit is positive."""
        return self.halt_head(y[:, -1]).squeeze(-1)

    def setup_for_steps(
        self, x: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Prepare the inputs of the first supervision step.

        Args:
            x: Context [B, L, D'].
            mask: 1 at valid positions [B, L].

        Returns:
            The extended context [B, L + 1, D'], y and z (zeros of that shape), the extended mask or None.
        """
        x = self.embed(x)
        return x, torch.zeros_like(x), torch.zeros_like(x), None if mask is None else self.extend_mask(mask)

    def single_step(
        self, x: Tensor, y: Tensor, z: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One supervision step: a deep recursion followed by the halting head.

        Args:
            x, y, z: Extended context and states [B, L + 1, D'].
            mask: Extended mask [B, L + 1].

        Returns:
            The new y and z, not detached, and the halting probability [B, 1].
        """
        y, z = self.deep_recursion(x, y, z, mask)
        return y, z, torch.sigmoid(self.halt_logits(y))[:, None]

    def forward(self, x: Tensor, mask: Tensor | None = None, n_steps: int = 1) -> Tensor:
        """Run ``n_steps`` supervision steps, detaching the states between them.

        Args:
            x: Context [B, L, D'].
            mask: 1 at valid positions [B, L].

        Returns:
            The answer [B, L + 1, D']; its last position is the reasoning state.
        """
        if n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, not {n_steps}")
        x, y, z, mask = self.setup_for_steps(x, mask)
        for _ in range(n_steps):
            y, z = self.deep_recursion(x, y.detach(), z.detach(), mask)
        return y

    @torch.no_grad()
    def reason(
        self, x: Tensor, mask: Tensor | None = None, *, max_steps: int = 8, halting: Halting = "sample"
    ) -> Reasoning:
        """Recur until the halting head stops, for at most ``max_steps`` supervision steps, without gradients.

        Args:
            x: Context [B, L, D'].
            mask: 1 at valid positions [B, L].
            halting: ``"sample"``: each sample halts on its own and is not computed further. ``"batch"``: all
                halt when the batch's mean probability exceeds 0.5. ``"none"``: all take ``max_steps``.
        """
        x, y, z, mask = self.setup_for_steps(x, mask)
        state = {"x": x, "y": y, "z": z, "logits": x.new_zeros(x.shape[0])}
        if mask is not None:
            state["mask"] = mask

        def step(
            x: Tensor, y: Tensor, z: Tensor, logits: Tensor, mask: Tensor | None = None
        ) -> tuple[dict[str, Tensor], Tensor]:
            y, z = self.deep_recursion(x, y, z, mask, with_gradients=False)
            logits = self.halt_logits(y)
            if halting == "batch":
                halt = (torch.sigmoid(logits).mean() > 0.5).expand(len(logits))
            else:
                halt = (logits > 0) & (halting == "sample")
            return {"y": y, "z": z, "logits": logits}, halt

        result = halting_recursion(step, state, max_steps, compact=halting == "sample")
        return Reasoning(result.state["y"][:, -1], result.state["logits"], result.exit_steps)


def save_sequence_trm(model: SequenceTRM, folder: Path, **facts: Any) -> None:
    """Write weights and sizes into ``folder``, and ``facts`` (JSON values) with the sizes."""
    _FILES.write(folder, model, model.config, facts)


def load_sequence_trm(folder: Path, *, backend: str | None = None) -> tuple[SequenceTRM, dict[str, Any]]:
    """Load a model that :func:`save_sequence_trm` wrote, in eval mode, and its facts.

    Raises:
        InputError: A file is missing or invalid, or describes another kind of model.
    """
    return _FILES.read(
        folder,
        SequenceTRMConfig,
        lambda config: config.parameters,
        lambda config: SequenceTRM.from_config(config, backend=backend),
    )
