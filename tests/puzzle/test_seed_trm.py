"""Tests of the seed puzzle model against plain loops over ``nn.MultiheadAttention`` blocks."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm_trm.models.puzzle import TRM, create_trm_model
from tests.foreign import seed
from trm_kernels.config import FLOAT32_EPS

VOCAB, WIDTH, HEADS, LENGTH = 7, 16, 2, 6


class Original(nn.Module):
    """A reimplementation of anonx3247/llm-trm's model (``src/models/trm.py``)."""

    def __init__(self, n: int, cycles: int, supervision_steps: int) -> None:
        super().__init__()
        self.n, self.cycles, self.supervision_steps = n, cycles, supervision_steps
        self.input_embedding = nn.Embedding(VOCAB, WIDTH)
        self.net = seed.TinyRecursiveNetwork(WIDTH, 2, HEADS)
        self.output_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.halt_head = nn.Linear(WIDTH, 1)
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                module.eps = FLOAT32_EPS  # None means another one in float64

    def steps(self, tokens):
        """Logits [B, L, V] and halting probabilities [B, 1] of every supervision step."""
        x = self.input_embedding(tokens)
        y, z = torch.zeros_like(x), torch.zeros_like(x)
        for _ in range(self.supervision_steps):
            for cycle in range(self.cycles):
                with torch.set_grad_enabled(cycle == self.cycles - 1):
                    for _ in range(self.n):
                        z = self.net(x + y + z)
                    y = self.net(y + z)
            yield self.output_head(y), torch.sigmoid(self.halt_head(y.mean(dim=1)))
            y, z = y.detach(), z.detach()

    def compute_loss(self, tokens, labels, use_act):
        """Halts by the batch's mean, as in the original."""
        total = 0.0
        for logits, halt in self.steps(tokens):
            total = total + F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1))
            if use_act:
                right = (logits.argmax(dim=-1) == labels).all(dim=-1).to(halt.dtype).unsqueeze(-1)
                total = total + 0.5 * F.binary_cross_entropy(halt.clamp(1e-7, 1 - 1e-7), right)
                if halt.mean() > 0.5:
                    break
        return total


def pair(cycles: int = 2, supervision_steps: int = 4, **options) -> tuple[TRM, Original]:
    """Our model and the original with the same weights, in float64."""
    ours = create_trm_model(
        VOCAB,
        WIDTH,
        n_heads=HEADS,
        n_latent_steps=2,
        n_deep_recursions=cycles,
        n_supervision_steps=supervision_steps,
        **options,
    ).double()
    with torch.no_grad():
        # The states grow, so the original's probabilities would round to 0 and 1, and its gradients to zero.
        ours.halt_head.weight.mul_(1e-3)
    original = Original(2, cycles, supervision_steps).double()
    original.load_state_dict(ours.state_dict())
    return ours, original


def batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(VOCAB, (size, LENGTH)), torch.randint(VOCAB, (size, LENGTH))


def spread_exits(ours: TRM, original: Original, tokens: torch.Tensor) -> list[int]:
    """Set the halting bias so that samples halt at different steps. Returns these steps, from 1."""
    with torch.no_grad():
        ours.halt_head.bias.zero_()
        original.load_state_dict(ours.state_dict())
        found = torch.stack([torch.logit(halt[:, 0]) for _, halt in original.steps(tokens)])  # [steps, B]
        ordered = found.flatten().sort().values
        best: list[int] = []
        for threshold in (ordered[1:] + ordered[:-1]) / 2:
            wants = found > threshold
            exits = (wants.cumsum(dim=0) == 0).sum(dim=0).add(1).clamp_max(len(found)).tolist()
            if len(set(exits)) > len(set(best)):
                best = exits
                ours.halt_head.bias.fill_(-threshold)
        original.load_state_dict(ours.state_dict())
    assert len(set(best)) > 2
    return best


def halt_at(stop: int | None, ours: TRM, original: Original, tokens: torch.Tensor) -> None:
    """Set the halting head so that the batch's mean first exceeds 0.5 at step ``stop``, or never."""
    with torch.no_grad():
        ours.halt_head.bias.zero_()
        original.load_state_dict(ours.state_dict())
        found = torch.stack([torch.logit(halt[:, 0]) for _, halt in original.steps(tokens)])  # [steps, B]
        near = float(found[:2].abs().max())
        biases = [-float(found.abs().max()) - 1.0, *torch.linspace(-near, near, 1000).tolist()]
        # With one of the two signs, the second step exceeds 0.5 before the first.
        for sign, bias in product((1.0, -1.0), biases):
            passed = (torch.sigmoid(sign * found + bias).mean(dim=1) > 0.5).tolist()
            if (passed.index(True) + 1 if any(passed) else None) == stop:
                ours.halt_head.weight.mul_(sign)
                ours.halt_head.bias.fill_(bias)
                original.load_state_dict(ours.state_dict())
                return
    raise AssertionError(f"no bias halts the batch at {stop}")


def assert_same_gradients(ours: nn.Module, original: nn.Module) -> None:
    expected = dict(original.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = expected.pop(name).grad
        assert gradient is not None and parameter.grad is not None and bool(parameter.grad.any()), name
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-11, msg=name)
    assert not expected


def test_state_dicts_load_both_ways() -> None:
    ours, original = pair()
    ours.load_state_dict(original.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(original.state_dict())


@pytest.mark.parametrize("cycles", [1, 3])
def test_training_forward_is_the_originals(cycles) -> None:
    ours, original = pair(cycles)
    tokens, _ = batch()
    expected = [logits for logits, _ in original.steps(tokens)]
    found = ours(tokens, return_all_steps=True)
    assert len(found) == len(expected) == 4
    for step, logits in zip(found, expected, strict=True):
        torch.testing.assert_close(step, logits, rtol=1e-10, atol=1e-11)
    last = ours(tokens)
    torch.testing.assert_close(last, expected[-1], rtol=1e-10, atol=1e-11)
    weights = torch.randn_like(last)
    (last * weights).sum().backward()
    (expected[-1] * weights).sum().backward()
    for name, parameter in ours.named_parameters():
        if not name.startswith("halt_head"):
            expected_gradient = original.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, expected_gradient, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("cycles", [1, 2])
@pytest.mark.parametrize(("use_act", "stop"), [(True, 1), (True, 2), (True, None), (False, 1)])
def test_loss_and_gradients_are_the_originals(cycles, use_act, stop) -> None:
    """With halting by the batch's mean at the first step, later or never."""
    ours, original = pair(cycles, halting="batch")
    tokens, labels = batch()
    halt_at(stop, ours, original, tokens)
    loss, expected = (
        ours.compute_loss(tokens, labels, use_act),
        original.compute_loss(tokens, labels, use_act),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    if use_act:
        assert_same_gradients(ours, original)


def test_the_loss_of_a_sample_does_not_depend_on_its_batch() -> None:
    """With per-sample halting, the loss of a batch is the mean of the original's over single samples."""
    ours, original = pair()
    tokens, labels = batch()
    spread_exits(ours, original, tokens)
    loss = ours.compute_loss(tokens, labels)
    alone = [original.compute_loss(tokens[b : b + 1], labels[b : b + 1], True) for b in range(len(tokens))]
    expected = torch.stack(alone).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, original)


def test_every_sample_exits_for_itself() -> None:
    ours, original = pair()
    tokens, _ = batch()
    exits = spread_exits(ours, original, tokens)
    ours.eval()
    with torch.no_grad():
        logits = [step for step, _ in original.steps(tokens)]
        expected = torch.stack([logits[step - 1][b] for b, step in enumerate(exits)])
        calls: list[int] = []
        hook = ours.net.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
        answers = ours.reason(tokens)
        hook.remove()
        assert answers.steps.tolist() == exits
        assert calls[0] == len(tokens) and calls[-1] < len(tokens)  # those that are done are taken out
        torch.testing.assert_close(answers.logits, expected, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(ours(tokens), expected, rtol=1e-10, atol=1e-11)
        for b, step in enumerate(exits):
            own = ours(tokens[b : b + 1], return_all_steps=True)
            assert len(own) == step
            torch.testing.assert_close(own[-1][0], expected[b], rtol=1e-10, atol=1e-11)
        every = ours(tokens, return_all_steps=True)
        assert len(every) == max(exits)
        for number, found in enumerate(every, 1):
            kept = torch.stack([logits[min(number, step) - 1][b] for b, step in enumerate(exits)])
            torch.testing.assert_close(found, kept, rtol=1e-10, atol=1e-11)
    recorded = ours(tokens)
    torch.testing.assert_close(recorded, expected, rtol=1e-10, atol=1e-11)
    assert recorded.requires_grad


@pytest.mark.parametrize(("stop", "steps"), [(1, 1), (2, 2), (None, 4)])
def test_batch_halting_is_the_originals(stop, steps) -> None:
    ours, original = pair(halting="batch")
    tokens, _ = batch()
    halt_at(stop, ours, original, tokens)
    ours.eval()
    with torch.no_grad():
        expected = [logits for logits, _ in original.steps(tokens)][:steps]
        assert ours.reason(tokens).steps.tolist() == [steps] * len(tokens)
        torch.testing.assert_close(ours(tokens), expected[-1], rtol=1e-10, atol=1e-11)
        every = ours(tokens, return_all_steps=True)
        assert len(every) == steps
        for found, logits in zip(every, expected, strict=True):
            torch.testing.assert_close(found, logits, rtol=1e-10, atol=1e-11)


def test_without_halting_all_steps_are_taken() -> None:
    ours, original = pair(halting="none")
    tokens, _ = batch()
    ours.halt_head.bias.data.fill_(50.0)
    ours.eval()
    expected = [logits for logits, _ in original.steps(tokens)][-1]
    torch.testing.assert_close(ours(tokens), expected, rtol=1e-10, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), expected, rtol=1e-10, atol=1e-11)
    assert len(ours(tokens, return_all_steps=True)) == 4


def test_ignored_cells() -> None:
    """An ignored cell affects neither the loss nor the correctness of an answer."""
    ours, _ = pair(halting="none")
    tokens, labels = batch()
    with torch.no_grad():
        labels = ours(tokens, return_all_steps=True)[0].argmax(dim=-1)
    labels[:, 0] = (labels[:, 0] + 1) % VOCAB
    wrong = ours.compute_loss(tokens, labels)
    ignored = labels.clone()
    ignored[:, 0] = -100
    zeroed = ignored.clone()
    zeroed[:, 0] = 99
    loss = ours.compute_loss(tokens, ignored)
    torch.testing.assert_close(loss, ours.compute_loss(tokens, zeroed, ignore_index=99))
    cells = 0.0
    halting = 0.0
    x = ours.embed(tokens)
    y = z = torch.zeros_like(x)
    for _ in range(4):
        y, z = ours.deep_recursion(x, y.detach(), z.detach())
        logits = ours.output_head(y)
        cells = cells + F.cross_entropy(logits[:, 1:].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
        right = (logits.argmax(dim=-1) == labels)[:, 1:].all(dim=1).double()
        halt = torch.sigmoid(ours.halt_logits(y))
        halting = halting + F.binary_cross_entropy(halt, right)
    torch.testing.assert_close(loss, cells + 0.5 * halting, rtol=1e-12, atol=0)
    assert not torch.equal(wrong, loss)


def test_normalised_states_stay_bounded_at_the_default_numbers_of_steps() -> None:
    """After 16 supervision steps with n = 6, the original's logits reach 1e28, and gradients are useless."""
    ours = TRM(VOCAB, WIDTH, n_heads=HEADS, halting="none", output_norm=True)
    tokens, labels = batch()
    loss = ours.compute_loss(tokens, labels)
    assert loss.item() < 16 * 4
    loss.backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
        assert bool(parameter.grad.isfinite().all()), name
    assert "output_norm.weight" in ours.state_dict()


def test_tokens_of_a_byte_are_taken() -> None:
    ours, _ = pair()
    tokens, labels = batch()
    small = ours.compute_loss(tokens.to(torch.uint8), labels.to(torch.uint8))
    torch.testing.assert_close(small, ours.compute_loss(tokens, labels))


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="n_supervision_steps must be at least 1"):
        TRM(VOCAB, WIDTH, n_supervision_steps=0)
    with pytest.raises(ValueError, match="halting must be one of"):
        TRM(VOCAB, WIDTH, halting="mean")
