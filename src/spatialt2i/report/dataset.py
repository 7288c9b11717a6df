"""The dataset's figures: what its stage counted, as plots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spatialt2i.core.run import RunDir, read_json
from spatialt2i.report import plots


@dataclass(frozen=True)
class Count:
    """A plot of one of the dataset's counts.

    Attributes:
        key: in the statistics. title: above the plot. about: below it.
        x_label: of upright bars; empty draws them sideways, for labels that are words.
        width: numbers are counted in bins of this width.
    """

    key: str
    title: str
    about: str
    x_label: str = ""
    width: int = 1


COUNTS = (
    Count("funnel", "What became of the pairs", "Written, perturbed, why some were dropped, and what was kept."),
    Count("relations_per_prompt", "Relations per prompt", "Pairs by the number of relations of their prompt.",
          "relations"),
    Count("words_per_prompt", "Prompt length", "Pairs by the number of words of their prompt.", "words", width=5),
    Count("scenes", "Scenes", "Pairs by the place of their prompt; the most frequent ones."),
    Count("words", "Words", "The most frequent words of the prompts."),
    Count("predicates", "Predicates", "Relations of the prompts by predicate; the most frequent ones."),
    Count("objects_per_prompt", "Objects per prompt", "Pairs by the number of objects of their prompt.", "objects"),
    Count("edits", "Edits", "Changed relations by kind, without those that follow from another edit."),
    Count("perturbations", "Edits per pair", "Pairs by the number of edits.", "edits"),
)
MOST = 15  # bars of a plot whose labels are words


def dataset_plots(run: RunDir) -> list[dict[str, Any]]:
    """The plots for which the dataset's statistics have counts, each as title, about and svg."""
    path = run.path / "data" / "statistics.json"
    stats = read_json(path) if path.exists() else {}
    drawn = []
    for wanted in COUNTS:
        found = stats.get(wanted.key) or {}
        counts, about = found.get("histogram", found), wanted.about
        if "histogram" in found and found["mean"] is not None:
            about += f" Mean {found['mean']:.4g}."
        if counts:
            drawn.append({"title": wanted.title, "about": about, "svg": _plot(wanted, counts)})
    return drawn


def binned(counts: dict[str, int], width: int) -> dict[str, int]:
    """Counts of numbers in bins of ``width``, smallest number first, without gaps.

    Args:
        counts: number, as JSON writes it in a key, -> how often.
    """
    numbers = {int(number): count for number, count in counts.items()}
    first, last = min(numbers) // width, max(numbers) // width
    bins = {i: 0 for i in range(first, last + 1)}
    for number, count in numbers.items():
        bins[number // width] += count
    return {str(i) if width == 1 else f"{i * width}–{(i + 1) * width - 1}": count for i, count in bins.items()}


def _plot(wanted: Count, counts: dict[str, int]) -> Any:
    if wanted.x_label:
        shown = binned(counts, wanted.width)
    elif wanted.key == "funnel":
        shown = counts
    else:
        shown = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST])
    top = max(shown, key=lambda label: shown[label])
    alt = f"{wanted.title}. {wanted.about} Most: {top} with {shown[top]:,}."
    return plots.bars(f"data-{wanted.key}", list(shown), list(shown.values()), alt=alt, x_label=wanted.x_label,
                      sideways=not wanted.x_label)
