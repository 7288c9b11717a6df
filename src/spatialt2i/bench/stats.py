"""Means over prompts with 95% intervals. Prompts are the units that were sampled, so they are what is resampled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

Figure = dict[str, float | int | None]


def mean_interval(values: Sequence[float], *, resamples: int, seed: int) -> Figure:
    """Mean of one value per prompt with a percentile bootstrap interval; NaN says "not judged" and is left out.

    Where all values are equal a bootstrap has no width; a share of 0 or 1 then gets its exact (Clopper-Pearson)
    interval instead.

    Args:
        values: one per prompt.
        resamples: of the bootstrap.
        seed: of the resampling.

    Returns:
        ``value``, ``lo``, ``hi``, and ``n``, the prompts judged; None where there is nothing to average.
    """
    x = np.asarray(values, dtype=np.float64)
    x = x[~np.isnan(x)]
    if not len(x):
        return {"value": None, "lo": None, "hi": None, "n": 0}
    mean = float(x.mean())
    if np.ptp(x) == 0:
        lo, hi = (mean, mean) if mean not in (0.0, 1.0) else stats.binomtest(
            int(x.sum()), len(x)).proportion_ci(method="exact")
    else:
        lo, hi = stats.bootstrap((x,), np.mean, n_resamples=resamples, method="percentile", vectorized=True,
                                 batch=500, rng=np.random.default_rng(seed)).confidence_interval
    return {"value": mean, "lo": float(lo), "hi": float(hi), "n": len(x)}


def paired_gain(before: Sequence[float], after: Sequence[float], *, resamples: int, seed: int) -> Figure:
    """Mean of ``after - before`` over prompts that are judged in both, with its paired bootstrap interval."""
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return mean_interval(difference, resamples=resamples, seed=seed)
