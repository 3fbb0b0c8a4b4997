"""The paper's model: puzzles as sequences of tokens, solved by recursion (arXiv 2510.04871).

Source: ``models/recursive_reasoning/trm.py`` of SamsungSAILMontreal/TinyRecursiveModels, whose checkpoints
:mod:`llm_trm.models.puzzle.official` converts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trm.choices import Positions
from llm_trm.errors import InputError
from llm_trm.models.model_files import ModelFiles
from llm_trm.ranges import (
    COUNT,
    DEPTH,
    GRID_SIDE,
    LAYERS,
    LENGTH,
    NO_OR_LENGTH,
    ROPE_THETA,
    VOCABULARY,
    WIDTH,
    require_in,
    require_ranges,
)
from trm_kernels import SparseEmbedding, TinyRecursiveNetwork, deep_recursion, halting_recursion
from trm_kernels.config import Mixer, NetworkConfig
from trm_kernels.reference import CastedLinear

_FILES = ModelFiles(
    "PuzzleTRM",
    "puzzle_trm",
    "name a folder that `llm-trm train puzzle` or `llm-trm import official` wrote",
)

#: Standard deviation of a unit normal distribution that is truncated at two standard deviations.
_TRUNCATED_STD = 0.87962566103423978
#: The official code's sqrt(1/2), with which the sum of two embeddings keeps unit variance.
_HALF_VARIANCE = 0.707106781


@dataclass(frozen=True)
class PuzzleTRMConfig:
    """Sizes of a :class:`PuzzleTRM`; the defaults are the paper's.

    Attributes:
        vocab_size: Number of tokens V.
        seq_len: Cells L of a puzzle.
        num_puzzles: Number of puzzle identifiers, each with its own embedding.
        d_model: Width D.
        n_layers, n_heads: Number of blocks of the network, and of attention heads per block.
        mixer: ``"attention"``, or ``"tokens"`` for an MLP over positions (``mlp_t`` of the official code).
        positions: Encoding of positions; ``"none"`` for a token mixer.
        rope_theta: Base of the rotary frequencies.
        puzzle_len: Number of positions P of the puzzle embedding before the cells. The halting head reads
            the first position, which is a cell if P is 0.
        puzzle_dim: Size of a puzzle embedding, at most P x D, padded with zeros; 0 for no embedding.
        n_latent_steps, n_deep_recursions: n and T (``L_cycles`` and ``H_cycles``).
        max_steps: Maximum number of supervision steps per sample in training.
        dtype: Dtype of the residual stream. Parameters are float32 and cast on use.

    Raises:
        ValueError: A value is out of range or has the wrong type, or values contradict each other.
    """

    vocab_size: Annotated[int, VOCABULARY]
    seq_len: Annotated[int, LENGTH]
    num_puzzles: Annotated[int, COUNT] = 1
    d_model: Annotated[int, WIDTH] = 512
    n_layers: Annotated[int, LAYERS] = 2
    n_heads: Annotated[int, WIDTH] = 8
    mixer: Mixer = "attention"
    positions: Positions = "rope"
    rope_theta: Annotated[float, ROPE_THETA] = 10000.0
    puzzle_len: Annotated[int, NO_OR_LENGTH] = 16
    puzzle_dim: Annotated[int, NO_OR_LENGTH] = 512
    n_latent_steps: Annotated[int, DEPTH] = 6
    n_deep_recursions: Annotated[int, DEPTH] = 3
    max_steps: Annotated[int, DEPTH] = 16
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        require_ranges(self)
        if self.puzzle_dim > self.puzzle_len * self.d_model:
            raise ValueError(
                f"puzzle_dim {self.puzzle_dim} does not fit puzzle_len {self.puzzle_len} positions of d_model"
                f" {self.d_model}"
            )
        if self.mixer == "tokens" and self.positions != "none":
            raise ValueError("a token mixer has no position encoding: positions must be 'none'")

    @property
    def length(self) -> int:
        """Number of positions P + L that the network sees."""
        return self.puzzle_len + self.seq_len

    @property
    def network(self) -> NetworkConfig:
        """The network's configuration."""
        return NetworkConfig(
            self.d_model,
            self.n_layers,
            self.n_heads,
            family="paper",
            mixer=self.mixer,
            seq_len=self.length if self.mixer == "tokens" else None,
            rope=self.positions == "rope",
            rope_theta=self.rope_theta,
        )

    @property
    def parameters(self) -> int:
        """Number of parameters that an optimizer of dense gradients updates."""
        d = self.d_model
        positions = self.length * d if self.positions == "learned" else 0
        return self.network.parameters + 2 * self.vocab_size * d + positions + 2 * d + 2

    @property
    def elements(self) -> int:
        """Number of elements of the parameters, puzzle embeddings and initial states."""
        return self.parameters + self.num_puzzles * self.puzzle_dim + 2 * self.d_model


@dataclass(frozen=True)
class Prediction:
    """Answers to a batch of puzzles.

    Attributes:
        tokens: Predicted tokens, int64 [B, L].
        halt_logits: Halting logits at the last step [B]: the model's confidence that the answer is correct.
        steps: Supervision steps that each sample took, int32 [B].
    """

    tokens: Tensor
    halt_logits: Tensor
    steps: Tensor


class PuzzleTRM(nn.Module):
    """Embeds a puzzle, refines an answer by recursion, and decodes it cell by cell.

    Initial states are constant buffers, sampled once. Puzzle embeddings are also a buffer, which
    :class:`~trm_kernels.SparseSignSGD` updates. The parameters are those that the paper counts.

    Args:
        config: Sizes of the model.
        backend: As for :class:`~trm_kernels.TinyRecursiveNetwork`.
    """

    y_init: Tensor
    z_init: Tensor

    def __init__(self, config: PuzzleTRMConfig, *, backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        _truncated_normal(self.embed_tokens.weight, d**-0.5)
        if config.puzzle_dim:
            self.puzzle_emb = SparseEmbedding(config.num_puzzles, config.puzzle_dim)
        if config.positions == "learned":
            self.embed_pos = nn.Parameter(torch.empty(config.length, d))
            _truncated_normal(self.embed_pos, d**-0.5)
        self.net = TinyRecursiveNetwork.from_config(config.network, backend=backend)
        self.lm_head = CastedLinear(d, config.vocab_size)
        # Two outputs, as in official checkpoints. The second, the Q-value of continuing, is unused.
        self.q_head = nn.Linear(d, 2)
        nn.init.zeros_(self.q_head.weight)
        nn.init.constant_(self.q_head.bias, -5.0)
        for name in ("y_init", "z_init"):
            state = torch.empty(d)
            _truncated_normal(state, 1.0)
            self.register_buffer(name, state.to(self.dtype).float())  # exact in the stream's dtype

    def embed(self, tokens: Tensor, puzzles: Tensor | None = None) -> Tensor:
        """Embed questions.

        Args:
            tokens: [B, L], any integer dtype.
            puzzles: Puzzle identifiers [B]; by default 0 for all samples.

        Returns:
            [B, P + L, D], in the stream's dtype.
        """
        config = self.config
        # Round to the stream's dtype before scaling, to match the official code bit for bit.
        x = F.embedding(tokens.int(), self.embed_tokens.weight.to(self.dtype))  # [B, L, D]
        if config.puzzle_len:
            x = torch.cat((self._embed_puzzles(x, puzzles), x), dim=1)
        if config.positions == "learned":
            x = _HALF_VARIANCE * (x + self.embed_pos.to(self.dtype))
        return config.d_model**0.5 * x

    def _embed_puzzles(self, x: Tensor, puzzles: Tensor | None) -> Tensor:
        """Puzzle embeddings [B, P, D], padded with zeros."""
        config, batch = self.config, len(x)
        if not config.puzzle_dim:
            return x.new_zeros(batch, config.puzzle_len, config.d_model)
        if puzzles is None:
            puzzles = torch.zeros(batch, dtype=torch.int32, device=x.device)
        rows = self.puzzle_emb(puzzles).to(self.dtype)  # [B, puzzle_dim]
        rows = F.pad(rows, (0, config.puzzle_len * config.d_model - config.puzzle_dim))
        return rows.view(batch, config.puzzle_len, config.d_model)

    def initial(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The initial states y and z [D] of every position."""
        return self.y_init.to(x.dtype), self.z_init.to(x.dtype)

    def step(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """One supervision step: a deep recursion on x, y, z [B, P + L, D]. Returns y and z, not detached."""
        return deep_recursion(self.net, x, y, z, self.config.n_latent_steps, self.config.n_deep_recursions)

    def heads(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the cells [B, L, V], and float32 halting logits [B]; a sample halts if positive."""
        halt = F.linear(y[:, 0], self.q_head.weight.to(y.dtype), self.q_head.bias.to(y.dtype))
        # Keep the precision of float64 streams, which tests use.
        return self.lm_head(y)[:, self.config.puzzle_len :], halt[:, 0].to(
            torch.promote_types(y.dtype, torch.float32)
        )

    def forward(
        self, tokens: Tensor, puzzles: Tensor | None = None, n_steps: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Run ``n_steps`` supervision steps, detaching states between them, and return :meth:`heads`."""
        if n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, not {n_steps}")
        x = self.embed(tokens, puzzles)
        y, z = (state.expand_as(x) for state in self.initial(x))
        for _ in range(n_steps):
            y, z = self.step(x, y.detach(), z.detach())
        return self.heads(y)

    @torch.no_grad()
    def predict(
        self,
        tokens: Tensor,
        puzzles: Tensor | None = None,
        *,
        max_steps: int | None = None,
        halting: bool = True,
        compact: bool = True,
        threshold: float = 0.5,
        noise: float = 0.0,
    ) -> Prediction:
        """Solve puzzles, without gradients.

        Args:
            tokens: [B, L].
            puzzles: Puzzle identifiers [B].
            max_steps: Maximum number of supervision steps; by default as in training.
            halting: Whether a sample halts once its halting probability exceeds ``threshold``. (The
                official evaluation never halts early.)
            compact: Whether to remove halted samples from the batch.
            threshold: Halting threshold in [0, 1); training uses 0.5.
            noise: Standard deviation of normal noise added to z, which has unit variance, before every
                supervision step. It gives different attempts at the same puzzle.
        """
        x = self.embed(tokens, puzzles)
        y, z = (state.expand_as(x) for state in self.initial(x))
        state = {
            "x": x,
            "y": y,
            "z": z,
            "answer": torch.zeros(tokens.shape, dtype=torch.int64, device=x.device),
            "logit": torch.zeros(len(x), dtype=torch.float32, device=x.device),
        }

        if not 0.0 <= threshold < 1.0:
            raise ValueError(f"threshold must be in [0, 1), not {threshold}")
        limit = math.log(threshold / (1.0 - threshold)) if threshold else -math.inf

        def step(x: Tensor, y: Tensor, z: Tensor, **_: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            y, z = self.step(x, y, _noisy(z, noise))
            logits, halt = self.heads(y)
            found = {"y": y, "z": z, "answer": logits.argmax(-1), "logit": halt}
            return found, (halt > limit) & halting

        result = halting_recursion(
            step, state, max_steps or self.config.max_steps, compact=compact and halting
        )
        return Prediction(result.state["answer"], result.state["logit"], result.exit_steps)

    @torch.no_grad()
    def trace(
        self, tokens: Tensor, puzzles: Tensor | None = None, *, noise: float = 0.0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the answer [B, L] and halting logits [B] after every supervision step, indefinitely.

        Gradients are disabled.
        """
        x = self.embed(tokens, puzzles)
        y, z = (state.expand_as(x) for state in self.initial(x))
        while True:
            y, z = self.step(x, y, _noisy(z, noise))
            logits, halt = self.heads(y)
            yield logits.argmax(-1), halt


def _noisy(z: Tensor, noise: float) -> Tensor:
    return z + noise * torch.randn_like(z) if noise else z


def _truncated_normal(tensor: Tensor, std: float) -> None:
    """Fill with a normal distribution truncated at two standard deviations; ``std`` is after truncation."""
    wide = std / _TRUNCATED_STD
    nn.init.trunc_normal_(tensor, std=wide, a=-2.0 * wide, b=2.0 * wide)


def save_puzzle_model(model: PuzzleTRM, folder: Path, **facts: Any) -> None:
    """Write weights and sizes into ``folder``, and ``facts`` (JSON values) with the sizes."""
    _FILES.write(folder, model, model.config, facts)


def load_puzzle_model(folder: Path, *, backend: str | None = None) -> tuple[PuzzleTRM, dict[str, Any]]:
    """Load a model that :func:`save_puzzle_model` wrote, in eval mode, and its facts.

    Raises:
        InputError: A file is missing or invalid, or describes another kind of model.
    """
    model, facts = _FILES.read(
        folder,
        PuzzleTRMConfig,
        lambda config: config.elements,
        lambda config: PuzzleTRM(config, backend=backend),
    )
    for name in ("rows", "columns"):
        if name in facts:
            require_in(GRID_SIDE, name, facts[name], InputError, f"{folder}: ")
    return model, facts
