"""patch(model): equal functions and parameters in three known models, and reasons for all others."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.foreign import official, scratch, seed
from trm_kernels import PatchReport, TinyRecursiveNetwork, backends, patch, use_backend
from trm_kernels.network import FusedModule

TOKENS = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(1))
CONTEXT = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(2))
RAGGED = torch.tensor([[1.0] * 9, [1.0] * 4 + [0.0] * 5, [1.0] * 3 + [0.0] * 5 + [1.0]])


def official_model(**options: object) -> official.Inner:
    return official.Inner(official.Config(**options))  # type: ignore[arg-type]


def scratch_mixer() -> nn.Module:
    return scratch.TinyRecursiveModel(use_mlp_mixer=True)


SEED_LOOPS = ["latent_recursion", "run_deep_recursion"]
SEQUENCE_LOOPS = [*SEED_LOOPS, "_latent_recursion_with_mask", "_deep_recursion_with_mask"]
SCRATCH_LOOPS = ["apply_network", "one_recursion_cycle"]

#: A model, the arguments of a call, and the paths that must be swapped in it.
ORIGINS = {
    "seed": (seed.TRM, (TOKENS,), ["net", *SEED_LOOPS]),
    "seed-sequence": (seed.SequenceTRM, (CONTEXT,), ["net", *SEQUENCE_LOOPS]),
    "scratch": (scratch.TinyRecursiveModel, (TOKENS,), ["network", *SCRATCH_LOOPS]),
    "scratch-mixer": (scratch_mixer, (TOKENS,), ["network", *SCRATCH_LOOPS]),
    "official-rope": (official_model, (TOKENS,), ["L_level"]),
    "official-theta": (lambda: official_model(rope_theta=500.0), (TOKENS,), ["L_level"]),
    "official-learned": (lambda: official_model(pos_encodings="learned"), (TOKENS,), ["L_level"]),
    "official-mlp_t": (lambda: official_model(mlp_t=True), (TOKENS,), ["L_level"]),
}  # fmt: skip

Origin = tuple[Callable[[], nn.Module], tuple[Tensor, ...], list[str]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=ORIGINS.values(), ids=ORIGINS)
def origin(request: pytest.FixtureRequest) -> Origin:
    return request.param


def paths(report: PatchReport, outcome: str) -> list[str]:
    return [entry.path for entry in report.entries if entry.outcome == outcome]


def reason_for(model: nn.Module, path: str) -> str:
    """Patch ``model``, which must change nothing, and return the reason reported for ``path``."""
    modules = list(model.modules())
    report = patch(model)
    assert not report.swapped, report
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    return next(entry.reason for entry in report.entries if entry.path == path)


def loss_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    # Not the mean square, which is constant after a norm.
    return (model(*inputs) - 1.0).square().mean()


def gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss_of(model, inputs).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_swaps_networks_that_compute_the_same(origin: Origin) -> None:
    build, inputs, expected = origin
    model = build()
    before = copy.deepcopy(model)
    report = patch(model)
    assert paths(report, "swapped") == expected, report
    assert isinstance(model.get_submodule(expected[0]), FusedModule)
    # In float32, the CPU's matrix library determines how much a recursion amplifies rounding errors.
    model, before = model.double(), before.double()
    for norm in before.modules():
        if isinstance(norm, nn.RMSNorm) and norm.eps is None:
            norm.eps = torch.finfo(torch.float32).eps  # the original value
    inputs = tuple(given.double() if given.is_floating_point() else given for given in inputs)
    torch.testing.assert_close(model(*inputs), before(*inputs), rtol=1e-6, atol=1e-6)
    for name, gradient in gradients(before, inputs).items():
        torch.testing.assert_close(gradients(model, inputs)[name], gradient, rtol=1e-6, atol=1e-6, msg=name)


def test_the_loops_run_on_fused_networks(origin: Origin) -> None:
    build, inputs, expected = origin
    model = build()
    patch(model)
    network = model.get_submodule(expected[0])
    runs: list[nn.Module] = []
    assert isinstance(network, FusedModule)
    eager = network.forward_eager

    def counted(x: Tensor, mask: Tensor | None = None) -> Tensor:
        runs.append(network)
        return eager(x, mask)

    network.forward_eager = counted  # type: ignore[method-assign]
    with use_backend("eager"):  # another backend may run the complete recursion at once
        model(*inputs)
    supervision, cycles = (2 if isinstance(model, seed.TRM) else 1), getattr(model, "n_deep_recursions", 2)
    assert len(runs) == supervision * cycles * 3  # n = 2 latent steps and one answer


def test_shares_parameters_and_keys(origin: Origin) -> None:
    build = origin[0]
    model = build()
    parameters, checkpoint = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    patch(model)
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert model.state_dict().keys() == checkpoint.keys()
    model.load_state_dict(checkpoint, strict=True)
    build().load_state_dict(model.state_dict(), strict=True)


def test_an_optimizer_built_before_continues_to_work(origin: Origin) -> None:
    build, inputs, _ = origin
    model = build()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]
    patch(model)
    start = model(*inputs).detach()
    for _ in range(3):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(m, inputs).backward()
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
    torch.testing.assert_close(model(*inputs), twin(*inputs), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(model(*inputs), start, rtol=1e-3, atol=1e-3)


def test_a_copy_of_a_patched_model_is_independent(origin: Origin) -> None:
    build, inputs, expected = origin
    model = build()
    patch(model)
    reference = model(*inputs).detach()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert isinstance(twin.get_submodule(expected[0]), FusedModule)
        with torch.no_grad():
            next(twin.get_submodule(expected[0]).parameters()).add_(1.0)
        assert not torch.allclose(twin(*inputs), reference)
        torch.testing.assert_close(model(*inputs).detach(), reference)


def test_leaves_no_trace_but_the_swap(origin: Origin) -> None:
    build, _, expected = origin
    model = build()
    model.train()
    network = model.get_submodule(expected[0])
    frozen, still = next(network.parameters()), next(network.children())
    frozen.requires_grad_(False)
    still.eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not frozen.requires_grad
    swapped = model.get_submodule(expected[0])
    assert swapped.training and not next(swapped.children()).training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [scratch.TinyRecursiveModel, official_model])
def test_probes_in_the_dtype_of_the_model(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    report = patch(build().to(dtype))
    assert report.entries[0].outcome == "swapped", report


def test_rounding_does_not_hide_a_different_function() -> None:
    # In bf16 the two layouts of RoPE differ only within the rounding tolerance.
    model = scratch.TinyRecursiveModel(rope=scratch.InterleavedRotaryEmbedding).bfloat16()
    assert "outputs differ on the probe" in reason_for(model, "network")


def test_masked_outputs_agree_at_valid_positions() -> None:
    model = seed.SequenceTRM(dropout=0.1).eval()
    before = copy.deepcopy(model)
    patch(model)
    valid = torch.cat((RAGGED, torch.ones(3, 1)), dim=1).bool()
    ours, theirs = model(CONTEXT, RAGGED), before(CONTEXT, RAGGED)
    torch.testing.assert_close(ours[valid], theirs[valid], rtol=1e-4, atol=1e-5)
    assert not ours[~valid].any()
    assert model.net.config.dropout == 0.1


@pytest.mark.parametrize("build", [seed.TRM, scratch.TinyRecursiveModel])
def test_dropout_is_preserved(build: Callable[..., nn.Module]) -> None:
    model = build(dropout=0.5)
    network = patch(model).entries[0].path
    assert model.get_submodule(network).config.dropout == 0.5
    model.train()
    assert not torch.equal(model(TOKENS), model(TOKENS))
    model.eval()
    assert torch.equal(model(TOKENS), model(TOKENS))


def test_every_reference_to_a_shared_network_is_swapped() -> None:
    model = nn.ModuleDict({"first": seed.TRM(), "second": seed.TRM()})
    model["second"].net = model["first"].net
    report = patch(model)
    assert model["first"].net is model["second"].net
    assert isinstance(model["first"].net, TinyRecursiveNetwork)
    assert paths(report, "swapped")[0] == "first.net"


def test_a_block_applied_twice_stays_one_block() -> None:
    model = seed.TRM()
    model.net.layers[1] = model.net.layers[0]
    before = copy.deepcopy(model)
    assert patch(model).entries[0].outcome == "swapped"
    assert model.net.layers[0].mlp[0].weight is model.net.layers[1].mlp[0].weight
    torch.testing.assert_close(model(TOKENS), before(TOKENS), rtol=1e-4, atol=1e-5)


def test_the_official_loop_is_left_but_its_calls_are_fused() -> None:
    report = patch(nn.Sequential(official_model()))
    entry = report.left[0]
    assert (entry.path, entry.kind) == ("0.forward", "loop")
    assert "inline in forward" in entry.reason and "is fused" in entry.reason


@pytest.mark.parametrize("encoding", ["rope", "learned"])
def test_a_call_with_other_positions_than_patched_raises(encoding: str) -> None:
    model = official_model(pos_encodings=encoding)
    tables = official_model().rotary_emb()
    patch(model)
    assert model.L_level.config.rope == (encoding == "rope")
    x = torch.randn(2, 11, 32)
    with pytest.raises(ValueError, match="patched with rope="):
        model.L_level(x, x, cos_sin=None if encoding == "rope" else tables)


def test_faulty_rope_is_left() -> None:
    # As published, heads use the angles of positions, so L must equal the number of heads ...
    runs = scratch.TinyRecursiveModel(seq_len=4, num_heads=4, rope=scratch.FaultyRotaryEmbedding)
    runs(TOKENS[:, :4])
    assert "outputs differ on the probe" in reason_for(runs, "network")
    # ... and any other length fails.
    fails = scratch.TinyRecursiveModel(seq_len=9, num_heads=4, rope=scratch.FaultyRotaryEmbedding)
    assert "the original fails on a probe [3, 9, 32]" in reason_for(fails, "network")


class LoRALinear(nn.Module):
    """A linear layer with an adapter, as PEFT wraps one."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class NoisyNetwork(seed.TinyRecursiveNetwork):
    """Adds noise in training, which no child module shows."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out = super().forward(x, mask)
        return out + 0.1 * torch.randn_like(out) if self.training else out


class DetachedNetwork(seed.TinyRecursiveNetwork):
    """Has the same outputs as its parent, but different gradients."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) + 0.5 * (x - x.detach())


class WrappedParameter(nn.Parameter):
    """A parameter of another class, such as DTensor and quantised tensors."""


def broken(build: Callable[[], nn.Module], change: Callable[[nn.Module], object]) -> nn.Module:
    model = build()
    change(model)
    return model


def seed_block(change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    return lambda: broken(seed.TRM, lambda model: change(model.net.layers[1]))


def scratch_block(change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    return lambda: broken(scratch.TinyRecursiveModel, lambda model: change(model.network[0]))


def seed_network(network: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: broken(seed.TRM, lambda model: setattr(model, "net", network(32, 2, 4)))


def hooked() -> nn.Module:
    return broken(seed.TRM, lambda m: m.net.layers[0].mlp.register_forward_hook(lambda *_: None))


def wrapped() -> nn.Module:
    def change(model: nn.Module) -> None:
        layer = model.net.layers[0].mlp[0]
        layer.weight = WrappedParameter(layer.weight.data)

    return broken(seed.TRM, change)


def float8() -> nn.Module:
    def change(model: nn.Module) -> None:
        layer = model.net.layers[0].mlp[0]
        layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)

    return broken(seed.TRM, change)


def rope_theta_lies() -> nn.Module:
    return broken(official_model, lambda m: setattr(m.config, "rope_theta", 500.0))


def positions_untold() -> nn.Module:
    return broken(lambda: official_model(pos_encodings="learned"), lambda m: delattr(m, "config"))


def positions_contradict() -> nn.Module:
    return broken(official_model, lambda m: setattr(m.config, "pos_encodings", "learned"))


LEFT = {
    "lora": (
        seed_block(lambda b: b.mlp.__setitem__(0, LoRALinear(b.mlp[0]))),
        r"layers\.1\.mlp\.0 is a .*LoRALinear, not a Linear",
    ),
    "unknown child": (seed_block(lambda b: setattr(b, "drop", nn.Dropout(0.1))), "unknown child 'drop'"),
    "hook": (hooked, r"layers\.0\.mlp has hooks"),
    "instance forward": (seed_block(lambda b: setattr(b, "forward", b.forward)), "set on the instance"),
    "tanh GELU": (seed_block(lambda b: b.mlp.__setitem__(1, nn.GELU("tanh"))), "GELU.tanh"),
    "norm eps": (seed_block(lambda b: setattr(b, "norm1", nn.RMSNorm(32, eps=1e-6))), "norm eps 1e-06"),
    "layer norm": (seed_block(lambda b: setattr(b, "norm2", nn.LayerNorm(32))), "not a RMSNorm"),
    "batch second": (seed_block(lambda b: setattr(b.self_attn, "batch_first", False)), "batch_first=False"),
    "dropout differs": (seed_block(lambda b: setattr(b.self_attn, "dropout", 0.3)), "blocks differ"),
    "no bias": (seed_block(lambda b: setattr(b.mlp, "0", nn.Linear(32, 128, bias=False))), "has no .*bias"),
    "narrow": (
        seed_block(lambda b: b.mlp.__setitem__(0, nn.Linear(32, 64))),
        r"mlp\.0\.weight has shape \[64, 32\], the family's has \[128, 32\]",
    ),
    "two dtypes": (seed_block(lambda b: b.norm1.double()), "more than one dtype"),
    "meta device": (lambda: seed.TRM().to("meta"), "meta device"),
    "wrapped parameter": (wrapped, "is a WrappedParameter"),
    "float8": (float8, "dtype torch.float8"),
    "float64 eps": (lambda: seed.TRM().double(), "norm eps 2.22e-16"),
    "noise in training": (seed_network(NoisyNetwork), "outputs differ .*training mode"),
    "other gradients": (seed_network(DetachedNetwork), "gradients differ"),
    "scratch eps": (scratch_block(lambda b: setattr(b.norm2, "eps", 1e-5)), "norm eps 1e-05"),
    "scratch theta": (scratch_block(lambda b: setattr(b.mixer.rope, "base", 500)), "not those of the NeoX"),
    "key-value heads": (lambda: official_model(num_key_value_heads=2), "2 key-value heads for 4 heads"),
    "causal": (lambda: official_model(causal=True), "is causal"),
    "paper eps": (lambda: official_model(rms_norm_eps=1e-6), "norm eps 1e-06"),
    "expansion": (lambda: official_model(expansion=20.0), "has shape"),
    "rope theta": (rope_theta_lies, "not those of the NeoX layout with theta 500"),
    "positions untold": (positions_untold, "use of RoPE is unknown"),
    "positions contradict": (positions_contradict, "'learned', but the model has a rotary_emb"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "reason"), LEFT.values(), ids=LEFT)
def test_leaves_networks_that_it_cannot_replace(build: Callable[[], nn.Module], reason: str) -> None:
    model = build()
    path = next(name for name in ("net", "network", "L_level") if hasattr(model, name))
    assert re.search(reason, found := reason_for(model, path)), found


class DampedTRM(seed.TRM):
    """Keeps the names and signatures of the recursion methods, but changes the behaviour of one."""

    def latent_recursion(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        y, z = super().latent_recursion(x, y, z)
        return 0.5 * y, z


class RenamedTRM(seed.TRM):
    def latent_recursion(  # type: ignore[override]
        self, question: Tensor, y: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        return super().latent_recursion(question, y, z)


class AllGradientsTRM(seed.TRM):
    """Backpropagates through every recursion: equal outputs, different gradients."""

    def run_deep_recursion(
        self, x: Tensor, y: Tensor, z: Tensor, with_gradients: bool = True
    ) -> tuple[Tensor, Tensor]:
        for _ in range(self.n_deep_recursions):
            y, z = self.latent_recursion(x, y, z)
        return y, z


@pytest.mark.parametrize(
    ("build", "left", "reason"),
    [
        (DampedTRM, ["latent_recursion", "run_deep_recursion"], "outputs differ"),
        (RenamedTRM, ["latent_recursion"], r"its parameters are \(question, y, z\), not \(x, y, z\)"),
        (AllGradientsTRM, ["run_deep_recursion"], "gradients"),
    ],
)
def test_leaves_a_loop_that_differs(build: Callable[[], nn.Module], left: list[str], reason: str) -> None:
    model = build()
    before = copy.deepcopy(model)
    report = patch(model)
    assert paths(report, "left") == left, report
    assert re.search(reason, report.left[0].reason), report
    torch.testing.assert_close(model(TOKENS), before(TOKENS), rtol=1e-4, atol=1e-5)


def test_without_probe_only_structure_decides() -> None:
    model = scratch.TinyRecursiveModel(rope=scratch.InterleavedRotaryEmbedding)
    report = patch(model, probe=False)
    assert {entry.reason for entry in report.swapped} == {"not probed"}


def test_a_second_patch_changes_nothing(origin: Origin) -> None:
    model = origin[0]()
    patch(model)
    modules = list(model.modules())
    report = patch(model)
    assert not report.swapped, report
    assert report.entries[0].reason == "already runs on this library"
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


def test_a_network_without_owner_is_not_swapped() -> None:
    assert "patch the module that owns it" in reason_for(seed.TinyRecursiveNetwork(32, 2, 4), "")


def test_finds_nothing_in_other_models() -> None:
    report = patch(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, batch_first=True), 2))
    assert report.entries == ()
    assert str(report) == "found no tiny recursive network"


def test_the_report_reads_well() -> None:
    model = nn.ModuleDict({"good": seed.TRM(), "bad": broken(seed.TRM, lambda m: m.net.double())})
    lines = str(patch(model)).splitlines()
    assert lines[0].startswith("swapped network good.net [seed]: equal on the probe, error ")
    assert lines[1] == (
        "left    network bad.net [seed]: layers.0.norm1 has norm eps 2.22e-16, "
        "but the seed family uses 1.19e-07"
    )
    assert lines[-1] == "left    loop bad.run_deep_recursion [seed]: its network was not swapped"


def test_the_backend_is_passed_on() -> None:
    model = scratch.TinyRecursiveModel()
    patch(model, backend="eager")
    assert model.network.backend == "eager"
    assert all(block.backend == "eager" for block in model.network)
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        patch(seed.TRM(), backend="cuda")


def test_a_forced_backend_that_refuses_leaves_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = backends.Backend("native", "", lambda: "out of order", lambda *_: None, lambda *_: TOKENS)
    monkeypatch.setitem(backends.BACKENDS, "native", refusing)
    model = seed.TRM()
    report = patch(model, backend="native")
    assert not report.swapped
    assert "backend 'native' cannot handle this call: out of order" in report.left[0].reason
