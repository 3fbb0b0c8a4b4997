"""Compressors of hidden states, their files, and the PCA bound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_trm.errors import InputError
from llm_trm.models.compression import (
    FACTS_FILE,
    WEIGHTS_FILE,
    Compressor,
    DimensionCompressor,
    LatentAttentionCompressor,
    LatentDecoder,
    compressor_facts,
    load_compressor,
    require_width,
    save_compressor,
)
from llm_trm.train.phase1.pca import moments, principal_components
from llm_trm.train.phase1.reconstruction import Quality, Reconstruction, quality

WIDTH = 24


def states(rows: int = 400, rank: int = 6, seed: int = 0) -> Tensor:
    """Return states of low rank with a mean and some noise [rows, WIDTH]."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, WIDTH, generator=torch.Generator().manual_seed(99)) + 0.5
    noise = torch.randn(rows, WIDTH, generator=generator)
    return torch.randn(rows, rank, generator=generator) @ basis + 0.1 * noise


def test_dimension_compressor_starts_orthonormal_and_is_tied() -> None:
    compressor = DimensionCompressor(WIDTH, 5)
    weight = compressor.compress.weight
    torch.testing.assert_close(weight @ weight.t(), torch.eye(5))
    assert [name for name, _ in compressor.named_parameters()] == ["compress.weight"]
    h = torch.randn(2, 3, WIDTH)
    compressed = compressor(h)
    assert compressed.shape == (2, 3, 5)
    torch.testing.assert_close(compressor.decompress(compressed), h @ weight.t() @ weight)
    compressor.reconstruction_loss(h).backward()
    first = weight.grad
    assert first is not None
    assert first.abs().sum() > 0
    assert compressor.compression_ratio == WIDTH / 5
    with torch.no_grad():
        weight.mul_(2.0)
    torch.testing.assert_close(compressor.decompress(compressor(h)), h @ weight.t() @ weight)


@pytest.mark.parametrize("width", [0, -1, WIDTH, WIDTH + 1])
def test_compressed_width_must_be_smaller(width: int) -> None:
    with pytest.raises(InputError, match=f"1 to {WIDTH - 1}, not {width}"):
        DimensionCompressor(WIDTH, width)


@pytest.mark.parametrize("sizes", [{"num_latents": 0}, {"n_heads": 5}, {"d_latent": 0}])
def test_impossible_latents_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(InputError):
        LatentAttentionCompressor(WIDTH, **{"num_latents": 3, "n_heads": 4, **sizes})


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_latents_never_read_padding(padding_side: str) -> None:
    compressor = LatentAttentionCompressor(WIDTH, 3, n_heads=4)
    h = torch.randn(2, 6, WIDTH)
    mask = torch.ones(2, 6, dtype=torch.long)
    padding = slice(0, 2) if padding_side == "left" else slice(4, 6)
    mask[0, padding] = 0
    latents = compressor(h, mask)
    assert latents.shape == (2, 3, WIDTH)
    perturbed = h.clone()
    perturbed[0, padding] = float("nan")
    assert torch.equal(compressor(perturbed, mask), latents)
    torch.testing.assert_close(compressor(h[:1, mask[0] == 1]), latents[:1])
    visible = h.clone()
    visible[0, 3] += 1.0
    assert not torch.equal(compressor(visible, mask)[0], latents[0])
    assert torch.equal(compressor(visible, mask)[1], latents[1])


def test_latents_see_the_order_of_states() -> None:
    compressor = LatentAttentionCompressor(WIDTH, 3, n_heads=4)
    h = torch.randn(1, 6, WIDTH)
    assert not torch.allclose(compressor(h), compressor(h.flip(1)), atol=1e-3)


def test_row_without_a_valid_state_is_finite_with_finite_gradients() -> None:
    compressor = LatentAttentionCompressor(WIDTH, 3, n_heads=4)
    h = torch.randn(2, 4, WIDTH, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    latents = compressor(h, mask)
    latents.square().sum().backward()
    assert latents.isfinite().all()
    assert h.grad is not None
    assert h.grad[0].abs().sum() > 0
    assert torch.equal(h.grad[1], torch.zeros_like(h.grad[1]))
    for parameter in compressor.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(
    "module",
    [
        Reconstruction(DimensionCompressor(WIDTH, 5)),
        Reconstruction(
            LatentAttentionCompressor(WIDTH, 3, n_heads=4, d_latent=16, n_layers=2),
            LatentDecoder(WIDTH, 16, n_heads=4, n_layers=2),
        ),
    ],
    ids=["dimension", "latent"],
)
def test_every_parameter_gets_a_gradient(module: Reconstruction) -> None:
    h, mask = torch.randn(2, 5, WIDTH), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = module(h, mask)
    assert found.shape == h.shape
    (found - h)[mask == 1].square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "compressor", [DimensionCompressor(WIDTH, 5), LatentAttentionCompressor(WIDTH, 3, 4, 16, 2)]
)
def test_compressors_survive_their_files(compressor: Compressor, tmp_path: Path) -> None:
    save_compressor(compressor, tmp_path / "c", model="some/model", metrics={"mse": 0.25})
    before = torch.get_rng_state()
    loaded = load_compressor(tmp_path / "c")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded) is type(compressor)
    assert loaded.sizes == compressor.sizes
    h = torch.randn(2, 4, WIDTH)
    assert torch.equal(loaded(h), compressor(h))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    facts = compressor_facts(tmp_path / "c")
    assert facts["model"] == "some/model"
    assert facts["metrics"] == {"mse": 0.25}


def test_last_stage_of_a_run_is_loaded(tmp_path: Path) -> None:
    first, second = DimensionCompressor(WIDTH, 5), DimensionCompressor(WIDTH, 5)
    save_compressor(first, tmp_path / "1a")
    assert torch.equal(load_compressor(tmp_path).state_dict()["compress.weight"], first.compress.weight)
    save_compressor(second, tmp_path / "1b")
    assert torch.equal(load_compressor(tmp_path).state_dict()["compress.weight"], second.compress.weight)


def _without_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()


def _truncated(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-8])


def _not_json(folder: Path) -> None:
    (folder / FACTS_FILE).write_text("{")


def _other_file(folder: Path) -> None:
    (folder / FACTS_FILE).write_text("[]")


def _other_weights(folder: Path) -> None:
    facts = (folder / FACTS_FILE).read_text()
    save_compressor(DimensionCompressor(WIDTH, 5), folder)
    (folder / FACTS_FILE).write_text(facts)


def _other_sizes(folder: Path) -> None:
    facts = json.loads((folder / FACTS_FILE).read_text())
    facts["sizes"]["d_compressed"] = 6
    (folder / FACTS_FILE).write_text(json.dumps(facts))


def _unknown_kind(folder: Path) -> None:
    facts = json.loads((folder / FACTS_FILE).read_text())
    (folder / FACTS_FILE).write_text(json.dumps({**facts, "kind": "zip"}))


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (_without_weights, WEIGHTS_FILE),
        (_truncated, WEIGHTS_FILE),
        (_not_json, FACTS_FILE),
        (_other_file, FACTS_FILE),
        (_other_weights, WEIGHTS_FILE),
        (_other_sizes, FACTS_FILE),
        (_unknown_kind, FACTS_FILE),
    ],
)
def test_damaged_files_get_one_line_with_file_and_remedy(damage: object, file: str, tmp_path: Path) -> None:
    save_compressor(DimensionCompressor(WIDTH, 5), tmp_path)
    assert callable(damage)
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        load_compressor(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / file) in message
    assert "llm-trm train phase1" in message
    assert "\n" not in message


def test_missing_folder_and_other_width_suggest_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist: train one with llm-trm train phase1"):
        load_compressor(tmp_path / "nothing")
    compressor = DimensionCompressor(WIDTH, 5)
    require_width(compressor, WIDTH, tmp_path, "model m")
    with pytest.raises(InputError, match=f"width {WIDTH}, but those of model m have 7"):
        require_width(compressor, 7, tmp_path, "model m")


def test_pca_is_the_least_error_and_is_predicted_exactly() -> None:
    h = states()
    components = principal_components(moments(h.split(100)).second)
    torch.testing.assert_close(components.vectors @ components.vectors.t(), torch.eye(WIDTH).double())
    exact = h.double()
    for width in (1, 4, 8):
        best = DimensionCompressor(WIDTH, width)
        best.load_state_dict({"compress.weight": components.projection(width)})
        bound = components.mse(width)
        best.requires_grad_(False).double()
        assert float(best.reconstruction_loss(exact)) == pytest.approx(bound, rel=1e-5)
        # All other weights, orthonormal or near the optimum, are worse.
        assert DimensionCompressor(WIDTH, width).reconstruction_loss(h) > bound
        best.compress.weight += 0.01 * torch.randn(width, WIDTH)
        assert best.reconstruction_loss(exact) > bound


def test_latent_reconstruction_beats_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, places = torch.randn(3, WIDTH, generator=generator), torch.randn(6, WIDTH, generator=generator)

    def sequences(count: int) -> Tensor:
        return (torch.randn(count, 1, 3, generator=generator) @ basis) * places + places

    held_out = sequences(64)
    torch.manual_seed(0)
    module = Reconstruction(
        LatentAttentionCompressor(WIDTH, 2, n_heads=4), LatentDecoder(WIDTH, WIDTH, n_heads=4)
    )
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(200):
        h = sequences(32)
        optimizer.zero_grad()
        (module(h, None) - h).square().mean().backward()
        optimizer.step()
    # A decoder that knows only the position reaches the variance at each position.
    by_place = (held_out - held_out.mean(0)).square().mean()
    error = quality(module, [(held_out, None)]).mse
    assert error < 0.5 * float(by_place)


def test_moments_are_of_all_batches() -> None:
    h = states().double()
    found = moments(h.split(150))
    assert found.rows == len(h)
    torch.testing.assert_close(found.mean, h.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.second, h.t() @ h / len(h), rtol=1e-5, atol=1e-5)
    assert found.power == pytest.approx(float(h.square().mean()), rel=1e-6)


def test_quality_counts_every_valid_state_once() -> None:
    h, mask = torch.randn(4, 5, WIDTH), torch.rand(4, 5) > 0.3
    noisy = h + 0.1 * torch.randn_like(h)
    answers = iter(noisy.split(2))
    found = quality(lambda *_: next(answers), zip(h.split(2), mask.split(2), strict=True))
    wanted, got = h[mask], noisy[mask]
    expected = Quality(
        mse=float((got - wanted).square().mean()),
        cosine_similarity=float(torch.cosine_similarity(got, wanted, dim=-1).mean()),
        relative_error=float((got - wanted).norm() / wanted.norm()),
    )
    assert found.mse == pytest.approx(expected.mse, rel=1e-5)
    assert found.cosine_similarity == pytest.approx(expected.cosine_similarity, rel=1e-5)
    assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-5)
