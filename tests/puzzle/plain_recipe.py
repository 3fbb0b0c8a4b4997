"""A reimplementation of the official training step without code of the package, as ground truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_trm.models.puzzle.paper import PuzzleTRMConfig

EPS = 1e-5


@dataclass
class PlainCarry:
    """The carry of the official code."""

    z_H: Tensor
    z_L: Tensor
    steps: Tensor
    halted: Tensor
    data: dict[str, Tensor]


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def swiglu(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    gate, up = (x @ weights[f"{name}.gate_up_proj.weight"].T).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up) @ weights[f"{name}.down_proj.weight"].T


def attend(x: Tensor, weights: Mapping[str, Tensor], name: str, config: PuzzleTRMConfig) -> Tensor:
    batch, length, width = x.shape
    size = width // config.n_heads
    qkv = (x @ weights[f"{name}.qkv_proj.weight"].T).view(batch, length, 3, config.n_heads, size)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, L, E]
    if config.positions == "rope":
        angle = torch.outer(
            torch.arange(length, dtype=x.dtype),
            config.rope_theta ** (-torch.arange(0, size, 2, dtype=x.dtype) / size),
        ).repeat(1, 2)
        q, k = (
            t * angle.cos() + torch.cat((-t[..., size // 2 :], t[..., : size // 2]), -1) * angle.sin()
            for t in (q, k)
        )
    mixed = (q @ k.transpose(-1, -2) * size**-0.5).softmax(-1) @ v
    return mixed.transpose(1, 2).reshape(batch, length, width) @ weights[f"{name}.o_proj.weight"].T


def level(h: Tensor, weights: Mapping[str, Tensor], config: PuzzleTRMConfig) -> Tensor:
    for number in range(config.n_layers):
        block = f"net.layers.{number}"
        if config.mixer == "tokens":
            across = h.transpose(1, 2)
            h = norm(across + swiglu(across, weights, f"{block}.mlp_t")).transpose(1, 2)
        else:
            h = norm(h + attend(h, weights, f"{block}.self_attn", config))
        h = norm(h + swiglu(h, weights, f"{block}.mlp"))
    return h


def stablemax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    s = torch.where(logits < 0, 1 / (1 - logits + 1e-30), logits + 1)
    logprobs = torch.log(s / s.sum(-1, keepdim=True))
    picked = logprobs.gather(-1, labels[..., None]).squeeze(-1)
    return -torch.where(labels != 0, picked, 0.0)


def plain_step(
    weights: Mapping[str, Tensor],
    rows: Tensor | None,
    config: PuzzleTRMConfig,
    carry: PlainCarry,
    fresh: Mapping[str, Tensor],
    min_steps: Tensor,
) -> tuple[Tensor, PlainCarry]:
    """The loss, to be differentiated, and the next carry.

    Args:
        weights: Parameters and initial states by the package's names.
        rows: Puzzle embeddings of the current samples [B, E].
        min_steps: Exploration's random minimum steps for each sample.
    """
    halted = carry.halted
    data = {
        name: torch.where(halted.view(-1, *(1,) * (value.dim() - 1)), fresh[name], value)
        for name, value in carry.data.items()
    }
    z_H = torch.where(halted[:, None, None], weights["y_init"], carry.z_H)
    z_L = torch.where(halted[:, None, None], weights["z_init"], carry.z_L)
    steps = torch.where(halted, 0, carry.steps)

    x = weights["embed_tokens.weight"][data["inputs"]]
    if config.puzzle_len:
        room = config.puzzle_len * config.d_model
        front = x.new_zeros(len(x), room) if rows is None else F.pad(rows, (0, room - rows.shape[1]))
        x = torch.cat((front.view(len(x), config.puzzle_len, config.d_model), x), 1)
    if config.positions == "learned":
        x = 0.707106781 * (x + weights["embed_pos"])
    x = config.d_model**0.5 * x

    for cycle in range(config.n_deep_recursions):
        with torch.set_grad_enabled(cycle == config.n_deep_recursions - 1):
            for _ in range(config.n_latent_steps):
                z_L = level(z_L + (z_H + x), weights, config)
            z_H = level(z_H + z_L, weights, config)

    logits = (z_H @ weights["lm_head.weight"].T)[:, config.puzzle_len :]
    q = (z_H[:, 0] @ weights["q_head.weight"].T + weights["q_head.bias"])[:, 0]
    labels = data["labels"]
    counted = labels != 0
    exact = ((logits.argmax(-1) == labels) & counted).sum(-1) == counted.sum(-1)
    cells = (stablemax_loss(logits, labels) / counted.sum(-1, keepdim=True).clamp(min=1)).sum()
    halting = F.binary_cross_entropy_with_logits(q, exact.to(q.dtype), reduction="sum")
    loss = (cells + 0.5 * halting) / len(x)

    steps = steps + 1
    last = steps >= config.max_steps
    done = (last | (q > 0)) & (steps >= min_steps)
    return loss, PlainCarry(z_H.detach(), z_L.detach(), steps, done, data)
