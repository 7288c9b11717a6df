"""Who is trained on, and how much: the paper's top-k filter and group-normalised advantages. Pure functions.

A NaN reward says "not judged": such a picture is left out of its group. A NaN advantage says "not trained on".
Axes: P prompts, G images per prompt, K kept images.
"""

from __future__ import annotations

import torch
from torch import Tensor

STD_FLOOR = 1e-4  # added to the std, so that rewards that differ only by rounding stay small [Flow-GRPO]


class RewardError(ValueError):
    """Rewards that cannot be trained on."""


def select_extremes(rewards: Tensor, *, k: int) -> Tensor:
    """The k worst and the k best images of each group (the paper's top-k filtering).

    Ties are ordered by position in the group, so the choice is a function of the rewards alone. A group with at most
    2k judged images keeps them all; one with fewer than two keeps none.

    Args:
        rewards: [P, G], NaN where not judged.
        k: how many of each end; 0 keeps every judged image.

    Returns:
        int64 [P, K], K = min(2k, G) (G if k is 0): positions in the group from worst to best, then -1 as padding.

    Raises:
        RewardError: a reward is infinite.
    """
    if rewards.isinf().any():
        p, g = rewards.isinf().nonzero()[0].tolist()
        raise RewardError(f"reward of prompt {p}, image {g} is {rewards[p, g].item()}, expected a finite number or NaN "
                          "for 'not judged'; look for an overflow in the scorer")
    group = rewards.shape[1]
    width = min(2 * k, group) if k else group
    order = torch.where(rewards.isnan(), torch.inf, rewards).argsort(dim=1, stable=True)  # [P, G], not judged last
    judged = (~rewards.isnan()).sum(1, keepdim=True)  # [P, 1]
    kept = judged.clamp(max=width)
    place = torch.arange(width, device=rewards.device).expand(len(rewards), -1)  # [P, K]
    # The first half counts from the worst, the rest ends at the best judged image.
    place = torch.where(place < kept // 2, place, place + judged - kept)
    index = order.gather(1, place.clamp(max=group - 1))
    dropped = (torch.arange(width, device=rewards.device) >= kept) | (judged < 2)
    return index.masked_fill(dropped, -1)


def normalize(rewards: Tensor, kept: Tensor, *, over: str, clip: float, global_std: bool = False) -> Tensor:
    """Advantages of the kept images: (reward - mean) / (std + 1e-4), clamped. The mean is each group's own.

    Args:
        rewards: [P, G], NaN where not judged.
        kept: int64 [P, K] from `select_extremes`.
        over: "kept" takes mean and std over the kept images (the paper's figure), "group" over all judged ones.
        clip: advantages are clamped to +- this.
        global_std: one std for all groups, the root of the mean of their variances: a group whose images hardly differ
            then weighs little, where its own std would blow up what are mostly errors of the score. (Flow-GRPO's
            ``global_std`` also counts how far the means of prompts are apart.)

    Returns:
        [P, K], NaN at padding and in groups whose rewards are all equal: they say nothing, and an advantage of 0 would
        leave them to the KL term alone.
    """
    chosen = rewards.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, torch.nan)  # [P, K]
    base = {"kept": chosen, "group": rewards}[over]
    mean = base.nanmean(1, keepdim=True)  # [P, 1]
    variance = (base - mean).square().nanmean(1, keepdim=True)  # of the population, as in Flow-GRPO
    std = (variance.nanmean() if global_std else variance).sqrt()  # [] or [P, 1]
    low, high = base.nan_to_num(nan=torch.inf).amin(1), base.nan_to_num(nan=-torch.inf).amax(1)  # [P]
    advantages = ((chosen - mean) / (std + STD_FLOOR)).clamp(-clip, clip)
    return advantages.masked_fill((high <= low)[:, None], torch.nan)
