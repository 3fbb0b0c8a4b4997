"""Compressors of language-model states (fewer dimensions per state, or fewer states), and their files.

:class:`DimensionCompressor` keeps the sequence and reduces its width, [B, L, D] to [B, L, D']; it can also
decompress. :class:`LatentAttentionCompressor` keeps the width and compresses the sequence to M latents,
[B, L, D] to [B, M, D]; only a :class:`LatentDecoder` trained with it can show what the latents preserve.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_trm.errors import InputError, one_line
from llm_trm.files import read_json, writable_folder, write_json
from llm_trm.ranges import LAYERS, LENGTH, WIDTH, require_in
from llm_trm.weights import read_tensors, write_tensors

#: The files of a saved compressor.
WEIGHTS_FILE, FACTS_FILE = "compressor.safetensors", "compressor.json"

_TRAIN_ONE = "train one with llm-trm train phase1"
_NORM_EPS = 1e-6


class DimensionCompressor(nn.Module):
    """Compresses states linearly from D to D', and decompresses them with the transposed weights.

    The compression is ``W h`` and the reconstruction is ``W^T W h``, without biases. The matrix W [D', D]
    starts with orthonormal rows. The lower bound of its mean squared error is the error of the projection
    onto the D' leading eigenvectors of E[h h^T] (:mod:`llm_trm.train.phase1.pca`).

    Args:
        d_model: Width D of the states.
        d_compressed: Width D' of the compressed states, less than D.

    Raises:
        InputError: D' is not in 1 .. D - 1.
    """

    def __init__(self, d_model: int, d_compressed: int = 256) -> None:
        super().__init__()
        if not 1 <= d_compressed < d_model:
            raise InputError(
                f"a compressor for states of width {d_model} needs a compressed width of 1 to {d_model - 1}, "
                f"not {d_compressed}"
            )
        for name, size in (("d_model", d_model), ("d_compressed", d_compressed)):
            require_in(WIDTH, name, size, InputError)
        self.d_model, self.d_compressed = d_model, d_compressed
        self.compress = nn.Linear(d_model, d_compressed, bias=False)
        nn.init.orthogonal_(self.compress.weight)

    def forward(self, states: Tensor) -> Tensor:
        """Compress states [..., D] to [..., D']."""
        return self.compress(states)

    def decompress(self, compressed: Tensor) -> Tensor:
        """Decompress states [..., D'] to [..., D]."""
        return F.linear(compressed, self.compress.weight.t())

    def reconstruction_loss(self, states: Tensor) -> Tensor:
        """Mean squared error, a scalar, of the reconstruction of states [..., D] over all elements."""
        return F.mse_loss(self.decompress(self(states)), states)

    @property
    def compression_ratio(self) -> float:
        """D / D'."""
        return self.d_model / self.d_compressed

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments that build a compressor of this shape."""
        return {"d_model": self.d_model, "d_compressed": self.d_compressed}

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_compressed={self.d_compressed}"


class LatentAttentionCompressor(nn.Module):
    """Compresses a sequence of states to M latents that attend to it.

    As in a Perceiver (Jaegle et al., 2021), learned latents query the states by pre-norm cross-attention,
    followed by an MLP in each layer. The result is normalised. Each state's index among the valid states is
    encoded and added to its normalised content, so padding on either side changes nothing.

    Args:
        d_model: Width D of the states.
        num_latents: Number of latents M.
        n_heads: Number of attention heads; must divide the latents' width.
        d_latent: Width of the latents; D by default.
        n_layers: Number of layers of cross-attention and MLP.

    Raises:
        InputError: A size is less than 1, or the heads do not divide the latents' width.
    """

    def __init__(
        self,
        d_model: int,
        num_latents: int = 256,
        n_heads: int = 8,
        d_latent: int | None = None,
        n_layers: int = 1,
    ) -> None:
        super().__init__()
        d_latent = d_model if d_latent is None else d_latent
        if min(d_model, num_latents, n_heads, d_latent, n_layers) < 1:
            raise InputError(
                f"a latent compressor needs sizes of at least 1, not width {d_model}, {num_latents} latents "
                f"of width {d_latent}, {n_heads} heads and {n_layers} layers"
            )
        for name, size in (("d_model", d_model), ("d_latent", d_latent), ("n_heads", n_heads)):
            require_in(WIDTH, name, size, InputError)
        require_in(LENGTH, "num_latents", num_latents, InputError)
        require_in(LAYERS, "n_layers", n_layers, InputError)
        if d_latent % n_heads:
            raise InputError(
                f"latents of width {d_latent} cannot be split into {n_heads} heads: the width must be a "
                "multiple of the heads"
            )
        self.d_model, self.d_latent, self.num_latents = d_model, d_latent, num_latents
        self.n_heads, self.n_layers = n_heads, n_layers
        self.latents = nn.Parameter(torch.randn(num_latents, d_latent))
        self.input_norm = nn.RMSNorm(d_model, eps=_NORM_EPS)
        self.layers = nn.ModuleList(_CrossBlock(d_latent, d_model, n_heads) for _ in range(n_layers))
        self.output_norm = nn.RMSNorm(d_latent, eps=_NORM_EPS)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compress states.

        Args:
            states: [B, L, D].
            mask: 1 at valid positions, 0 at padding [B, L], any dtype; None if all are valid. Padding is
                never read. A row without valid positions yields latents that attended to nothing.

        Returns:
            Latents [B, M, d_latent].
        """
        if mask is None:
            mask = states.new_ones(states.shape[:2], dtype=torch.bool)
        valid = mask != 0
        places = valid.cumsum(1) - 1
        content = self.input_norm(states.masked_fill(~valid[..., None], 0.0))
        context = content + sinusoids(places, self.d_model).to(content.dtype)
        # Softmax over no keys is NaN. The padding is all zeros here, so attending to it adds nothing.
        context = context.masked_fill(~valid[..., None], 0.0)
        attended = valid | ~valid.any(1, keepdim=True)
        latents = self.latents.expand(states.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, context, attended)
        return self.output_norm(latents)

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments that build a compressor of this shape."""
        names = ("d_model", "num_latents", "n_heads", "d_latent", "n_layers")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.sizes.items())


class LatentDecoder(nn.Module):
    """Reconstructs states [B, L, D] from M latents, with one query per position. Discarded after training.

    A query knows only its position, so all information in the reconstruction comes from the latents.

    Args:
        d_model: Width D of the states.
        d_latent: Width of the latents.
        n_heads: Number of attention heads; must divide the latents' width.
        n_layers: Number of layers of cross-attention and MLP.
    """

    def __init__(self, d_model: int, d_latent: int, n_heads: int = 8, n_layers: int = 1) -> None:
        super().__init__()
        self.d_latent = d_latent
        self.query = nn.Linear(d_latent, d_latent)
        self.layers = nn.ModuleList(_CrossBlock(d_latent, d_latent, n_heads) for _ in range(n_layers))
        self.output_norm = nn.RMSNorm(d_latent, eps=_NORM_EPS)
        self.output = nn.Linear(d_latent, d_model)

    def forward(self, latents: Tensor, length: int) -> Tensor:
        """Reconstruct states.

        Args:
            latents: [B, M, d_latent].
            length: L; position i is the i-th valid state that the compressor saw.

        Returns:
            States [B, L, D].
        """
        places = torch.arange(length, device=latents.device).expand(latents.shape[0], -1)
        states = self.query(sinusoids(places, self.d_latent).to(latents.dtype))
        for layer in self.layers:
            states = layer(states, latents, None)
        return self.output(self.output_norm(states))


class _CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP with residuals. Keys have no bias, since it would get no gradient."""

    def __init__(self, d_model: int, d_context: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm = nn.RMSNorm(d_model, eps=_NORM_EPS)
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key_value = nn.Linear(d_context, 2 * d_model, bias=False)
        self.attention_output = nn.Linear(d_model, d_model, bias=False)
        self.mlp_norm = nn.RMSNorm(d_model, eps=_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x: Tensor, context: Tensor, valid: Tensor | None) -> Tensor:
        """``x`` [B, M, d_model] attends to ``context`` [B, L, d_context] where ``valid`` [B, L] is True."""
        projected = (self.query(self.attention_norm(x)), *self.key_value(context).chunk(2, dim=-1))
        query, key, value = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in projected)
        mask = None if valid is None else valid[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.attention_output(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Sinusoidal encoding (Vaswani et al., 2017) of integer positions [...], float32 [..., width]."""
    half = (width + 1) // 2
    exponents = torch.arange(half, device=positions.device, dtype=torch.float32) / half
    angles = positions[..., None].float() * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width]


Compressor = DimensionCompressor | LatentAttentionCompressor

_KINDS: dict[str, type[DimensionCompressor] | type[LatentAttentionCompressor]] = {
    "dimension": DimensionCompressor,
    "latent": LatentAttentionCompressor,
}


def kind_of(compressor: Compressor) -> str:
    """``"dimension"`` or ``"latent"``."""
    return next(kind for kind, cls in _KINDS.items() if type(compressor) is cls)


def save_compressor(compressor: Compressor, folder: Path, **facts: Any) -> None:
    """Write ``compressor.safetensors`` and ``compressor.json`` to ``folder``, which is created if missing.

    Args:
        compressor: The compressor. Its weights keep their dtype.
        facts: Further entries of the JSON file, for instance ``model`` and ``metrics``.

    Raises:
        InputError: The folder is not writable.
    """
    writable_folder(folder)
    weights = folder / WEIGHTS_FILE
    write_tensors(weights, {name: tensor.detach() for name, tensor in compressor.state_dict().items()})
    identity = {"kind": kind_of(compressor), "sizes": compressor.sizes, "weights_sha256": _sha256(weights)}
    write_json(folder / FACTS_FILE, {**facts, **identity})


def load_compressor(folder: Path, device: torch.device | str = "cpu") -> Compressor:
    """Load a compressor that :func:`save_compressor` wrote.

    Args:
        folder: The folder with ``compressor.json``, or the output of ``llm-trm train phase1``, of which the
            last stage is loaded.
        device: Device of the weights.

    Raises:
        InputError: A file is missing or invalid, or the two files do not match.
    """
    folder = compressor_folder(folder)
    facts = compressor_facts(folder)
    weights = folder / WEIGHTS_FILE
    tensors = read_tensors(weights, _TRAIN_ONE, str(device))
    if _sha256(weights) != facts["weights_sha256"]:
        raise InputError(f"{weights} does not belong to {folder / FACTS_FILE}: {_TRAIN_ONE}")
    try:
        with torch.device("meta"):
            compressor = _KINDS[facts["kind"]](**facts["sizes"])
        compressor.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{folder / FACTS_FILE} does not describe its weights ({one_line(error)}): {_TRAIN_ONE}"
        ) from error
    return compressor


def compressor_facts(folder: Path) -> dict[str, Any]:
    """Read ``compressor.json``: kind, sizes, and the facts passed to :func:`save_compressor`.

    Args:
        folder: As for :func:`load_compressor`.

    Raises:
        InputError: The file is missing or does not describe a compressor.
    """
    path = compressor_folder(folder) / FACTS_FILE
    facts = read_json(path, _TRAIN_ONE)
    if not isinstance(facts, dict) or not {"kind", "sizes", "weights_sha256"} <= facts.keys():
        raise InputError(f"{path} does not describe a compressor: {_TRAIN_ONE}")
    return facts


def compressor_folder(folder: Path) -> Path:
    """The folder with ``compressor.json``: ``folder`` itself, or its stage ``1b`` or ``1a``."""
    candidates = (folder, folder / "1b", folder / "1a")
    return next((candidate for candidate in candidates if (candidate / FACTS_FILE).is_file()), folder)


def require_width(compressor: Compressor, width: int, folder: Path, reader: str) -> None:
    """Raise InputError unless ``compressor``, from ``folder``, accepts states of ``width``.

    Args:
        reader: Source of the states for the message, for instance ``"model HuggingFaceTB/SmolLM3-3B"``.
    """
    if compressor.d_model != width:
        raise InputError(
            f"{folder}: the compressor expects states of width {compressor.d_model}, but those of {reader} "
            f"have {width}: {_TRAIN_ONE} on that model"
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
