"""A language model with one layer, problems, and settings of a run that takes a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

from llm_trm.data.arithmetic import World
from llm_trm.models.tiny import tiny_tokenizer
from llm_trm.train.lora.config import LoraTrainingConfig, ReasonerSettings

SMALL = {"supervision_steps": 2, "n_latent_steps": 1, "n_deep_recursions": 1, "n_layers": 1}


def write_language_model(folder: Path, *, thinks: bool = True, tied: bool = True) -> Path:
    """Save a random language model; with ``thinks`` its tokenizer has the tags and a chat template."""
    tokenizer = tiny_tokenizer() if thinks else plain_tokenizer()
    config = SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        # Large weights, because with the default of 0.02 a random model hardly depends on its context.
        initializer_range=0.2,
    )
    torch.manual_seed(1)
    SmolLM3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, without ``<think>`` and without a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|pad|>", special=True), AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")


def write_rows(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Write rows as JSON lines, by default 48 problems of up to three operations."""
    rows = rows or [problem.record() for problem in World(1, 3).problems(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(folder: Path, **changes: Any) -> LoraTrainingConfig:
    """Settings of a run on ``lm`` and ``problems.jsonl`` in ``folder``."""
    given: dict[str, Any] = {
        "data": str(folder / "problems.jsonl"),
        "model": str(folder / "lm"),
        "output": folder / "run",
        "steps": 4,
        "batch_size": 8,
        "eval_every": 2,
        "eval_samples": 8,
        "val_fraction": 0.2,
        "learning_rate": 1e-2,
        "log_every": 1,
        "patience": 0,
    }
    changes["reasoner"] = ReasonerSettings(**{**SMALL, **changes.get("reasoner", {})})
    return LoraTrainingConfig(**{**given, **changes})
