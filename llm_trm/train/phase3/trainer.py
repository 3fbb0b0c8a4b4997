"""TRL's ``GRPOTrainer`` for language models that recur at ``<think>``; needs the extra ``rl``."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from llm_trm.data.lessons import encode_prompt
from llm_trm.evaluate.language_model_modes import UNPENALISED
from llm_trm.models.causal.loading import LatentModel, save_latent_model
from llm_trm.train.phase3.rewards import Reward
from llm_trm.train.run.trainer_checkpoints import StrictTrainer
from trm_kernels import NetworkConfig

#: File in the folder of the run that every logged step adds completions to, each with its rewards.
COMPLETIONS_FILE = "completions.jsonl"


class Reference:
    """The model as it is at construction: its decoder, and a frozen copy of its reasoner.

    TRL makes its reference by loading the model by name, which transformers alone cannot, or by adding a
    second adapter; switching to that one and back would let gradients reach the adapters, since peft enables
    gradients for the active adapter. The decoder is frozen, so it can be shared, and it may be wrapped for
    several processes at any time.

    Args:
        model: A ``TRMForCausalLM``, or a ``PeftModel`` around one.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._backbone = model, backbone(model)
        self._reasoner = copy.deepcopy(active_reasoner(model)).requires_grad_(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the model with the copied reasoner."""
        trained = self._backbone.reasoner
        self._backbone.reasoner = self._reasoner.train(trained.training)
        try:
            return self._model(*args, **kwargs)
        finally:
            self._backbone.reasoner = trained


class LatentGRPOTrainer(StrictTrainer, GRPOTrainer):
    """Trains the reasoner on rewards, and nothing else.

    TRL scores ``base_model(input_ids, attention_mask).last_hidden_state``: that of the backbone, which
    includes the recursion. It differs from TRL's trainer in the reference; prompts are encoded as in
    ``llm-trm train lora``; evaluation is greedy accuracy on held-out problems; checkpoints can be read by
    ``load_latent_model``; nothing is reported to Hugging Face.

    Args:
        latent: The model, loaded to be trained.
        rewards: Reward functions. The first is that of right answers.
        args: TRL's settings. ``beta`` is the weight of the divergence from the model at construction.
        train_dataset, eval_dataset: Rows with ``prompt`` and ``answer``.
        facts: JSON values to keep beside the weights; also an attribute.
        encoded: Tokens of the prompts, since TRL passes on their text only.
    """

    model: Any
    args: Any
    ref_model: Any
    reward_funcs: Any
    eval_dataset: Any
    _logs: Any

    def __init__(
        self,
        latent: LatentModel,
        rewards: Sequence[Reward],
        args: GRPOConfig,
        train_dataset: Any,
        eval_dataset: Any,
        facts: dict[str, Any],
        encoded: Mapping[str, list[int]],
    ) -> None:
        self._latent, self.facts, self._encoded = latent, facts, encoded
        prepare(latent.model)
        self._trained = {name for name, weight in latent.model.named_parameters() if weight.requires_grad}
        beta, args.beta = args.beta, 0.0
        super().__init__(
            model=latent.model,
            reward_funcs=list(rewards),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=latent.tokenizer,
        )
        args.beta = self.beta = beta
        self.ref_model = Reference(self.model) if beta else None
        self._greedy = GenerationConfig(
            max_new_tokens=args.max_completion_length,
            do_sample=False,
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=self.eos_token_ids,
            disable_compile=True,
            **UNPENALISED,
        )
        self._completions = Path(self.args.output_dir) / COMPLETIONS_FILE
        self._written_at = 0

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer the held-out problems greedily.

        Returns:
            ``eval_accuracy``, ``eval_correct`` and ``eval_problems``, ``eval_<name>`` of each reward, and
            ``eval_tokens``, the mean length of an answer.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        training = self.model.training
        self.model.eval()
        sampled, self.generation_config = self.generation_config, self._greedy
        try:
            means = self._answer(dataset)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
            self.log(metrics)
        finally:
            self.generation_config = sampled
            self.model.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _answer(self, dataset: Any) -> dict[str, float]:
        processes, own = self.accelerator.num_processes, self.accelerator.process_index
        size = self.args.per_device_eval_batch_size
        # All processes take the same number of batches; problems that pad them do not count.
        share = -(-len(dataset) // processes)
        places = [own + processes * turn for turn in range(share)]
        totals = torch.zeros(len(self.reward_funcs) + 2, dtype=torch.float64)
        for start in range(0, share, size):
            batch = places[start : start + size]
            rows = [dataset[place % len(dataset)] for place in batch]
            counted = torch.tensor([float(place < len(dataset)) for place in batch], dtype=torch.float64)
            prompts = [row["prompt"] for row in rows]
            ids, _ = self._generate_single_turn(self._tokenize_prompts(prompts)[0], None, {}, 1)
            texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
            given = {"answer": [row["answer"] for row in rows]}
            columns = [
                reward(prompts=prompts, completions=texts, completion_ids=ids, **given)
                for reward in self.reward_funcs
            ]
            columns += [[float(len(row)) for row in ids], [1.0] * len(ids)]
            totals += (
                torch.tensor([[value or 0.0 for value in column] for column in columns]).double() @ counted
            )
        # float32, since Apple's MPS lacks float64; counts up to 16 million are exact in it.
        summed = self.accelerator.reduce(totals.float().to(self.accelerator.device), "sum").double().tolist()
        *rewards, tokens, problems = summed
        means = {name: value / problems for name, value in zip(self.reward_func_names, rewards, strict=True)}
        return {
            "accuracy": rewards[0] / problems,
            "correct": rewards[0],
            "problems": problems,
            **means,
            "tokens": tokens / problems,
        }

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's loss; its gradient is zero if no completion of the batch has a ``<think>``."""
        loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        if torch.is_grad_enabled() and not loss.requires_grad:
            loss = loss + sum(weight.sum() * 0 for weight in model.parameters() if weight.requires_grad)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See TRL; in training, also write the latest completions."""
        super().log(logs, start_time)
        step = self.state.global_step
        if self.model.training and self.is_world_process_zero() and step > self._written_at:
            self._written_at = step
            self._write_completions(step)

    def _write_completions(self, step: int) -> None:
        logged = self._logs
        rewards = {name: list(values) for name, values in logged["rewards"].items()}
        rows = zip(logged["prompt"], logged["completion"], logged["advantages"], strict=True)
        with self._completions.open("a", encoding="utf-8") as file:
            for place, (prompt, completion, advantage) in enumerate(rows):
                row = {"step": step, "prompt": prompt, "completion": completion}
                row |= {name: values[place] for name, values in rewards.items()} | {"advantage": advantage}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Tokens as in training: TRL would add special tokens, and parse those in a question's text."""
        form = self._latent.prompt_form
        known = self._encoded
        return [known.get(one) or encode_prompt(self._tokenizer, one, form) for one in prompts], None, {}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            save_latent_model(
                self.accelerator.unwrap_model(self.model),
                self._tokenizer,
                Path(output_dir or self.args.output_dir),
                base=self._latent.base,
                prompt_form=self._latent.prompt_form,
                state_dict=state_dict,
                **self.facts,
            )

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        # peft loads all adapters as trainable when training is to continue.
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(name in self._trained)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no card: TRL's describes a fine-tuned language model."""

    def _send_telemetry(self) -> None:
        """Report nothing to anyone."""


def backbone(model: Any) -> Any:
    """The ``TRMModel`` of a ``TRMForCausalLM``, or of a ``PeftModel`` around one."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


def active_reasoner(model: Any) -> nn.Module:
    """The reasoner in use: with adapters, the copy that peft trains and saves."""
    reasoner = backbone(model).reasoner
    if hasattr(reasoner, "modules_to_save"):
        reasoner = reasoner.modules_to_save[reasoner.active_adapters[0]]
    assert isinstance(reasoner, nn.Module)
    return reasoner


def prepare(model: Any) -> None:
    """Prepare a loaded model for GRPO.

    The reasoner gets float32 weights, since bfloat16 would round small updates away. Its halting head is
    frozen: it decides when a recursion ends, so no gradient of a log-probability reaches it. All dropout is
    off, so that a completion has the log-probabilities that it was sampled with.
    """
    reasoner: Any = active_reasoner(model).float()
    reasoner.trm.halt_head.requires_grad_(False)
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        # TRL reads it, and peft's wrapper of a head with trained tokens lacks it.
        head.bias = None
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        settings = getattr(module, "config", None)
        if isinstance(settings, NetworkConfig):
            module.config = dataclasses.replace(settings, dropout=0.0)
