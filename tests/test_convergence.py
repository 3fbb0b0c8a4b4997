"""Training with the fused kernels matches training with eager, step by step."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ops.common import launched
from trm_kernels import RecursionMixin, TinyRecursiveNetwork

pytestmark = pytest.mark.interpreter
STEPS, WIDTH, BATCH, LENGTH, VOCABULARY = 60, 16, 2, 24, 8


class SortingModel(nn.Module, RecursionMixin):
    """A Tiny Recursive Model that learns to sort two sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.net = TinyRecursiveNetwork(WIDTH, 1, 1, family="seed")
        self.output_norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.n_latent_steps, self.n_deep_recursions = 1, 1

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        y, _ = self.deep_recursion(x, torch.zeros_like(x), torch.zeros_like(x))
        return self.head(y)


def train(model: SortingModel, device: str) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator).to(device)
    losses = []
    for _ in range(STEPS):
        logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.sort(dim=1).values.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_sixty_steps_agree_with_eager(device: str) -> None:
    eager = SortingModel().to(device)
    fused = copy.deepcopy(eager)
    eager.net.backend, fused.net.backend = "eager", "triton"
    before = copy.deepcopy(eager.state_dict())
    expected = train(eager, device)
    with launched("gemm_kernel", "attention_backward_kv_kernel", "rms_norm_backward_kernel"):
        found = train(fused, device)
    assert expected[-1] < 0.8 * expected[0], "the model must learn, otherwise agreement is meaningless"
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-4)
    for name, parameter in eager.state_dict().items():
        other, start = fused.state_dict()[name], before[name]
        if name.endswith("in_proj_bias"):
            # Softmax ignores a shift of all keys: the key bias has no gradient except rounding, which Adam
            # scales up to full steps.
            parameter, other, start = (
                torch.cat((tensor[:WIDTH], tensor[2 * WIDTH :])) for tensor in (parameter, other, start)
            )
        # Rounding differs from the first step on, and Adam divides by small second moments: parameters
        # agree within a small fraction of the distance that they moved.
        assert (other - parameter).norm() < 0.02 * (parameter - start).norm(), name
