"""The terms of the RL loss. Pure functions of B transitions; everything returned is per transition.

Nothing is reduced here: a mean over a micro-batch would weigh the last, smaller one too much.
"""

from __future__ import annotations

import torch
from torch import Tensor


def policy_loss(*, log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor,
                clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped-ratio loss: max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)) (PPO, GRPO).

    In a step's first update the ratio is 1 in value, up to the rounding that the gate bounds, and carries only the
    gradient. `train` does one update per rollout, so there the clip bounds that rounding and no more.

    Args:
        log_prob: [B], under the current weights, with gradient.
        old_log_prob: [B], from the rollout. NaN where drawing did not compute it: then it is the current one, which is
            exact as long as each rollout is used for one update, and says nothing about the ratio.
        advantage: [B].
        clip: half-width of the trust region.

    Returns:
        loss [B]; metrics without gradient: log_ratio [B], ratio [B], clipped [B] (1 where the clip stops the gradient);
        NaN where there was no old log-prob.
    """
    unknown = old_log_prob.isnan()
    log_ratio = log_prob - torch.where(unknown, log_prob.detach(), old_log_prob)
    ratio = log_ratio.exp()
    free, bounded = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    metrics = {"log_ratio": log_ratio, "ratio": ratio, "clipped": (bounded > free).float()}
    return free.maximum(bounded), {k: v.detach().masked_fill(unknown, torch.nan) for k, v in metrics.items()}


def kl_loss(*, mean: Tensor, reference: Tensor, level: Tensor) -> Tensor:
    """KL of two transitions of equal std, as the mean over latent elements: mean((m - m_ref)^2) / (2 level^2).

    Args:
        mean: [B, S, C], with gradient.
        reference: [B, S, C], the base model's.
        level: [B]. Flow-GRPO takes the kernel's s without sqrt(-dt) (`sde.noise_level`). With the true std of the
            transition it is the exact KL, 1 / |dt| times as strong for the SDE kernels: lower the weight to match.

    Returns:
        [B].
    """
    return (mean - reference).square().mean((1, 2)) / (2 * level**2)
