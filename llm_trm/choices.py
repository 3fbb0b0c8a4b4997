"""Values that settings, models and files share by name. Imports no torch, so that help is quick."""

from __future__ import annotations

from typing import Literal

#: ``bf16`` computes in bfloat16; ``auto`` selects it on CUDA and ``fp32`` elsewhere.
Precision = Literal["auto", "bf16", "fp32"]
#: ``auto`` selects CUDA (or ROCm) if available, else Apple's MPS, else the CPU.
DeviceName = Literal["auto", "cuda", "mps", "cpu"]
#: Where metrics are logged.
Track = Literal["wandb", "tensorboard", "jsonl"]
#: How a recursion stops early: each sample by its own halting probability, the batch by its mean, or never.
Halting = Literal["sample", "batch", "none"]
#: What the halting head learns: the cosine similarity, whether it exceeds a threshold, or nothing.
HaltLoss = Literal["mse", "bce", "none"]
#: Kind of puzzle.
Task = Literal["sudoku", "maze", "arc"]
#: How the logits of a puzzle's cells become probabilities.
CellLoss = Literal["stablemax", "softmax"]
#: How positions of a puzzle are encoded.
Positions = Literal["rope", "learned", "none"]
#: How the positions of a puzzle exchange information: :data:`trm_kernels.config.Mixer`.
Mixer = Literal["attention", "tokens"]
#: How a question is put to a language model.
PromptForm = Literal["chat", "plain"]
#: ``latents`` is M latents at the decoder's width, ``sequence`` a single reasoning state at a smaller one.
ReasonerKind = Literal["latents", "sequence"]
#: When the oldest positions are dropped: once the decoder's context is full, or at every recursion, as many
#: as there are new soft tokens.
Window = Literal["slide", "always"]
