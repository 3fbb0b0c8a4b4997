"""The recursion of a Tiny Recursive Model, over any network (arXiv 2510.04871, figure 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Network = Callable[..., Tensor]


def latent_recursion(
    net: Network,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    n: int,
    *,
    mask: Tensor | None = None,
    output_norm: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """n times ``z = net(x + y + z)``, then ``y = net(y + z)``.

    Args:
        net: The tiny network; called as ``net(h)``, or ``net(h, mask=mask)`` where there is a mask.
        x: Embedded question [B, L, D].
        y: Current answer [B, L, D].
        z: Current latent state [B, L, D].
        n: Number of latent steps; 0 refines the answer alone.
        mask: 1 at valid positions [B, L].
        output_norm: Applied after every call of the network (``SequenceTRM`` of anonx3247/llm-trm).

    Returns:
        The new ``(y, z)``.
    """

    if n < 0:
        raise ValueError(f"n must be at least 0, not {n}")

    def step(h: Tensor) -> Tensor:
        out = net(h) if mask is None else net(h, mask=mask)
        return out if output_norm is None else output_norm(out)

    question = x + y  # constant over the n steps
    for _ in range(n):
        z = step(question + z)
    return step(y + z), z


def deep_recursion(
    net: Network,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    n: int,
    T: int,
    *,
    mask: Tensor | None = None,
    output_norm: Callable[[Tensor], Tensor] | None = None,
    with_gradients: bool = True,
) -> tuple[Tensor, Tensor]:
    """T - 1 latent recursions without gradient, then one with (or without, if asked).

    Args:
        T: Number of latent recursions, at least 1.
        with_gradients: Whether the last recursion records gradients.

    The others are as for :func:`latent_recursion`. Detach the result before the next supervision step.

    Returns:
        The new ``(y, z)``.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, not {T}")
    with torch.no_grad():
        for _ in range(T - 1):
            y, z = latent_recursion(net, x, y, z, n, mask=mask, output_norm=output_norm)
    with torch.set_grad_enabled(with_gradients and torch.is_grad_enabled()):
        return latent_recursion(net, x, y, z, n, mask=mask, output_norm=output_norm)


class RecursionMixin:
    """Gives a model that owns ``net`` the two recursions as methods.

    The model sets ``net``, ``n_latent_steps`` (n) and ``n_deep_recursions`` (T), and may set
    ``output_norm``.
    """

    net: nn.Module
    n_latent_steps: int
    n_deep_recursions: int

    # No class attribute for output_norm: it would hide a submodule of that name, which nn.Module keeps
    # out of the instance's own attributes.
    @property
    def _output_norm(self) -> Callable[[Tensor], Tensor] | None:
        return getattr(self, "output_norm", None)

    def latent_recursion(
        self, x: Tensor, y: Tensor, z: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :func:`latent_recursion`."""
        return latent_recursion(
            self.net, x, y, z, self.n_latent_steps, mask=mask, output_norm=self._output_norm
        )

    def deep_recursion(
        self,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        mask: Tensor | None = None,
        *,
        with_gradients: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """See :func:`deep_recursion`."""
        return deep_recursion(
            self.net,
            x,
            y,
            z,
            self.n_latent_steps,
            self.n_deep_recursions,
            mask=mask,
            output_norm=self._output_norm,
            with_gradients=with_gradients,
        )
