"""Tests of the from-scratch puzzle model and its trainer against plain loops over the original's blocks."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm_trm.models.puzzle import TinyRecursiveModel
from llm_trm.train import TRMTrainer
from tests.foreign import scratch

VOCAB, WIDTH, HEADS, LENGTH = 7, 16, 2, 6


class WideRotary(scratch.RotaryEmbedding):
    """The fixed RoPE with tables that are exact in float64."""

    def forward(self, x, seq_len):
        channel = torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1]
        angle = torch.outer(torch.arange(seq_len, dtype=torch.float64), 10000.0**-channel).repeat(1, 2)
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * angle.cos()[:, None] + turned * angle.sin()[:, None]


class Original(nn.Module):
    """A reimplementation of dino65-dev/TRM-Tiny-Recursive-Model (``trm.py``) with a fixed RoPE."""

    def __init__(self, n: int, cycles: int, length: int, tokens: bool) -> None:
        super().__init__()
        self.n, self.cycles = n, cycles
        self.embed_input = nn.Embedding(VOCAB, WIDTH)
        self.init_y = nn.Parameter(torch.zeros(1, length, WIDTH))
        self.init_z = nn.Parameter(torch.zeros(1, length, WIDTH))
        self.network = nn.ModuleList(
            scratch.TransformerBlock(
                WIDTH,
                scratch.MLPSequenceMixer(length)
                if tokens
                else scratch.MultiHeadAttention(WIDTH, HEADS, 0.0, WideRotary),
            )
            for _ in range(2)
        )
        self.output_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.halt_predictor = nn.Sequential(scratch.RMSNorm(WIDTH), nn.Linear(WIDTH, 1), nn.Sigmoid())

    def net(self, x):
        for block in self.network:
            x = block(x)
        return x

    def steps(self, tokens, count, last_only=False):
        """Logits [B, L, V], halting probabilities [B] and detached (y, z) of every supervision step."""
        x = self.embed_input(tokens)
        y = self.init_y[:, : x.shape[1]].expand_as(x)
        z = self.init_z[:, : x.shape[1]].expand_as(x)
        found = []
        for step in range(count):
            for cycle in range(self.cycles):
                with torch.set_grad_enabled(
                    cycle == self.cycles - 1 and (step == count - 1 or not last_only)
                ):
                    for _ in range(self.n):
                        z = self.net(x + y + z)
                    y = self.net(y + z)
            halt = self.halt_predictor(y.mean(dim=1)).squeeze(-1)
            found.append((self.output_head(y), halt, (y.detach(), z.detach())))
            y, z = y.detach(), z.detach()
        return found

    @torch.no_grad()
    def predict(self, tokens, max_steps, threshold):
        """Each sample's first answer with a probability above the threshold, or its last answer."""
        found = self.steps(tokens, max_steps)
        answers, exits = [], []
        for b in range(len(tokens)):
            step = next((i for i in range(max_steps) if found[i][1][b] > threshold), max_steps - 1)
            answers.append(found[step][0][b].argmax(dim=-1))
            exits.append(step + 1)
        return torch.stack(answers), torch.tensor(exits)


def pair(
    mixer: str = "attention", cycles: int = 2, length: int = LENGTH
) -> tuple[TinyRecursiveModel, Original]:
    """Our model and the original with the same weights, in float64."""
    tokens = mixer == "tokens"
    ours = TinyRecursiveModel(
        VOCAB, WIDTH, 2, HEADS, length, n_recursions=2, t_cycles=cycles, use_mlp_mixer=tokens
    ).double()
    original = Original(2, cycles, length, tokens).double()
    original.load_state_dict(ours.state_dict(), strict=True)
    return ours, original


def batch(size: int = 5, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(VOCAB, (size, length)), torch.randint(VOCAB, (size, length))


def original_loss(found, targets, weights=None):
    """The loss of ``trm_trainer.py``: means over supervision steps."""
    total = 0.0
    for step, (logits, halt, _) in enumerate(found):
        right = (logits.argmax(dim=-1) == targets).all(dim=1).to(halt.dtype)
        task = F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
        halting = F.binary_cross_entropy(halt, right)
        total = total + (task + halting) * (1.0 if weights is None else weights[step])
    return total / len(found)


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("mixer", ["attention", "tokens"])
def test_state_dicts_load_both_ways(mixer) -> None:
    ours, original = pair(mixer)
    assert list(ours.state_dict()) == list(original.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in original.named_parameters()]
    for parameter in original.parameters():
        parameter.data.normal_(std=0.1)
    ours.load_state_dict(original.state_dict(), strict=True)
    tokens, _ = batch()
    close(ours.forward_with_deep_supervision(tokens, 1)[0][0], original.steps(tokens, 1)[0][0])
    again = copy.deepcopy(ours)
    assert list(again.state_dict()) == list(ours.state_dict())


@pytest.mark.parametrize("mixer", ["attention", "tokens"])
@pytest.mark.parametrize("cycles", [1, 3])
@pytest.mark.parametrize("last_only", [False, True])
def test_steps_losses_and_gradients_are_the_originals(mixer, cycles, last_only) -> None:
    ours, original = pair(mixer, cycles)
    tokens, targets = batch()
    predictions, halt_probs, states = ours.forward_with_deep_supervision(tokens, 3, last_only)
    expected = original.steps(tokens, 3, last_only)
    for step, (logits, halt, state) in enumerate(expected):
        close(predictions[step], logits)
        close(halt_probs[step], halt)
        close(states[step], state)
        assert not states[step][0].requires_grad
    weights = [0.5, 1.0, 2.0]
    trainer = TRMTrainer(ours)
    loss, metrics = trainer.compute_loss(predictions, halt_probs, targets, weights)
    expected_loss = original_loss(expected, targets, weights)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert metrics["total_loss"] == loss.item()
    assert metrics["task_loss"] + metrics["halt_loss"] == pytest.approx(loss.item())
    loss.backward()
    expected_loss.backward()
    for name, parameter in ours.named_parameters():
        gradient = original.get_parameter(name).grad
        # With last_only, three steps separate the initial states from any gradient.
        if name.startswith("init") and (cycles > 1 or last_only):
            assert parameter.grad is None and gradient is None
            continue
        assert parameter.grad is not None and bool(parameter.grad.any()), name
        close(parameter.grad, gradient)


@pytest.mark.parametrize("cycles", [1, 2])
def test_every_trainable_parameter_has_a_gradient(cycles) -> None:
    ours = TinyRecursiveModel(VOCAB, WIDTH, 2, HEADS, LENGTH, 2, cycles, output_norm=True)
    tokens, targets = batch()
    seen = {}
    trainer = TRMTrainer(ours)
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad for name, p in ours.named_parameters()})
    )
    trainer.train_step((tokens, targets), 2)
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad == (cycles == 1 or not name.startswith("init")), name
        assert not parameter.requires_grad or bool(seen[name].any()), name


@pytest.mark.parametrize("length", [1, HEADS, 5, 33])
def test_attention_works_at_every_length(length) -> None:
    ours, original = pair(length=33)
    tokens, _ = batch(2, length)
    close(ours.forward_with_deep_supervision(tokens, 2)[0][1], original.steps(tokens, 2)[1][0])
    answers, exits = ours.predict(tokens, 2)
    assert answers.shape == (2, length) and exits.shape == (2,)


def test_wrong_shapes_are_refused() -> None:
    ours, _ = pair()
    with pytest.raises(ValueError, match="needs L from 1 to seq_len = 6, got 7"):
        ours.predict(torch.zeros(2, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="needs L from 1 to seq_len = 6, got 0"):
        ours.predict(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected tokens \[B, L\]"):
        ours.forward_with_deep_supervision(torch.zeros(6, dtype=torch.long))
    mixing, _ = pair("tokens")
    with pytest.raises(ValueError, match="needs L = 6, got 5"):
        mixing.predict(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="seq_len and t_cycles must be at least 1"):
        TinyRecursiveModel(VOCAB, WIDTH, t_cycles=0)


@pytest.mark.parametrize("mixer", ["attention", "tokens"])
def test_samples_halt_for_themselves(mixer) -> None:
    ours, original = pair(mixer)
    tokens, _ = batch(12)
    with torch.no_grad():
        found = torch.stack([halt for _, halt, _ in original.steps(tokens, 6)])  # [steps, B]
    ordered = found.flatten().sort().values
    thresholds = (ordered[1:] + ordered[:-1]) / 2
    halting = [((found > t).cumsum(dim=0) == 0).sum(dim=0).unique().numel() for t in thresholds]
    threshold = float(thresholds[halting.index(max(halting))])
    answers, exits = original.predict(tokens, 6, threshold)
    assert len(set(exits.tolist())) > 2
    calls = []
    ours.network.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    for compact in (True, False):
        calls.clear()
        own, own_exits = ours.predict(tokens, 6, threshold, compact)
        assert torch.equal(own, answers) and torch.equal(own_exits, exits)
        assert own.dtype == own_exits.dtype == torch.int64
        assert (min(calls) < 12) == compact
    for b in range(12):
        alone, own_exit = ours.predict(tokens[b : b + 1], 6, threshold)
        assert torch.equal(alone[0], answers[b]) and int(own_exit) == int(exits[b])


def test_predict_leaves_dropout_out_and_the_mode_alone() -> None:
    ours = TinyRecursiveModel(VOCAB, WIDTH, 2, HEADS, LENGTH, 2, 2, dropout=0.5)
    tokens, _ = batch(16)
    ours.halt_predictor[1].weight.data.zero_()
    first = ours.predict(tokens, 2)[0]
    assert ours.training and ours.network.training
    assert torch.equal(ours.predict(tokens, 2)[0], first)
    ours.eval()
    assert torch.equal(ours.predict(tokens, 2)[0], first) and not ours.training


class PlainTrainer:
    """``trm_trainer.py`` with one backward pass for all supervision steps, and warm-up from the start."""

    def __init__(self, model, lr, warmup, decay) -> None:
        self.model, self.lr, self.warmup, self.decay, self.count = model, lr, warmup, decay, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=1.0)
        self.ema = copy.deepcopy(model)

    def train_step(self, tokens, targets, steps):
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, self.count / self.warmup)
        found = self.model.steps(tokens, steps)
        loss = original_loss(found, targets)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                average.mul_(self.decay).add_(parameter, alpha=1 - self.decay)
        accuracy = (found[-1][0].argmax(dim=-1) == targets).double().mean()
        return loss.item(), norm.item(), accuracy.item()


@pytest.mark.parametrize("cycles", [1, 2])
@pytest.mark.parametrize("mixer", ["attention", "tokens"])
def test_training_is_the_originals(mixer, cycles) -> None:
    """Gradients, weights, averages and metrics over five updates; one backward per supervision step."""
    ours, original = pair(mixer, cycles)
    # Rates that are exact in float32, because the trainer's are float32 tensors.
    trainer = TRMTrainer(ours, lr=2**-7, warmup_steps=4, ema_decay=0.9)
    plain = PlainTrainer(original, 2**-7, 4, 0.9)
    gradients = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.update(
            {name: p.grad.clone() for name, p in ours.named_parameters() if p.requires_grad}
        )
    )
    held = trainer.ema_model
    for number, steps in enumerate((3, 3, 2, 3, 1), 1):
        tokens, targets = batch()
        metrics = trainer.train_step((tokens, targets), steps)
        loss, norm, accuracy = plain.train_step(tokens, targets, steps)
        assert metrics["total_loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["total_loss"] == pytest.approx(metrics["task_loss"] + metrics["halt_loss"], rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(accuracy)
        assert metrics["lr"] == 2**-7 * min(1.0, number / 4)
        assert metrics["skipped"] == 0.0 and trainer.step_count == number
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, original.get_parameter(name).grad, rtol=1e-9, atol=1e-10)
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter, original.get_parameter(name), rtol=0, atol=1e-10)
            own = held.get_parameter(name)
            torch.testing.assert_close(own, plain.ema.get_parameter(name), rtol=0, atol=1e-10)


def test_the_averaged_model_keeps_every_argument() -> None:
    ours = TinyRecursiveModel(
        VOCAB, WIDTH, 1, 4, LENGTH, 3, 2, use_mlp_mixer=True, dropout=0.1, output_norm=True
    )
    trainer = TRMTrainer(ours, ema_decay=0.5, warmup_steps=1, lr=0.1)
    average = trainer.ema_model
    assert average.network.config == ours.network.config and not average.training
    assert (average.n_recursions, average.t_cycles, average.use_mlp_mixer) == (3, 2, True)
    assert not any(parameter.requires_grad for parameter in average.parameters())
    tokens, targets = batch()
    before = average.predict(tokens, 1)[0]
    weight = ours.output_head.weight.detach().clone()
    trainer.train_step((tokens, targets), 1)
    torch.testing.assert_close(average.output_head.weight, (weight + ours.output_head.weight.detach()) / 2)
    for _ in range(20):
        trainer.train_step((tokens, targets), 1)
    assert not torch.equal(average.predict(tokens, 1)[0], before)


@pytest.mark.parametrize("mixer", ["attention", "tokens"])
def test_a_batch_is_learned(mixer) -> None:
    ours = TinyRecursiveModel(
        VOCAB, 32, 2, HEADS, LENGTH, 2, 2, use_mlp_mixer=mixer == "tokens", output_norm=True
    )
    trainer = TRMTrainer(ours, lr=1e-2, weight_decay=0.1, warmup_steps=5)
    tokens = torch.randint(VOCAB, (8, LENGTH), dtype=torch.uint8)
    history = [trainer.train_step((tokens, (tokens + 1) % VOCAB), 2) for _ in range(30)]
    assert history[-1]["task_loss"] < 0.5 * history[0]["task_loss"]
    assert history[-1]["accuracy"] > 0.5


def test_an_update_that_is_not_finite_is_skipped_with_a_warning() -> None:
    """With the original's defaults, n = 6, 3 cycles and 16 supervision steps, the states become NaN."""
    ours = TinyRecursiveModel(VOCAB, WIDTH, 1, HEADS, LENGTH, use_mlp_mixer=True)
    trainer = TRMTrainer(ours)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.warns(UserWarning, match="output_norm=True"):
        assert trainer.train_step(batch())["skipped"] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    normalised = TinyRecursiveModel(VOCAB, WIDTH, 1, HEADS, LENGTH, use_mlp_mixer=True, output_norm=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = TRMTrainer(normalised).train_step(batch())
    assert metrics["skipped"] == 0.0 and metrics["total_loss"] < 20


def test_ignored_cells() -> None:
    ours, _ = pair()
    tokens, targets = batch()
    predictions, halt_probs, _ = ours.forward_with_deep_supervision(tokens, 2)
    targets = predictions[0].argmax(dim=-1)
    targets[:, 0] = 0
    targets[:, 1:][targets[:, 1:] == 0] = 1
    loss, _ = TRMTrainer(ours, ignore_index=0).compute_loss(predictions, halt_probs, targets)
    kept = [(logits[:, 1:], halt, None) for logits, halt in zip(predictions, halt_probs, strict=True)]
    torch.testing.assert_close(loss, original_loss(kept, targets[:, 1:]), rtol=1e-12, atol=0)


def test_lists_that_do_not_fit_are_refused() -> None:
    ours, _ = pair()
    tokens, targets = batch()
    predictions, halt_probs, _ = ours.forward_with_deep_supervision(tokens, 2)
    trainer = TRMTrainer(ours)
    with pytest.raises(ValueError, match="for each supervision step, got 2, 1 and 2"):
        trainer.compute_loss(predictions, halt_probs[:1], targets)
    with pytest.raises(ValueError, match="got 0, 0 and 0"):
        trainer.compute_loss([], [], targets)
    with pytest.raises(ValueError, match="needs L from 1 to seq_len"):
        trainer.train_step((torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)))
    assert trainer.step_count == 0
