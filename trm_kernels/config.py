"""The network configuration that every backend reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from trm_kernels import arguments

Family = Literal["seed", "scratch", "paper"]
Mixer = Literal["attention", "tokens"]

#: What a training step saves for the backward from every network call. ``"fast"``: everything the backward
#: reads. ``"balanced"``: everything except the MLP pre-activations, which one GEMM per block recomputes.
#: ``"small"``: only the input of the call.
Memory = Literal["fast", "balanced", "small"]

#: ``nn.RMSNorm(d, eps=None)`` uses the float32 epsilon for bf16 and fp16 inputs too (measured, torch 2.13),
#: but the float64 epsilon for float64. A fixed value keeps the function the same in all dtypes.
FLOAT32_EPS = 1.1920928955078125e-07

#: Larger networks fit on no machine: one layer of the maximum width takes 50 TB.
_MAX_WIDTH, _MAX_LAYERS, _MAX_LENGTH = 2**20, 1024, 2**30

_NORM_EPS: dict[str, float] = {"seed": FLOAT32_EPS, "scratch": 1e-8, "paper": 1e-5}


@dataclass(frozen=True)
class NetworkConfig:
    """Shape and family of a tiny recursive network.

    Args:
        d_model: Width D of the residual stream.
        n_layers: Number of blocks.
        n_heads: Number of attention heads H. D must be a multiple of H. Token mixers ignore it.
        dropout: Probability of dropping an attention weight in training (``seed`` and ``scratch`` only; the
            paper's block has no dropout).
        family: Block architecture.

            - ``"seed"``: pre-norm, weighted RMSNorm, attention and GELU MLP with biases
              (``nn.MultiheadAttention`` layout; the block of anonx3247/llm-trm).
            - ``"scratch"``: pre-norm, weighted RMSNorm with eps 1e-8, no biases, RoPE, SwiGLU 4x
              (the block of dino65-dev/TRM-Tiny-Recursive-Model).
            - ``"paper"``: post-norm, weightless RMSNorm with eps 1e-5, no biases, RoPE, packed SwiGLU
              (the block of SamsungSAILMontreal/TinyRecursiveModels, arXiv 2510.04871).
        mixer: ``"attention"``, or ``"tokens"`` for an MLP along the sequence axis (``scratch``: GELU with
            biases; ``paper``: SwiGLU, with the mixer's norm also along the sequence axis).
        seq_len: Sequence length L of a token mixer, including puzzle-embedding positions.
        rope: Whether attention applies RoPE to queries and keys (families ``scratch`` and ``paper``). Disable
            it for official models with learned positions.
        rope_theta: Base of the rotary frequencies.

    Raises:
        ValueError: If a number has the wrong type, is NaN or out of range, or if the arguments contradict
            each other.
    """

    d_model: int
    n_layers: int = 2
    n_heads: int = 8
    dropout: float = 0.0
    family: Family = "seed"
    mixer: Mixer = "attention"
    seq_len: int | None = None
    rope: bool = True
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.family not in get_args(Family):
            raise ValueError(f"family must be one of {get_args(Family)}, not {self.family!r}")
        if self.mixer not in get_args(Mixer):
            raise ValueError(f"mixer must be one of {get_args(Mixer)}, not {self.mixer!r}")
        arguments.integer("d_model", self.d_model, 1, _MAX_WIDTH)
        arguments.integer("n_layers", self.n_layers, 1, _MAX_LAYERS)
        arguments.integer("n_heads", self.n_heads, 1, _MAX_WIDTH)
        arguments.fraction("dropout", self.dropout)
        arguments.real("rope_theta", self.rope_theta, positive=True)
        if not isinstance(self.rope, bool):
            raise ValueError(f"rope must be True or False, not {self.rope!r}")
        if self.dropout and self.family == "paper":
            raise ValueError("the paper family has no dropout: dropout must be 0")
        if self.mixer == "tokens":
            if self.family == "seed":
                raise ValueError("the seed family has no token mixer: use family='scratch' or 'paper'")
            if self.seq_len is None:
                raise ValueError("mixer='tokens' needs seq_len, the fixed sequence length")
            arguments.integer("seq_len", self.seq_len, 1, _MAX_LENGTH)
        else:
            if self.d_model % self.n_heads:
                raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
            if self.rotary and self.head_dim % 2:
                raise ValueError(f"RoPE needs an even head size, not {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """Head size D / H."""
        return self.d_model // self.n_heads

    @property
    def norm_eps(self) -> float:
        """Epsilon of every RMSNorm in the block."""
        return _NORM_EPS[self.family]

    @property
    def pre_norm(self) -> bool:
        """True: ``h + f(norm(h))``; False: ``norm(h + f(h))``."""
        return self.family != "paper"

    @property
    def rotary(self) -> bool:
        """Whether attention applies RoPE."""
        return self.family != "seed" and self.mixer == "attention" and self.rope

    @property
    def gated(self) -> bool:
        """Whether the channel MLP uses SwiGLU rather than GELU."""
        return self.family != "seed"

    @property
    def d_ff(self) -> int:
        """Inner width of the channel MLP."""
        return self._inner(self.d_model)

    @property
    def token_ff(self) -> int:
        """Inner width of the token mixer."""
        assert self.seq_len is not None
        return self._inner(self.seq_len)

    @property
    def parameters(self) -> int:
        """Number of parameters of the network, computed without building it."""
        d = self.d_model
        norms = 0 if self.family == "paper" else 2 * d
        biased = self.family == "seed"
        channels = 3 * d * self.d_ff if self.gated else 2 * d * self.d_ff + self.d_ff + d
        if self.mixer == "attention":
            mixing = 4 * d * d + (4 * d if biased else 0)
        else:
            assert self.seq_len is not None
            length, inner = self.seq_len, self.token_ff
            mixing = 3 * length * inner if self.family == "paper" else 2 * length * inner + inner + length
        return self.n_layers * (norms + mixing + channels)

    def _inner(self, width: int) -> int:
        # For SwiGLU the paper uses two thirds of 4x, rounded up to a multiple of 256. The others use 4x.
        return -(-round(4 * width * 2 / 3) // 256) * 256 if self.family == "paper" else 4 * width
