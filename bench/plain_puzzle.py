"""A reimplementation of the official puzzle trainer, the baseline of ``bench/puzzle.py``.

Source: ``pretrain.py``, ``models/losses.py``, ``models/ema.py``, ``models/sparse_embedding.py`` and
``models/recursive_reasoning/trm.py`` of SamsungSAILMontreal/TinyRecursiveModels. Everything that costs time
there is kept: the injection ``z + (y + x)`` and the casting of weights in every call, gradients of the
embeddings summed through ``unique``, an average of the parameters in a Python loop with new allocations, and
metrics copied to the host at every step. AdamATan2, a CUDA extension there, is this library's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trm.benchmark.official import OfficialAttention, OfficialSwiGLU, Tables, rope_tables, unit_rms
from llm_trm.models.puzzle.paper import PuzzleTRM, PuzzleTRMConfig
from trm_kernels import AdamATan2
from trm_kernels.config import NetworkConfig

_IGNORED = -100


class TokenSwiGLU(OfficialSwiGLU):
    """SwiGLU across positions."""

    def __init__(self, config: NetworkConfig) -> None:
        assert config.seq_len is not None
        super().__init__(NetworkConfig(config.seq_len, family="paper", n_heads=1, rope=False))


class PlainBlock(nn.Module):
    """Post-norm block of attention or ``mlp_t``, and SwiGLU."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        if config.mixer == "tokens":
            self.mlp_t = TokenSwiGLU(config)
        else:
            self.self_attn = OfficialAttention(config)
        self.mlp = OfficialSwiGLU(config)
        self.eps = config.norm_eps

    def forward(self, h: Tensor, tables: Tables | None) -> Tensor:
        """Map h [B, L, D] to [B, L, D]; ``tables`` are for RoPE."""
        if tables is None:
            across = h.transpose(1, 2)
            h = unit_rms(across + self.mlp_t(across), self.eps).transpose(1, 2)
        else:
            h = unit_rms(h + self.self_attn(h, tables), self.eps)
        return unit_rms(h + self.mlp(h), self.eps)


class PlainModel(nn.Module):
    """Maps tokens and states to new states, halting logits and the loss."""

    y_init: Tensor
    z_init: Tensor

    def __init__(self, model: PuzzleTRM) -> None:
        super().__init__()
        self.config: PuzzleTRMConfig = model.config
        self.dtype = model.dtype
        net = model.net.config
        self.layers = nn.ModuleList(PlainBlock(net) for _ in range(net.n_layers))
        self.layers.load_state_dict(model.net.layers.state_dict())
        self.embed_tokens = nn.Parameter(model.embed_tokens.weight.detach().clone())
        self.lm_head = nn.Parameter(model.lm_head.weight.detach().clone())
        self.q_weight = nn.Parameter(model.q_head.weight.detach().clone())
        self.q_bias = nn.Parameter(model.q_head.bias.detach().clone())
        for name in ("y_init", "z_init"):
            self.register_buffer(name, getattr(model, name).detach().to(self.dtype))
        self.tables: Tables | None = None
        if net.mixer == "attention":
            like = self.embed_tokens
            self.tables = rope_tables(self.config.length, net.head_dim, net.rope_theta, like)
        self.to(model.y_init.device)

    def level(self, h: Tensor, injection: Tensor) -> Tensor:
        """One call of the network."""
        h = h + injection
        for layer in self.layers:
            h = layer(h, self.tables)
        return h

    def forward(
        self, y: Tensor, z: Tensor, tokens: Tensor, labels: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """New detached states, the halting logits [B], the summed loss, and metrics."""
        config = self.config
        x = F.embedding(tokens.int(), self.embed_tokens.to(self.dtype))
        if rows is not None:
            room = config.puzzle_len * config.d_model
            front = F.pad(rows.to(self.dtype), (0, room - rows.shape[1]))
            x = torch.cat((front.view(len(x), config.puzzle_len, config.d_model), x), dim=1)
        elif config.puzzle_len:
            x = F.pad(x, (0, 0, config.puzzle_len, 0))
        x = config.d_model**0.5 * x
        with torch.no_grad():
            for _ in range(config.n_deep_recursions - 1):
                for _ in range(config.n_latent_steps):
                    z = self.level(z, y + x)
                y = self.level(y, z)
        for _ in range(config.n_latent_steps):
            z = self.level(z, y + x)
        y = self.level(y, z)
        logits = F.linear(y, self.lm_head.to(y.dtype))[:, config.puzzle_len :]
        q = F.linear(y[:, 0], self.q_weight.to(y.dtype), self.q_bias.to(y.dtype)).float()[:, 0]
        mask = labels != _IGNORED
        cells = mask.sum(-1).clamp_min(1).unsqueeze(-1)
        right = mask & (logits.argmax(-1) == labels)
        exact = right.sum(-1) == mask.sum(-1)
        loss = (_stablemax(logits, labels, mask) / cells).sum()
        q_loss = F.binary_cross_entropy_with_logits(q, exact.to(q.dtype), reduction="sum")
        metrics = {
            "cell_loss": loss.detach(),
            "halt_loss": q_loss.detach(),
            "exact": exact.sum(),
            "cells": (right.float() / cells).sum(),
        }
        return y.detach(), z.detach(), q.detach(), loss + 0.5 * q_loss, metrics


def _stablemax(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    wide = logits.double()
    size = torch.where(wide < 0, 1 / (1 - wide + 1e-30), wide + 1)
    logs = torch.log(size / size.sum(-1, keepdim=True))
    picked = logs.gather(-1, torch.where(mask, labels, 0)[..., None]).squeeze(-1)
    return -torch.where(mask, picked, 0)


class PlainPuzzleTrainer:
    """The training loop of ``pretrain.py`` on one device.

    Args:
        model: Model to copy sizes and weights from.
        compiled: Whether to compile the model with torch.compile, as in the official script.
        exploration: Probability of a random minimum number of steps.
        rates: Learning rates of the parameters and of the puzzle embeddings; weight decay is 1 for both.
        ema: Decay of the parameter average.
    """

    def __init__(
        self, model: PuzzleTRM, *, compiled: bool, exploration: float, rates: tuple[float, float], ema: float
    ) -> None:
        self.model = PlainModel(model)
        self._run: Any = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.optimizer = AdamATan2(self.model.parameters(), lr=rates[0], betas=(0.9, 0.95), weight_decay=1.0)
        self.table = model.puzzle_emb.weights.clone() if model.config.puzzle_dim else None
        self.shadow = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.exploration, self.row_rate, self.ema = exploration, rates[1], ema
        self.carry: dict[str, Tensor] = {}

    def step(self, fresh: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
        """Run one supervision step with its update, and return its metrics on the host."""
        model, batch = self.model, len(fresh[0])
        tokens, labels, ids = fresh
        data = {"tokens": tokens, "labels": labels.long().masked_fill(labels == 0, _IGNORED), "ids": ids}
        if not self.carry:
            empty = torch.empty(batch, model.config.length, model.config.d_model, device=tokens.device)
            self.carry = {
                "y": empty.to(model.dtype),
                "z": empty.to(model.dtype),
                "steps": torch.zeros(batch, dtype=torch.int32, device=tokens.device),
                "halted": torch.ones(batch, dtype=torch.bool, device=tokens.device),
                **{name: torch.empty_like(value) for name, value in data.items()},
            }
        carry = self.carry
        halted = carry["halted"]
        y = torch.where(halted.view(-1, 1, 1), model.y_init, carry["y"])
        z = torch.where(halted.view(-1, 1, 1), model.z_init, carry["z"])
        steps = torch.where(halted, 0, carry["steps"])
        data = {
            name: torch.where(halted.view(-1, *(1,) * (value.dim() - 1)), value, carry[name])
            for name, value in data.items()
        }
        rows = None
        if self.table is not None:
            rows = self.table[data["ids"].long()].requires_grad_()
        y, z, q, loss, metrics = self._run(y, z, data["tokens"], data["labels"], rows)
        steps = steps + 1
        done = (steps >= model.config.max_steps) | (q > 0)
        least = (torch.rand_like(q) < self.exploration) * torch.randint_like(
            steps, 2, model.config.max_steps + 1
        )
        self.carry = {"y": y, "z": z, "steps": steps, "halted": done & (steps >= least), **data}
        (loss / batch).backward()
        if self.table is not None and rows is not None and rows.grad is not None:
            self._descend(self.table, data["ids"].long(), rows.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, parameter in self.model.named_parameters():
            self.shadow[name] = (1.0 - self.ema) * parameter.detach() + self.ema * self.shadow[name]
        values = torch.stack([value.double() for value in metrics.values()]).cpu()
        return dict(zip(metrics, (values / batch).tolist(), strict=True))

    def _descend(self, table: Tensor, ids: Tensor, gradient: Tensor) -> None:
        used, index = ids.unique(return_inverse=True)
        sums = torch.zeros(len(used), gradient.shape[1], device=gradient.device)
        sums.scatter_add_(0, index[:, None].expand(-1, gradient.shape[1]), gradient)
        table[used] = table[used] * (1.0 - self.row_rate) - self.row_rate * sums.sign()

    def state(self) -> Mapping[str, Tensor]:
        """The parameters by name."""
        return dict(self.model.named_parameters())
