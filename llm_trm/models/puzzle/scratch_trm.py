"""``TinyRecursiveModel``: the puzzle model of dino65-dev/TRM-Tiny-Recursive-Model, running on the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llm_trm.ranges import NO_OR_DEPTH, NO_OR_LENGTH, VOCABULARY, require_in
from trm_kernels import TinyRecursiveNetwork, deep_recursion, halting_recursion

_EPS = 1e-8


class _Blocks(TinyRecursiveNetwork):
    """A network whose blocks are named ``0``, ``1``, ... as in a ModuleList, instead of ``layers.0``, ..."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        blocks = list(self._modules["layers"].children())  # type: ignore[union-attr]
        del self._modules["layers"]
        for number, block in enumerate(blocks):
            self.add_module(str(number), block)

    @property
    def layers(self) -> list[nn.Module]:  # type: ignore[override]
        return list(self._modules.values())  # type: ignore[arg-type]


class TinyRecursiveModel(nn.Module):
    """Maps tokens [B, L] to answer tokens [B, L], refined by supervision steps.

    State dicts load strictly from and into the original. With ``use_mlp_mixer`` the function equals the
    original's. The original's attention does not work: it applies RoPE over heads instead of positions, which
    fails unless L is the number of heads, and mixes two table layouts. Here RoPE is NeoX-style over
    positions, for every L.

    The initial states are parameters. With ``t_cycles`` > 1, recursions without gradients separate them from
    every loss, so they keep their initial values, here and in the original; ``requires_grad`` is then False.

    The states of the original are unbounded: with n = 6 they grow 8-fold per recursion, and 16 supervision
    steps of three recursions give NaN in float32. ``output_norm=True`` normalises after every call of the
    network and adds one parameter tensor; without it, use fewer steps.

    Args:
        vocab_size: Number of tokens V.
        dim: Width D.
        num_layers, num_heads: Number of blocks of the network, and of attention heads per block.
        seq_len: Length of the sequences; attention also accepts shorter ones.
        n_recursions: Latent steps n per recursion.
        t_cycles: Recursions T per supervision step, including the one with gradients.
        use_mlp_mixer: Mix positions with an MLP along the sequence instead of attention.
        dropout: Dropout probability of attention weights in training.
        output_norm: Whether to normalise after every call of the network.
        backend: As for :class:`~trm_kernels.TinyRecursiveNetwork`.

    Raises:
        ValueError: A setting is invalid.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 512,
        num_layers: int = 2,
        num_heads: int = 8,
        seq_len: int = 81,
        n_recursions: int = 6,
        t_cycles: int = 3,
        use_mlp_mixer: bool = False,
        dropout: float = 0.0,
        *,
        output_norm: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        require_in(NO_OR_LENGTH, "seq_len", seq_len)
        require_in(NO_OR_DEPTH, "t_cycles", t_cycles)
        require_in(NO_OR_DEPTH, "n_recursions", n_recursions)
        require_in(VOCABULARY, "vocab_size", vocab_size)
        if seq_len < 1 or t_cycles < 1 or n_recursions < 0:
            raise ValueError(
                f"seq_len and t_cycles must be at least 1 and n_recursions at least 0, not {seq_len}, "
                f"{t_cycles} and {n_recursions}"
            )
        self.vocab_size, self.dim, self.seq_len = vocab_size, dim, seq_len
        self.n_recursions, self.t_cycles = n_recursions, t_cycles
        self.use_mlp_mixer = use_mlp_mixer
        self.embed_input = nn.Embedding(vocab_size, dim)
        learned = t_cycles == 1
        self.init_y = nn.Parameter(torch.empty(1, seq_len, dim), requires_grad=learned)
        self.init_z = nn.Parameter(torch.empty(1, seq_len, dim), requires_grad=learned)
        self.network = _Blocks(
            dim,
            num_layers,
            num_heads,
            dropout,
            family="scratch",
            mixer="tokens" if use_mlp_mixer else "attention",
            seq_len=seq_len if use_mlp_mixer else None,
            backend=backend,
        )
        self.output_head = nn.Linear(dim, vocab_size, bias=False)
        self.halt_predictor = nn.Sequential(nn.RMSNorm(dim, eps=_EPS), nn.Linear(dim, 1), nn.Sigmoid())
        self.output_norm = nn.RMSNorm(dim, eps=_EPS) if output_norm else None
        self._initialise()

    def _initialise(self) -> None:
        for parameter in (self.embed_input.weight, self.init_y, self.init_z):
            nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens [B, L] of any integer dtype: [B, L, D].

        Raises:
            ValueError: ``tokens`` is not [B, L], or the model does not support its length L.
        """
        if tokens.dim() != 2:
            raise ValueError(f"expected tokens [B, L], got {list(tokens.shape)}")
        length = tokens.shape[1]
        if self.use_mlp_mixer and length != self.seq_len:
            raise ValueError(f"this token mixer needs L = {self.seq_len}, got {length}")
        if not 1 <= length <= self.seq_len:
            raise ValueError(f"this model needs L from 1 to seq_len = {self.seq_len}, got {length}")
        return self.embed_input(tokens.long())

    def initial_states(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The initial y and z of x [B, L, D]: their first L positions, expanded to its shape."""
        length = x.shape[1]
        return self.init_y[:, :length].expand_as(x), self.init_z[:, :length].expand_as(x)

    def refine(
        self, x: Tensor, y: Tensor, z: Tensor, *, with_gradients: bool = True
    ) -> tuple[Tensor, Tensor]:
        """One supervision step on x, y and z [B, L, D]: the new y and z, not detached."""
        return deep_recursion(
            self.network,
            x,
            y,
            z,
            self.n_recursions,
            self.t_cycles,
            output_norm=self.output_norm,
            with_gradients=with_gradients,
        )

    def halt_logits(self, y: Tensor) -> Tensor:
        """Logits [B] of the probability that the answer y [B, L, D] is completely correct."""
        norm, head, _ = self.halt_predictor
        return head(norm(y.mean(dim=1))).squeeze(-1)

    def forward_with_deep_supervision(
        self,
        x: Tensor,
        num_supervision_steps: int = 16,
        compute_gradients_for_last_only: bool = False,
    ) -> tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Run all supervision steps, detaching states between them, and return the outputs of each.

        Args:
            x: Questions, integers [B, L].
            num_supervision_steps: Number of steps.
            compute_gradients_for_last_only: Record gradients only in the last step's recursion; the two
                heads record gradients at every step.

        Returns:
            For each step: logits [B, L, V], halting probabilities [B], detached states (y, z) [B, L, D].
        """
        embedded = self.embed(x)
        y, z = self.initial_states(embedded)
        predictions, halt_probs, intermediates = [], [], []
        for number in range(1, num_supervision_steps + 1):
            recorded = number == num_supervision_steps or not compute_gradients_for_last_only
            y, z = self.refine(embedded, y, z, with_gradients=recorded)
            predictions.append(self.output_head(y))
            halt_probs.append(torch.sigmoid(self.halt_logits(y)))
            y, z = y.detach(), z.detach()
            intermediates.append((y, z))
        return predictions, halt_probs, intermediates

    @torch.no_grad()
    def predict(
        self,
        x: Tensor,
        max_refinement_steps: int = 16,
        halt_threshold: float = 0.9,
        compact: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Refine each sample until its halting probability exceeds the threshold, without dropout.

        Args:
            x: Questions, integers [B, L].
            max_refinement_steps: Maximum number of supervision steps.
            halt_threshold: Probability above which a sample halts.
            compact: Whether to remove halted samples from the batch to save computation.

        Returns:
            Tokens at each sample's last step [B, L], and the number of that step [B], from 1; both int64.
        """
        embedded = self.embed(x)
        y, z = self.initial_states(embedded)

        def step(x: Tensor, y: Tensor, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            y, z = self.refine(x, y, z, with_gradients=False)
            return {"y": y, "z": z}, torch.sigmoid(self.halt_logits(y)) > halt_threshold

        with self._evaluating():
            state = {"x": embedded, "y": y, "z": z}
            result = halting_recursion(step, state, max_refinement_steps, compact=compact)
        return self.output_head(result.state["y"]).argmax(dim=-1), result.exit_steps.long()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.training
        if training:
            self.eval()
        try:
            yield
        finally:
            if training:
                self.train()
