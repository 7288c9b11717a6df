"""Pairwise accuracy of any scorer on any preferences."""

from __future__ import annotations

import io
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from spatialt2i.core.types import Preference

if TYPE_CHECKING:
    from spatialt2i.core.protocols import Scorer

_CHUNK = 512  # pairs whose images are decoded at a time


def pairwise_accuracy(*, scorer: Scorer, pairs: Iterable[Preference]) -> dict[str, Any]:
    """How often the chosen image scores higher than the rejected one, both under the perfect prompt.

    A tie counts half. A pair with a NaN score is not judged: it is left out, and shows as missing coverage.

    Args:
        scorer: who scores. pairs: held-out preferences.

    Returns:
        ``one``, ``two_three`` (by number of perturbations) and ``overall``, each with ``value``, the ends ``lo`` and
        ``hi`` of the 95% Wilson interval, and ``n``, the pairs judged; ``ties``, ``pairs`` and ``coverage`` (share of
        pairs judged); ``predicates`` and ``edits``: the same figures by predicate of an edited relation and by kind of
        edit, where a pair with several edits counts under each.
    """
    wins: dict[tuple[str, str], list[float]] = defaultdict(list)
    pairs, ties, total = iter(pairs), 0, 0
    while chunk := list(itertools.islice(pairs, _CHUNK)):
        total += len(chunk)
        for pair, margin in zip(chunk, _margins(scorer, chunk), strict=True):
            if math.isnan(margin):
                continue
            win = 0.5 if margin == 0 else float(margin > 0)
            ties += int(margin == 0)
            edits = [e for e in pair.pair.edits if not e.dependent]
            wins["", "overall"].append(win)
            if n := pair.pair.n_perturbations:
                wins["", "one" if n == 1 else "two_three"].append(win)
            for name in {e.before.predicate for e in edits}:
                wins["predicates", name].append(win)
            for name in {e.kind for e in edits}:
                wins["edits", name].append(win)
    judged = len(wins["", "overall"])
    return {
        **{name: _share(wins["", name]) for name in ("one", "two_three", "overall")},
        "ties": ties, "pairs": total, "coverage": judged / total if total else None,
        **{table: {name: _share(values) for (which, name), values in sorted(wins.items()) if which == table}
           for table in ("predicates", "edits")},
    }


def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion, also for half successes (Wilson, JASA 22:209, 1927).

    Args:
        successes: 0 to n. n: trials, at least 1. z: normal quantile, by default of 95%.
    """
    p, shrink = successes / n, 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / shrink
    reach = z / shrink * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def _share(wins: list[float]) -> dict[str, float | int | None]:
    if not wins:
        return {"value": None, "lo": None, "hi": None, "n": 0}
    lo, hi = wilson(sum(wins), len(wins))
    return {"value": sum(wins) / len(wins), "lo": lo, "hi": hi, "n": len(wins)}


def _margins(scorer: Scorer, pairs: list[Preference]) -> np.ndarray:
    """Score of the chosen minus score of the rejected image, [pairs]."""
    images = [Image.open(io.BytesIO(data)) for data in (*(p.chosen for p in pairs), *(p.rejected for p in pairs))]
    means = scorer.score(images=images, prompts=[p.prompt for p in pairs] * 2).mean
    return means[:len(pairs)] - means[len(pairs):]
