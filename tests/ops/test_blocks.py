"""The MLP sublayer and the whole block as ops: formulas, registration, determinism, precision modes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.ops.common import FLOAT64, launched
from trm_kernels import NetworkConfig, reference
from trm_kernels.fused import block_parameters
from trm_kernels.ops._launch import input_precision
from trm_kernels.ops.block import block
from trm_kernels.ops.mlp import mlp
from trm_kernels.ops.sublayer import LAYOUTS
from trm_kernels.testing import SEEDS, UNIT_ROUNDOFF, ToleranceRule, relative_error

pytestmark = pytest.mark.interpreter
LENGTH, WIDTH, HEADS = 5, 8, 2


def make_block(
    layout: str, dtype: torch.dtype, device: str, width: int = WIDTH
) -> reference.TransformerBlock:
    """A block with random norms and biases; freshly built ones hide a wrong norm weight behind ones."""
    family, _, tokens = layout.partition("-")
    config = NetworkConfig(width, 1, HEADS, family=family, mixer=tokens or "attention", seq_len=LENGTH)
    module = reference.TransformerBlock(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if "paper" in layout and parameter.dim() == 2:
                # 256 inner units (the least there are) over 5 tokens saturate in float64 checks otherwise.
                parameter.mul_(0.5)
    return module.to(device, dtype)


def static_arguments(
    module: reference.TransformerBlock, layout: str, x: Tensor, operand: torch.dtype
) -> tuple:
    config = module.config
    cos = sin = None
    if config.rotary:
        cos, sin = reference.rotary_tables(x.shape[1], config.head_dim, config.rope_theta, x)
    return None, None, cos, sin, None, layout, HEADS, config.norm_eps, 0.0, operand


@pytest.mark.skipif(FLOAT64 is None, reason="kernels run in float64 in the interpreter only")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_formula_passes_gradcheck(layout: str) -> None:
    module = make_block(layout, torch.float64, "cpu")
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    parameters = [parameter.detach().requires_grad_() for parameter in block_parameters(module)]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        static = static_arguments(module, layout, x, torch.float64)
        return block(x, None, list(parameters), *static)[0]

    with launched("gemm_kernel", "rms_norm_backward_kernel"):
        assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.skipif(FLOAT64 is None, reason="kernels run in float64 in the interpreter only")
@pytest.mark.parametrize("layout", ["seed", "scratch", "paper"])
def test_mlp_formula_passes_gradcheck(layout: str) -> None:
    module = make_block(layout, torch.float64, "cpu")
    count = {"seed": 5, "scratch": 4, "paper": 2}[layout]
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.uint8)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    parameters = [parameter.detach().requires_grad_() for parameter in block_parameters(module)[-count:]]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return mlp(x, list(parameters), mask, layout, module.config.norm_eps, torch.float64)

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)
    assert function(x, *parameters)[mask == 0].eq(0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_opcheck(layout: str, device: str) -> None:
    module = make_block(layout, torch.float32, device)
    x = torch.randn(2, LENGTH, WIDTH, device=device, requires_grad=True)
    static = static_arguments(module, layout, x, torch.float32)
    torch.library.opcheck(block, (x, None, block_parameters(module), *static))


@pytest.mark.parametrize("layout", ["seed", "paper"])
def test_mlp_opcheck(layout: str, device: str) -> None:
    module = make_block(layout, torch.float32, device)
    count = {"seed": 5, "paper": 2}[layout]
    x = torch.randn(2, LENGTH, WIDTH, device=device, requires_grad=True)
    parameters = block_parameters(module)[-count:]
    torch.library.opcheck(mlp, (x, parameters, None, layout, module.config.norm_eps, torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_backward_passes_agree_to_the_bit(layout: str, device: str) -> None:
    module = make_block(layout, torch.float32, device)
    x = torch.randn(2, LENGTH, WIDTH, device=device)

    def run() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        out, _ = block(leaf, None, block_parameters(module), *static_arguments(module, layout, x, x.dtype))
        out.square().sum().backward()
        return [out, leaf.grad, *(parameter.grad for parameter in module.parameters())]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def half_precision(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float16


@pytest.mark.parametrize("layout", ["seed", "scratch", "scratch-tokens"])
def test_float32_residual_with_half_operands_meets_the_rule(layout: str, device: str) -> None:
    """As under autocast: a chain with a half-precision residual has ten times the error."""
    operand = half_precision(device)
    rule = ToleranceRule(operand)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        module = make_block(layout, torch.float32, device, width=32)
        x = torch.randn(2, LENGTH, 32, device=device)
        ours, _ = block(x, None, block_parameters(module), *static_arguments(module, layout, x, operand))
        with torch.autocast(device, operand):
            eager = module(x)
        assert ours.dtype == eager.dtype == torch.float32
        rule.add("output", ours, eager, module.double()(x.double()))
    rule.check()


def test_an_unnormalised_stream_beyond_float16_is_normalised_before_it_is_rounded(device: str) -> None:
    module = make_block("seed", torch.float32, device)
    x = 1e6 * torch.randn(2, LENGTH, WIDTH, device=device)
    out, _ = block(x, None, block_parameters(module), *static_arguments(module, "seed", x, torch.float16))
    torch.testing.assert_close(out, module(x), rtol=1e-2, atol=1e-2)


def test_row_sums_of_one_block_feed_the_next(device: str) -> None:
    module = make_block("seed", torch.float32, device, width=80)  # two tiles a row
    x = torch.randn(2, LENGTH, 80, device=device)
    static = static_arguments(module, "seed", x, torch.float32)
    parameters = block_parameters(module)
    out, sumsq = block(x, None, parameters, *static)
    torch.testing.assert_close(sumsq.sum(1), out.square().sum(-1).flatten())
    chained, _ = block(out, sumsq, parameters, *static)
    alone, _ = block(out, None, parameters, *static)
    # The same sums in another order: nothing but rounding may differ.
    assert relative_error(chained, alone) < 8 * UNIT_ROUNDOFF[torch.float32]


def test_every_parameter_of_every_family_is_read(device: str) -> None:
    for layout in LAYOUTS:
        module = make_block(layout, torch.float32, device)
        flat = {id(tensor) for tensor in block_parameters(module)}
        assert flat == {id(parameter) for parameter in module.parameters()}, layout
        assert isinstance(module, nn.Module)


def test_strided_vectors_and_transposed_matrices_are_read_right(device: str) -> None:
    module = make_block("seed", torch.float32, device)
    x = torch.randn(2, LENGTH, WIDTH, device=device)
    expected = module(x)
    strided = []
    for parameter in block_parameters(module):
        if parameter.dim() == 1:
            strided.append(torch.stack((parameter, parameter + 1), dim=1)[:, 0])
        else:
            strided.append(parameter.detach().t().contiguous().t())
    static = static_arguments(module, "seed", x, torch.float32)
    out, _ = block(x, None, strided, *static)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    leaves = [parameter.detach().requires_grad_() for parameter in strided]
    torch.library.opcheck(block, (x.requires_grad_(), None, leaves, *static))


def test_backward_may_run_under_another_autocast_state(device: str) -> None:
    module = make_block("seed", torch.float32, device)
    x = torch.randn(2, LENGTH, WIDTH, device=device)
    static = static_arguments(module, "seed", x, torch.float32)

    def gradient(autocast: bool) -> Tensor:
        leaf = x.clone().requires_grad_()
        out, _ = block(leaf, None, block_parameters(module), *static)
        with torch.autocast(device, half_precision(device), enabled=autocast):
            out.sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    assert torch.equal(gradient(True), gradient(False))


def test_a_mask_alone_is_enough(device: str) -> None:
    module = make_block("seed", torch.float32, device)
    x = torch.randn(2, LENGTH, WIDTH, device=device)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0]], dtype=torch.uint8, device=device)
    _, *static = static_arguments(module, "seed", x, torch.float32)
    out, _ = block(x, None, block_parameters(module), mask.t().contiguous().t(), *static)
    torch.testing.assert_close(out, module(x, mask != 0), rtol=1e-4, atol=1e-5)


def test_the_newer_precision_setting_is_followed() -> None:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        assert input_precision(torch.float32) == "tf32"
        assert input_precision(torch.float16) == "ieee"
        settings.fp32_precision = "ieee"
        assert input_precision(torch.float32) == "ieee"
    finally:
        settings.fp32_precision = before
