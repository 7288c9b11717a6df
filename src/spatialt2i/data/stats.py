"""The figures of a set of pairs that the paper shows: scenes, words, prompt lengths, relations, edits."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

COLUMNS = ("prompt", "scene", "relations", "edits", "n_perturbations", "drawn")  # what `describe` reads
_TOP = 60  # most frequent words that are listed


def describe(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of any set of pairs.

    Args:
        rows: dataset rows with `COLUMNS`, in the form in which they are stored.

    Returns:
        JSON-able. ``scenes``, ``words`` (the most frequent ones), ``predicates``, ``edits`` (by kind),
        ``dependent_edits`` and ``perturbations`` are counts; ``words_per_prompt``, ``relations_per_prompt`` and
        ``objects_per_prompt`` have a ``mean`` and a ``histogram``. ``generators`` has the ``pictures`` of each, and
        their ``license`` ("" where it is not known).
    """
    counts = {name: Counter() for name in ("scenes", "words", "predicates", "edits", "perturbations")}
    lengths = {name: Counter() for name in ("words_per_prompt", "relations_per_prompt", "objects_per_prompt")}
    generators: dict[str, dict[str, Any]] = {}
    pairs = dependent = 0
    for row in rows:
        pairs += 1
        relations, edits = json.loads(row["relations"]), json.loads(row["edits"])
        words = re.findall(r"\w+", row["prompt"].lower())
        counts["scenes"][row["scene"]] += 1
        counts["words"].update(words)
        counts["predicates"].update(r["predicate"] for r in relations)
        counts["edits"].update(e["kind"] for e in edits if not e["dependent"])
        counts["perturbations"][str(row["n_perturbations"])] += 1
        for drawn in json.loads(row["drawn"]):
            by = generators.setdefault(drawn["generator"], {
                "pictures": 0, "license": drawn["settings"].get("license", "")})
            by["pictures"] += 1
        dependent += sum(e["dependent"] for e in edits)
        lengths["words_per_prompt"][len(words)] += 1
        lengths["relations_per_prompt"][len(relations)] += 1
        lengths["objects_per_prompt"][len({n for r in relations for n in (r["subject"], *r["objects"])})] += 1
    return {
        "pairs": pairs, **{name: dict(_ranked(found)[:_TOP]) for name, found in counts.items()},
        "generators": dict(sorted(generators.items())), "dependent_edits": dependent,
        **{name: _histogram(found) for name, found in lengths.items()},
    }


def _ranked(found: Counter[str]) -> list[tuple[str, int]]:
    return sorted(found.items(), key=lambda item: (-item[1], item[0]))


def _histogram(found: Counter[int]) -> dict[str, Any]:
    total = sum(found.values())
    mean = round(sum(k * n for k, n in found.items()) / total, 2) if total else None
    return {"mean": mean, "histogram": {str(k): found[k] for k in sorted(found)}}
