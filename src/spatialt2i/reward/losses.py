"""Bradley-Terry losses: pure functions from scores to (loss, metrics).

Axes: B pairs. The chosen image is w (winner), the rejected one l (loser).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

Metrics = dict[str, Tensor]


def bradley_terry(*, mu_w: Tensor, mu_l: Tensor) -> tuple[Tensor, Metrics]:
    """Plain Bradley-Terry: mean of -log sigmoid(mu_w - mu_l).

    Args:
        mu_w, mu_l: [B], scores of the chosen and of the rejected images.

    Returns:
        The loss (0-d), and 0-d metrics ``accuracy`` (a tie counts half) and ``margin`` (mean of mu_w - mu_l).
    """
    return softplus(mu_l - mu_w).mean(), _metrics(mu_w, mu_l)


def gaussian_bradley_terry(*, mu_w: Tensor, s_w: Tensor, mu_l: Tensor, s_l: Tensor,
                           nodes: int) -> tuple[Tensor, Metrics]:
    """E[-log sigmoid(z)] for z ~ N(mu_w - mu_l, s_w^2 + s_l^2), by Gauss-Hermite quadrature.

    The deterministic form of the uncertainty-aware loss of HPSv3 (arXiv 2508.03789), which samples z. Mind what the
    sigmas can mean: -log sigmoid is convex, so any spread raises the loss, of wrong pairs too, and training narrows
    both as far as the head lets it. Only differences of sigma between images say anything.

    Args:
        mu_w, mu_l: [B], means of the two scores.
        s_w, s_l: [B], their standard deviations, not their logarithms.
        nodes: points of the quadrature; exact for polynomials up to degree 2 x nodes - 1.

    Returns:
        The loss (0-d), and the metrics of `bradley_terry` with ``sigma``, the mean standard deviation.
    """
    points, weights = (torch.as_tensor(a, dtype=mu_w.dtype, device=mu_w.device) for a in _gauss_hermite(nodes))
    spread = _spread(s_w, s_l)
    z = (mu_w - mu_l)[:, None] + spread[:, None] * points  # [B, nodes]
    return (softplus(-z) @ weights).mean(), _metrics(mu_w, mu_l, s_w, s_l)


def sampled_bradley_terry(*, mu_w: Tensor, s_w: Tensor, mu_l: Tensor, s_l: Tensor, draws: int,
                          generator: torch.Generator) -> tuple[Tensor, Metrics]:
    """The same expectation as `gaussian_bradley_terry`, as the mean over random draws of z (reparameterised).

    Args:
        mu_w, mu_l, s_w, s_l: [B], as in `gaussian_bradley_terry`.
        draws: samples of z; all pairs share the noise, so that a pair's loss does not depend on its neighbours.
        generator: where the draws come from.

    Returns:
        The loss (0-d) and the metrics of `gaussian_bradley_terry`.
    """
    noise = torch.randn(draws, generator=generator, device=generator.device).to(mu_w)  # shared by all pairs
    z = (mu_w - mu_l)[:, None] + _spread(s_w, s_l)[:, None] * noise  # [B, draws]
    return softplus(-z).mean(), _metrics(mu_w, mu_l, s_w, s_l)


@lru_cache(maxsize=8)
def _gauss_hermite(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of E[f(x)] for a standard normal x."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    return x, w / w.sum()


def _spread(s_w: Tensor, s_l: Tensor) -> Tensor:
    # the square root has an infinite slope at 0, which two vanishing sigmas would turn into NaN gradients
    return (s_w**2 + s_l**2).clamp(min=1e-12).sqrt()


def _metrics(mu_w: Tensor, mu_l: Tensor, *sigmas: Tensor) -> Metrics:
    margin = (mu_w - mu_l).detach()
    found = {"accuracy": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(), "margin": margin.mean()}
    if sigmas:
        found["sigma"] = torch.stack(sigmas).detach().mean()
    return found
