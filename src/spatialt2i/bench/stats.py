"""Means over prompts with 95% intervals. Prompts are the units that were sampled, so they are what is resampled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

Figure = dict[str, float | int | None]


def mean_interval(values: Sequence[float], *, resamples: int, seed: int) -> Figure:
    """Mean of one value per prompt with a percentile bootstrap interval; NaN says "not judged" and is left out.

    Where all values are 0 or all are 1 a bootstrap has no width; they get their exact (Clopper-Pearson) interval.

    Args:
        values: one per prompt.
        resamples: of the bootstrap.
        seed: of the resampling.

    Returns:
        ``value``, ``lo``, ``hi``, and ``n``, the prompts judged; None where there is nothing to average.
    """
    x = np.asarray(values, dtype=np.float64)
    x = x[~np.isnan(x)]
    if len(x) and np.ptp(x) == 0 and x[0] in (0.0, 1.0):
        lo, hi = stats.binomtest(int(x.sum()), len(x)).proportion_ci(method="exact")
        return {"value": float(x[0]), "lo": float(lo), "hi": float(hi), "n": len(x)}
    return _bootstrap(x, resamples, seed)


def paired_gain(before: Sequence[float], after: Sequence[float], *, resamples: int, seed: int) -> Figure:
    """Mean of ``after - before`` over prompts that are judged in both, with its paired bootstrap interval."""
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return _bootstrap(difference[~np.isnan(difference)], resamples, seed)


def _bootstrap(x: np.ndarray, resamples: int, seed: int) -> Figure:
    if not len(x):
        return {"value": None, "lo": None, "hi": None, "n": 0}
    mean = float(x.mean())
    if np.ptp(x) == 0:
        return {"value": mean, "lo": mean, "hi": mean, "n": len(x)}
    found = stats.bootstrap((x,), np.mean, n_resamples=resamples, method="percentile", vectorized=True, batch=500,
                            rng=np.random.default_rng(seed)).confidence_interval
    return {"value": mean, "lo": float(found.low), "hi": float(found.high), "n": len(x)}
