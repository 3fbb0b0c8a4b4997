"""SequenceTRM: the original's parameters and function, halting, files."""

import pytest
import torch

from llm_trm.errors import InputError
from llm_trm.models.sequence_trm import SequenceTRM, load_sequence_trm, save_sequence_trm
from trm_kernels import deep_recursion


def model(**options) -> SequenceTRM:
    torch.manual_seed(0)
    return SequenceTRM(16, 2, 2, **{"n_latent_steps": 2, "n_deep_recursions": 2} | options)


def ragged(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random contexts [B, L, 16] and their mask."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randn(*mask.shape, 16, generator=generator), mask.long()


def test_parameters_are_the_originals() -> None:
    """Names of ``SequenceTRM`` in src/train/phase2_trm.py of anonx3247/llm-trm."""
    block = ["norm1.weight", "self_attn.in_proj_weight", "self_attn.in_proj_bias"]
    block += ["self_attn.out_proj.weight", "self_attn.out_proj.bias", "norm2.weight"]
    block += ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]
    expected = {f"net.layers.{layer}.{name}" for layer in range(2) for name in block}
    expected |= {"reasoning_token", "halt_head.weight", "halt_head.bias", "output_norm.weight"}
    assert {name for name, _ in model().named_parameters()} == expected


def test_forward_is_the_recursion_on_the_extended_context() -> None:
    trm, (context, mask) = model(), ragged([5, 3, 1])
    x = torch.cat((context, trm.reasoning_token.expand(3, 1, 16)), dim=1)
    extended = torch.cat((mask, torch.ones(3, 1, dtype=mask.dtype)), dim=1)
    y = z = torch.zeros_like(x)
    for _ in range(3):
        y, z = deep_recursion(trm.net, x, y, z, 2, 2, mask=extended, output_norm=trm.output_norm)
    torch.testing.assert_close(trm(context, mask, n_steps=3), y)


def test_padding_changes_nothing() -> None:
    trm, (context, mask) = model(), ragged([5, 3, 1])
    padded = trm(context, mask)[:, -1]
    for index, length in enumerate((5, 3, 1)):
        alone = trm(context[index : index + 1, :length])[:, -1]
        torch.testing.assert_close(padded[index : index + 1], alone, atol=1e-5, rtol=1e-5)


def test_every_parameter_has_a_gradient() -> None:
    trm, (context, mask) = model(n_deep_recursions=1), ragged([5, 3, 4])
    x, y, z, extended = trm.setup_for_steps(context, mask)
    y, z, halt = trm.single_step(x, y, z, extended)
    assert halt.shape == (3, 1) and bool(((halt > 0) & (halt < 1)).all())
    (y[:, -1].square().mean() + halt.square().mean() + y[:, -1, 0].sum()).backward()
    for name, parameter in trm.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_each_sample_halts_for_itself() -> None:
    trm, (context, mask) = model(), ragged([6, 5, 4, 3, 2, 6])
    with torch.no_grad():
        states, logits = [], []
        for steps in range(1, 5):
            y = trm(context, mask, n_steps=steps)
            states.append(y[:, -1])
            logits.append(trm.halt_logits(y))
        # A bias that some samples exceed immediately, and others late or never.
        trm.halt_head.bias -= torch.stack(logits).median()
        wants = torch.stack([trm.halt_head(state).squeeze(-1) > 0 for state in states])  # [steps, B]
    found = trm.reason(context, mask, max_steps=4)
    expected = [next((step for step in range(4) if wants[step, b]), 3) for b in range(6)]
    assert found.steps.tolist() == [step + 1 for step in expected]
    assert len(set(expected)) > 1
    for b, step in enumerate(expected):
        torch.testing.assert_close(found.state[b], states[step][b], atol=1e-5, rtol=1e-5)
    assert trm.reason(context, mask, max_steps=4, halting="none").steps.tolist() == [4] * 6
    assert len(set(trm.reason(context, mask, max_steps=4, halting="batch").steps.tolist())) == 1


def test_files_contain_the_model(tmp_path) -> None:
    trm = model()
    save_sequence_trm(trm, tmp_path, epoch=3)
    loaded, facts = load_sequence_trm(tmp_path)
    assert facts == {"epoch": 3} and loaded.config == trm.config and not loaded.training
    for name, value in trm.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_broken_files_are_named(tmp_path) -> None:
    with pytest.raises(InputError, match=r"trm\.json does not exist"):
        load_sequence_trm(tmp_path)
    save_sequence_trm(model(), tmp_path)
    weights = tmp_path / "trm.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=r"trm\.safetensors cannot be read"):
        load_sequence_trm(tmp_path)
    (tmp_path / "trm.json").write_text('{"kind": "other", "facts": {}}')
    with pytest.raises(InputError, match="describes a other"):
        load_sequence_trm(tmp_path)
