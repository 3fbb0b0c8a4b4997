"""A reimplementation of the original phase 2 trainer, the baseline of ``bench/training.py``.

Source: ``src/train/phase2_trm.py`` and ``src/models/trm.py`` of anonx3247/llm-trm. Everything that costs time
there is kept: padded batches, attention that computes its weights (the default of ``need_weights``),
x + y + z in every latent step, a loss and an update for each supervision step, an average of the parameters
in a Python loop with new allocations, a check for NaN, and metrics read with ``.item()`` at every step.

There are three differences, so that both trainers give the same results; none has a measurable cost. The
reasoning token is embedded in every supervision step (the original embeds it once per batch and continues
with the old value), the cosine target of the halting head has no gradient, and autocast is supported, which
the original did not use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from llm_trm.benchmark.training import autocast_cache_keeps_gradients
from llm_trm.models.sequence_trm import SequenceTRMConfig


class PlainBlock(nn.Module):
    """Pre-norm block with ``nn.MultiheadAttention``, whose averaged weights are discarded."""

    def __init__(self, d_model: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.RMSNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """Map x [B, L, D] to [B, L, D]; ``padding`` [B, L] is True at positions to ignore."""
        h = self.norm1(x)
        x = x + self.self_attn(h, h, h, key_padding_mask=padding)[0]
        return x + self.mlp(self.norm2(x))


class PlainNetwork(nn.Module):
    """A stack of plain blocks."""

    def __init__(self, config: SequenceTRMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            PlainBlock(config.d_compressed, config.n_heads, config.dropout) for _ in range(config.n_layers)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map x [B, L, D] to [B, L, D]; ``mask`` [B, L] is 1 at valid positions."""
        padding = mask == 0
        for layer in self.layers:
            x = layer(x, padding)
        return x


class PlainSequenceTRM(nn.Module):
    """The original's ``SequenceTRM``, with the state dict of :mod:`llm_trm.models.sequence_trm`."""

    def __init__(self, config: SequenceTRMConfig) -> None:
        super().__init__()
        self.config = config
        self.net = PlainNetwork(config)
        self.reasoning_token = nn.Parameter(torch.randn(1, 1, config.d_compressed) * 0.02)
        self.halt_head = nn.Linear(config.d_compressed, 1)
        self.output_norm = nn.RMSNorm(config.d_compressed)

    def embed(self, context: Tensor) -> Tensor:
        """Append the reasoning token to the context [B, L, D']: [B, L + 1, D']."""
        return torch.cat((context, self.reasoning_token.expand(len(context), -1, -1)), dim=1)

    def forward(self, x: Tensor, y: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One supervision step.

        Args:
            x, y, z: Embedded context and states [B, L + 1, D'].
            mask: 1 at valid positions [B, L + 1].

        Returns:
            The new y and z, and the halting probability [B, 1].
        """
        with torch.no_grad():
            for _ in range(self.config.n_deep_recursions - 1):
                y, z = self._latent_recursion(x, y, z, mask)
        y, z = self._latent_recursion(x, y, z, mask)
        return y, z, torch.sigmoid(self.halt_head(y[:, -1]))

    def _latent_recursion(self, x: Tensor, y: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.config.n_latent_steps):
            z = self.output_norm(self.net(x + y + z, mask))
        return self.output_norm(self.net(y + z, mask)), z


class PlainAverage:
    """An exponential moving average that allocates a new tensor for each parameter in turn."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.shadow = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def update(self) -> None:
        """Move one step towards the parameters."""
        for name, parameter in self.model.named_parameters():
            self.shadow[name] = self.decay * self.shadow[name] + (1 - self.decay) * parameter.detach()


class PlainTrainer:
    """Trains on one batch at a time with ``supervision_steps`` updates each.

    Args:
        model: The model, which is set to training mode and trained in place.
        supervision_steps: Updates per batch.
        learning_rate, weight_decay, clip_norm, ema_decay, halt_weight: Settings of the run.
        total_updates: Length of the cosine schedule.
        autocast_dtype: ``torch.bfloat16`` to run with autocast.
    """

    def __init__(
        self,
        model: PlainSequenceTRM,
        *,
        supervision_steps: int,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.1,
        clip_norm: float = 1.0,
        ema_decay: float = 0.999,
        halt_weight: float = 0.5,
        total_updates: int = 10**9,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model.train()
        self.supervision_steps, self.clip_norm, self.halt_weight = supervision_steps, clip_norm, halt_weight
        self.autocast_dtype = autocast_dtype
        self.optimizer = AdamW(
            model.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.95)
        )
        self.schedule = CosineAnnealingLR(self.optimizer, T_max=total_updates)
        self.average = PlainAverage(model, ema_decay)
        self.device = model.reasoning_token.device

    def train_batch(self, contexts: Sequence[Tensor], targets: Sequence[Tensor]) -> list[dict[str, float]]:
        """Train on one batch of compressed pairs on the CPU, contexts [L_i, D'] and targets [D'].

        Returns:
            The metrics of each supervision step.
        """
        padded, mask = _collate(contexts)
        x, target, mask = (
            padded.to(self.device),
            torch.stack(list(targets)).to(self.device),
            mask.to(self.device),
        )
        mask = torch.cat((mask, torch.ones(len(mask), 1, device=self.device)), dim=1)
        y = z = torch.zeros_like(self.model.embed(x))
        metrics = []
        for _ in range(self.supervision_steps):
            y, z, measured = self._supervise(x, y.detach(), z.detach(), mask, target)
            metrics.append(measured)
        return metrics

    def _supervise(
        self, x: Tensor, y: Tensor, z: Tensor, mask: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        kind = self.device.type
        with torch.autocast(
            kind,
            self.autocast_dtype,
            enabled=self.autocast_dtype is not None,
            cache_enabled=autocast_cache_keeps_gradients(kind),
        ):
            y, z, halt = self.model(self.model.embed(x), y, z, mask)
        predicted, halt = y[:, -1].float(), halt.float()
        mse = F.mse_loss(predicted, target)
        cosine = F.cosine_similarity(predicted, target, dim=-1)
        halt_loss = F.mse_loss(halt, cosine.detach()[:, None])
        loss = mse + self.halt_weight * halt_loss
        measured = {
            **_measure(predicted, target),
            "halt_loss": halt_loss.item(),
            "halt_probability": halt.mean().item(),
        }
        if torch.isnan(loss) or torch.isinf(loss):
            return y, z, measured | {"loss": math.nan}
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.average.update()
        return y, z, measured | {"loss": loss.item()}


def _collate(contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Contexts padded to the longest [B, L, D'], and a mask [B, L] with 1.0 at valid positions."""
    padded = pad_sequence(list(contexts), batch_first=True)
    mask = torch.zeros(padded.shape[:2])
    for row, context in enumerate(contexts):
        mask[row, : len(context)] = 1
    return padded, mask


@torch.no_grad()
def _measure(predicted: Tensor, target: Tensor) -> dict[str, float]:
    return {
        "mse": F.mse_loss(predicted, target).item(),
        "cosine": F.cosine_similarity(predicted, target, dim=-1).mean().item(),
        "relative_error": (torch.norm(predicted - target) / torch.norm(target)).item(),
    }
