"""Prompts and their perturbations as files of JSON lines, written one after another and continued where they end."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spatialt2i.core.config import DataConfig
from spatialt2i.core.protocols import Writer
from spatialt2i.core.run import RunError, progress
from spatialt2i.core.store import append_jsonl, read_jsonl
from spatialt2i.core.types import Prompt
from spatialt2i.data.duplicates import near_duplicates
from spatialt2i.data.stages import perturb_prompts, write_prompts

if TYPE_CHECKING:
    from spatialt2i.data.endpoint import Bill

log = logging.getLogger(__name__)
_CHUNK = 250  # rows written at a time, which is what a killed process may lose
_EXAMPLES = 20


def write_prompt_file(writer: Writer, *, config: DataConfig, seed: int, path: Path) -> dict[str, Any]:
    """``config.pairs`` prompts, one JSON object a line: id, text, scene, relations. No two have the same text.

    A file that is there already is continued. Where the writer costs money, the log says after the first rows what all
    will cost.

    Returns:
        ``prompts``, ``relations_distance`` (total variation between the numbers of relations and ``config.relations``),
        ``words`` (``min``, ``mode``, ``mean``, ``max`` per prompt), ``near_duplicates`` (the share of texts that nearly
        repeat an earlier one), ``scenes``, ``examples``, some texts, and ``dropped``, how often what the writer gave
        was of no use, by kind, in this call; where it costs money also ``bill`` and ``estimate``.

    Raises:
        RunError: the file was written with other settings, or is longer.
        DiskFull: no space left; what is written stays.
    """
    taken: set[str] = set()
    dropped: Counter[str] = Counter()

    def rows(indices: range) -> list[dict[str, Any]]:
        prompts, drops = write_prompts(writer, indices=indices, config=config, seed=seed, taken=taken)
        dropped.update(drops)
        return [p.to_json() for p in prompts]

    written, cost = _extend(path, config.pairs, rows, writer.bill, desc="prompts",
                            seen=lambda row: taken.add(row["text"]))
    return _describe([Prompt.from_json(row) for row in written], config.relations) | {"dropped": dict(dropped)} | cost


def write_pair_file(writer: Writer, prompts: Path, *, config: DataConfig, seed: int, path: Path) -> dict[str, Any]:
    """For each prompt of a file a line: ``perfect``, ``perturbed`` and ``edits``.

    The last two are null where there are no edits, and ``why`` tells why. For the rest see `write_prompt_file`.

    Returns:
        ``pairs``, the prompts without edits by why, ``edits`` by kind, ``dependent_edits``, and
        ``perturbations`` by number; where it costs money also ``bill`` and ``estimate``.

    Raises:
        RunError: the file was written with other settings, or of other prompts, or is longer.
        CorruptData: ``prompts`` is damaged.
        ValueError: it is empty, or its prompts are another writer's.
        DiskFull: no space left; what is written stays.
    """
    given = [Prompt.from_json(row) for row in read_jsonl(prompts)]
    if not given:
        raise ValueError(f"{prompts}: no prompts in it, expected a file that `data prompts` wrote")

    def rows(indices: range) -> list[dict[str, Any]]:
        part = given[indices.start:indices.stop]
        found = perturb_prompts(writer, part, config=config, seed=seed)
        return [{"perfect": prompt.to_json(), "perturbed": None, "edits": None, "why": pair} if isinstance(pair, str)
                else pair.to_json() for prompt, pair in zip(part, found, strict=True)]

    every, cost = _extend(path, len(given), rows, writer.bill, desc="perturbed prompts")
    written = [row for row in every if row["edits"] is not None]
    edits = [edit for row in written for edit in row["edits"]]
    asked = [sum(not e["dependent"] for e in row["edits"]) for row in written]
    return {"pairs": len(written), **Counter(row["why"] for row in every if row["edits"] is None),
            "edits": dict(Counter(e["kind"] for e in edits if not e["dependent"]).most_common()),
            "dependent_edits": sum(e["dependent"] for e in edits),
            "perturbations": {str(n): k for n, k in sorted(Counter(asked).items())}, **cost}


def _extend(path: Path, total: int, rows: Callable[[range], list[dict[str, Any]]], bill: Callable[[], Bill] | None, *,
            desc: str, seen: Callable[[dict[str, Any]], None] = lambda row: None,
            ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The ``total`` rows of a file, those that are missing added to it, and what they cost."""
    found = list(read_jsonl(path)) if path.exists() else []
    elsewhere = "name another file with --out, or delete this one"
    if len(found) > total:
        raise RunError(f"{path}: has {len(found)} lines already, {total} are asked for; {elsewhere}")
    first = found[:_CHUNK]
    if rows(range(len(first))) != first:
        raise RunError(f"{path}: was written with other settings; {elsewhere}")
    for row in found:
        seen(row)
    estimate: dict[str, float] = {}
    with progress(total, desc=desc, initial=len(found)) as bar:
        while len(found) < total:
            new = rows(range(len(found), min(len(found) + _CHUNK, total)))
            append_jsonl(path, *new)
            found += new
            bar.update(len(new))
            if bill and not estimate:
                estimate = _projected(bill(), total / len(found))
                log.info("%s: %d cost %.4g so far; all %d will take about %d requests, %d tokens read, %d written, and "
                         "cost %.4g", path, len(found), bill().price, total, estimate["requests"],
                         estimate["tokens_in"], estimate["tokens_out"], estimate["price"])
    return found, {"bill": asdict(bill()), "estimate": estimate} if bill else {}


def _projected(bill: Bill, times: float) -> dict[str, float]:
    """What more of the same costs."""
    return {"requests": round(bill.requests * times), "tokens_in": round(bill.tokens_in * times),
            "tokens_out": round(bill.tokens_out * times), "price": bill.price * times}


def _describe(prompts: Sequence[Prompt], relations: Sequence[float]) -> dict[str, Any]:
    words = np.array([len(p.text.split()) for p in prompts])
    wanted = np.array(relations) / sum(relations)
    counts = np.bincount([len(p.relations) for p in prompts], minlength=len(wanted) + 1)[1:] / len(prompts)
    picked = np.random.default_rng(0).permutation(len(prompts))[:_EXAMPLES]
    repeated = near_duplicates([p.text for p in prompts])
    return {"prompts": len(prompts), "relations_distance": float(np.abs(counts - wanted).sum() / 2),
            "words": {"min": int(words.min()), "mode": int(np.bincount(words).argmax()),
                      "mean": round(float(words.mean()), 1), "max": int(words.max())},
            "near_duplicates": len(repeated) / len(prompts),
            "scenes": dict(Counter(p.scene for p in prompts).most_common()),
            "examples": [prompts[i].text for i in picked]}
