"""Pairs of a dataset to leaf through, on one page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from spatialt2i.core.run import write_atomic
from spatialt2i.core.store import preference_of
from spatialt2i.core.types import Preference
from spatialt2i.report.gallery import show_pair
from spatialt2i.report.page import environment


def write_inspection(shards: Sequence[Path], out: Path, *, count: int, seed: int, predicate: str | None,
                     edit: str | None) -> dict[str, Any]:
    """Write a page of pairs drawn at random, in the order of the dataset; it asks nothing of the network.

    Args:
        shards: parquet files of a dataset. out: the HTML file. count: at most so many pairs. seed: of the draw.
        predicate, edit: only pairs in which a relation with that predicate was changed, or that kind of edit made.

    Returns:
        ``pairs``, how many are on the page, ``of``, how many could have been, and ``page``.

    Raises:
        ValueError: there are none.
        CorruptData: a pair cannot be read.
    """
    places = [(path, row) for path in shards for row in _matching(path, predicate, edit)]
    if not places:
        asked = [f"{name} {value!r}" for name, value in (("predicate", predicate), ("edit", edit)) if value]
        raise ValueError(f"no pairs{' with ' + ' and '.join(asked) if asked else ''} in {len(shards)} files; "
                         "ask for others, or build a dataset first")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(places))[:count])
    pairs = [show_pair(row) | {"id": row.prompt.id, "generator": row.drawn[0].generator, "scene": row.prompt.scene}
             for row in _read([places[i] for i in chosen])]
    html = environment().get_template("inspect.html").render(pairs=pairs, total=len(places), predicate=predicate,
                                                             edit=edit)
    write_atomic(out, html)
    return {"pairs": len(pairs), "of": len(places), "page": str(out)}


def _matching(path: Path, predicate: str | None, edit: str | None) -> Iterator[int]:
    for i, text in enumerate(pq.read_table(path, columns=["edits"])["edits"].to_pylist()):
        edits = json.loads(text)
        if (predicate is None or any(e["before"]["predicate"] == predicate for e in edits)) and (
                edit is None or any(e["kind"] == edit for e in edits)):
            yield i


def _read(places: Sequence[tuple[Path, int]]) -> Iterator[Preference]:
    for path in dict.fromkeys(path for path, _ in places):
        rows = [row for of, row in places if of == path]
        for number, row in zip(rows, pq.read_table(path).take(rows).to_pylist(), strict=True):
            yield preference_of(row, f"{path}, row {number}")
