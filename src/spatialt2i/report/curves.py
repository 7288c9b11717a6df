"""The curves of a run: what each training stage logged, as plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from spatialt2i.report import plots

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Plot:
    """A plot of some metrics.

    Attributes:
        title: above it. about: below it, in a sentence.
        curves: (metric, label) of each curve; metrics that were not logged are left out.
        spread: metric that is drawn as a band of +- around the first curve.
        percent: the metrics are shares. from_zero: the y axis starts at 0.
    """

    title: str
    about: str
    curves: tuple[tuple[str, str], ...]
    spread: str = ""
    percent: bool = False
    from_zero: bool = False


REWARD_PLOTS = (
    Plot("Loss", "Bradley-Terry loss on training pairs; bold is a running mean.", (("loss", ""),)),
    Plot("Accuracy", "Share of pairs in which the chosen image scores higher.",
         (("accuracy", "training"), ("validation/overall", "held out"), ("validation/one", "one change"),
          ("validation/two_three", "two or three")), percent=True),
    Plot("Margin", "Score of the chosen minus score of the rejected image, and the stated standard deviation.",
         (("margin", "margin"), ("sigma", "std"))),
    Plot("Gradient norm", "Before clipping.", (("grad_norm", ""),), from_zero=True),
)
RL_PLOTS = (
    Plot("Reward", "SpatialScore of the rollouts: mean with one standard deviation, and the best of each step.",
         (("reward_mean", "mean"), ("reward_max", "best")), spread="reward_std"),
    Plot("Dropped groups", "Share of prompts whose pictures all scored the same, or could not be judged.",
         (("dropped_groups", "dropped groups"), ("not_judged", "pictures not judged")), percent=True, from_zero=True),
    Plot("KL to the base model", "Of the trained denoising steps.", (("kl", ""),), from_zero=True),
    Plot("Clip share", "Share of trained steps in which the clip stops the gradient.", (("clip_share", ""),),
         percent=True, from_zero=True),
    Plot("Gradient norm", "Before clipping.", (("grad_norm", ""),), from_zero=True),
    Plot("Largest log ratio", "Between the rollout and its replay, in absolute value: 0 where both agree exactly.",
         (("max_log_ratio", ""),), from_zero=True),
    Plot("Seconds per step", "Where the time of an RL step goes.",
         (("seconds_sample", "sample"), ("seconds_decode", "decode"), ("seconds_score", "score"),
          ("seconds_update", "update")), from_zero=True),
)


def draw(stage: str, rows: Rows, wanted: Sequence[Plot]) -> list[dict[str, str | Markup]]:
    """The plots for which something was logged, each as title, about and svg.

    Args:
        stage: names the plots. rows: of `RunDir.metrics`. wanted: what to draw.
    """
    drawn = []
    for number, plot in enumerate(wanted):
        curves: list[plots.Line] = []
        for metric, label in plot.curves:
            x, y = series(rows, metric)
            if any(map(math.isfinite, y)):
                curves += _curve(x, y, label, series(rows, plot.spread)[1] if plot.spread and not curves else [])
        if curves:
            alt = f"{plot.title} over {len(rows)} logged steps. {plot.about} {_ends(curves)}"
            svg = plots.lines(f"{stage}-{number}", curves, alt=alt, x_label="step", percent=plot.percent,
                              from_zero=plot.from_zero)
            drawn.append({"title": plot.title, "about": plot.about, "svg": svg})
    return drawn


def series(rows: Rows, metric: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, of the rows that have it; NaN where it was not measured."""
    having = [row for row in rows if metric in row]
    return ([row["step"] for row in having],
            [math.nan if row[metric] is None else float(row[metric]) for row in having])


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last ``width`` values, without those that are NaN; NaN where there are none."""
    means = []
    for end in range(1, len(values) + 1):
        known = [v for v in values[max(end - width, 0):end] if math.isfinite(v)]
        means.append(math.fsum(known) / len(known) if known else math.nan)
    return means


def _curve(x: list[float], y: list[float], label: str, spread: list[float]) -> list[plots.Line]:
    """One metric as lines: a short one as it is, a long one pale under its running mean."""
    low = [v - s for v, s in zip(y, spread, strict=True)] if spread else ()
    high = [v + s for v, s in zip(y, spread, strict=True)] if spread else ()
    if len(y) < 200:
        return [plots.Line(label, x, y, low, high)]
    return [plots.Line("", x, y, low, high, strong=False), plots.Line(label, x, running_mean(y, len(y) // 40))]


def _ends(curves: Sequence[plots.Line]) -> str:
    """First and last values, for those who do not see the plot."""
    texts = []
    for curve in curves:
        known = [v for v in curve.y if math.isfinite(v)]
        if curve.strong and known:
            texts.append(f"{curve.label or 'It'} goes from {known[0]:.4g} to {known[-1]:.4g}.".capitalize())
    return " ".join(texts)
