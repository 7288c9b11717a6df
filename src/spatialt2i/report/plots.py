"""Plots as SVG text to put inside a page: deterministic, their text is text, and the page's theme colours them."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK, GRID = "#010203", "#010204"  # stand-ins: in the page they become the theme's colours
SERIES = ("#010a01", "#010a02", "#010a03", "#010a04", "#010a05", "#010a06")
_THEME = {INK: "currentColor", GRID: "var(--line)"} | {c: f"var(--s{i})" for i, c in enumerate(SERIES, 1)}
_ROUND = [1, 2, 2.5, 5, 10]  # what ticks may be multiples of
_STYLE = {
    "svg.fonttype": "none", "font.size": 9, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": GRID, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False, "legend.fontsize": 8.5,
}


@dataclass(frozen=True)
class Line:
    """One curve. ``y`` may hold NaN for "not measured": the curve has a gap there.

    Attributes:
        label: in the legend; empty where the plot has one curve.
        x, y: the points. low, high: a band around them, or empty.
        strong: False draws it thin and pale, as something behind the others.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())
    strong: bool = True


@dataclass(frozen=True)
class Interval:
    """A share with the ends of its 95% interval; NaN where not known."""

    value: float
    lo: float
    hi: float


@matplotlib.rc_context(_STYLE)
def lines(name: str, curves: Sequence[Line], *, alt: str, x_label: str,
          percent: bool = False, from_zero: bool = False) -> Markup:
    """Curves over steps as SVG; see `_svg` for ``name`` and ``alt``.

    Args:
        curves: at most six; pale ones take the colour of the strong curve after them.
        x_label: what the x axis is.
        percent: y is a share and is written in per cent.
        from_zero: the y axis starts at 0.
    """
    figure, axes = _axes(4.6, 2.5)
    colour = 0
    for curve in curves:
        paint = SERIES[colour % len(SERIES)]
        axes.plot(curve.x, curve.y, color=paint, linewidth=1.8 if curve.strong else 0.8,
                  alpha=None if curve.strong else 0.45, label=curve.label or None,
                  marker="o" if sum(map(math.isfinite, curve.y)) < 25 and curve.strong else None, markersize=3)
        if len(curve.low):
            axes.fill_between(curve.x, curve.low, curve.high, color=paint, alpha=0.15, linewidth=0)
        colour += curve.strong
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=_ROUND))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_ROUND))
    axes.set_xlabel(x_label)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    if from_zero:
        axes.set_ylim(bottom=0)
    if any(curve.label for curve in curves):
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, borderaxespad=0.1, handlelength=0.9,
                    handletextpad=0.5, columnspacing=1.1)
    return _svg(name, figure, alt)


@matplotlib.rc_context(_STYLE)
def bars(name: str, labels: Sequence[str], values: Sequence[float], *, alt: str, x_label: str = "",
         sideways: bool = False) -> Markup:
    """Bars of counts as SVG, upright, or sideways where the labels are words. See `_svg` for ``name`` and ``alt``."""
    if sideways:
        figure, axes = _axes(4.6, 0.55 + 0.23 * len(labels))
        drawn = axes.barh(range(len(labels)), values, color=SERIES[0], height=0.7)
        axes.bar_label(drawn, fmt=lambda v: f"{v:,.0f}", padding=3, fontsize=8.5, color=INK)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.grid(False)
        axes.margins(x=0.16, y=0.01)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
    else:
        figure, axes = _axes(4.6, 2.3)
        axes.bar(range(len(labels)), values, color=SERIES[0], width=0.8)
        every = math.ceil(len(labels) / 12)
        axes.set_xticks(range(0, len(labels), every), labels[::every])
        axes.grid(False, axis="x")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=_ROUND))
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
        axes.set_xlabel(x_label)
    return _svg(name, figure, alt)


@matplotlib.rc_context(_STYLE)
def forest(name: str, rows: Sequence[tuple[str, Sequence[Interval]]], *, series: Sequence[str], alt: str) -> Markup:
    """Shares with their intervals, one row per label and one colour per series, as SVG. See `_svg` for the rest."""
    figure, axes = _axes(4.6, 0.75 + 0.26 * len(rows))
    for i, label in enumerate(series):
        offset = (i - (len(series) - 1) / 2) * 0.3
        y = [row + offset for row in range(len(rows))]
        found = [intervals[i] for _, intervals in rows]
        axes.hlines(y, [f.lo for f in found], [f.hi for f in found], color=SERIES[i], linewidth=1.6)
        axes.plot([f.value for f in found], y, "o", color=SERIES[i], markersize=4.5, label=label)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(series) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=len(series), borderaxespad=0.1,
                    handlelength=1.0)
    return _svg(name, figure, alt)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that size in inches and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(name: str, figure: Figure, alt: str) -> Markup:
    """A figure as an ``<svg>`` element without size, namespaces, metadata or ids that another plot may have.

    Args:
        name: unique in the page.
        alt: what a reader who does not see the plot is told.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True,
                       metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    box = re.search(r'viewBox="([^"]*)"', text)[1]
    body = text[text.index(">", text.index("<svg")) + 1:]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # it would hold for the whole page
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="|url\()#', rf"\1#{name}-", body)
    for stand_in, colour in _THEME.items():
        body = body.replace(stand_in, colour)
    return Markup(f'<svg class="plot" role="img" aria-label="{escape(alt)}" viewBox="{box}">{body.strip()}')
