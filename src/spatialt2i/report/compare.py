"""Several runs side by side: reward curves and the time of an update, on one page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spatialt2i.core.config import describe
from spatialt2i.core.run import RunDir, write_atomic
from spatialt2i.report import figures as f, plots
from spatialt2i.report.curves import running_mean, series
from spatialt2i.report.page import environment

LAST = 10  # steps that a final reward is the mean of
OVERLAYS = {  # metric -> title and what it is
    "reward_mean": ("Reward", "Mean SpatialScore of the rollouts of each step."),
    "seconds_update": ("Seconds per update", "Forward and backward passes of the kept images, and the optimiser."),
}


def compare(runs: Sequence[RunDir], out: Path) -> dict[str, Any]:
    """Write a page with the curves of several runs of Spatial-RL over each other.

    Args:
        runs: two to six, with ``rl/metrics.jsonl`` and folders of different names.
        out: the HTML file.

    Returns:
        Per run, by its folder's name: ``settings``, those that differ between the runs; ``steps``; ``reward``, the mean
        of the last `LAST` steps; ``seconds_update``, the median of its steps; ``update_share``, that time as a share of
        the slowest run's; and ``gain_all`` of both evaluation sets where they were evaluated.

    Raises:
        ValueError: too few or too many runs, a name twice, or a run without steps of Spatial-RL.
    """
    names = [run.path.resolve().name for run in runs]
    if not 2 <= len(runs) <= len(plots.SERIES) or len(set(names)) < len(names):
        raise ValueError(f"runs to compare: {', '.join(names) or 'none'}; expected two to {len(plots.SERIES)} folders "
                         "of different names")
    metrics = {name: run.metrics("rl") for name, run in zip(names, runs, strict=True)}
    for run, name in zip(runs, names, strict=True):
        if not metrics[name]:
            raise ValueError(f"{run.path}: no step of Spatial-RL yet; run `spatialt2i rl train --run {run.path}`")
    settings = differing(runs)
    found = {}
    for run, name, changed in zip(runs, names, settings, strict=True):
        rl = f.collect(run).get("rl")
        found[name] = {"settings": changed, "steps": len(metrics[name]),
                       "reward": _known(statistics.fmean, series(metrics[name], "reward_mean")[1][-LAST:]),
                       "seconds_update": _known(statistics.median, series(metrics[name], "seconds_update")[1]),
                       "gain_all": {name: rl[name]["gain_all"] for name in f.SETS} if rl else None}
    slowest = max((row["seconds_update"] or 0.0 for row in found.values()))
    for row in found.values():
        row["update_share"] = row["seconds_update"] / slowest if row["seconds_update"] and slowest else None
    context = {"runs": found, "sets": f.SETS, "drawn": [_overlay(metric, metrics) for metric in OVERLAYS]}
    write_atomic(out, environment().get_template("compare.html").render(context))
    return found


def differing(runs: Sequence[RunDir]) -> list[dict[str, str]]:
    """Per run the settings, key -> value, that are not the same in all of them."""
    rows = zip(*(describe(run.config) for run in runs), strict=True)
    differ = [same_key for same_key in rows if len({row.value for row in same_key}) > 1]
    return [{same_key[i].key: same_key[i].value for same_key in differ} for i in range(len(runs))]


def _overlay(metric: str, metrics: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One metric of all runs: pale as logged, strong as a running mean."""
    title, about = OVERLAYS[metric]
    curves = []
    for name, rows in metrics.items():
        x, y = series(rows, metric)
        curves += [plots.Line("", x, y, strong=False), plots.Line(name, x, running_mean(y, max(len(y) // 15, 1)))]
    svg = plots.lines(metric, curves, alt=f"{title} of {', '.join(metrics)} over steps.", x_label="step",
                      from_zero=metric.startswith("seconds"))
    return {"title": title, "about": f"{about} Bold is a running mean.", "svg": svg}


def _known(summary: Any, values: Sequence[float]) -> float | None:
    """A summary of the values that were measured, or None where none was."""
    known = [v for v in values if math.isfinite(v)]
    return summary(known) if known else None
