"""Preference sets of others as preferences: they know which of two pictures people chose, and no relations.

Formats: Pick-a-Pic's parquet files (arXiv 2305.01569) and HPSv3's JSON lists (arXiv 2508.03789).
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from spatialt2i.core.config import DataConfig
from spatialt2i.core.run import progress, write_json
from spatialt2i.core.store import CorruptData, decode
from spatialt2i.core.types import Drawn, Pair, Preference, Prompt, Verdict
from spatialt2i.data.dataset import SPLITS, rows_of, split_of, write_card, write_splits
from spatialt2i.data.shard import text_key
from spatialt2i.data.stages import KEPT
from spatialt2i.data.stats import COLUMNS, describe

_PICK = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
NO_CHOICE = "no choice"  # a tie, or nobody was asked


def import_preferences(source: Path, *, format: str, config: DataConfig, folder: Path) -> dict[str, Any]:
    """Make a dataset of somebody's preferences; all pairs of a text go to one split.

    Args:
        source: a parquet file or a folder of them (Pick-a-Pic), a JSON file beside its pictures (HPSv3).
        format: one of `FORMATS`. config: the shares of the splits, and pairs per file. folder: where it goes.

    Returns:
        ``imported``, the format, ``counts`` (what was there, why some are left out, and the pairs of each split), and
        ``statistics``.

    Raises:
        ValueError: the source is of another format, or empty.
        CorruptData: a picture cannot be read.
        DiskFull: no space left.
    """
    counts: Counter[str] = Counter()
    given = FORMATS[format](source)
    first = next(given, None)
    if first is None:
        raise ValueError(f"{source}: no preferences in it")

    def placed() -> Iterator[tuple[str, Preference]]:
        for row in progress(itertools.chain([first], given), desc=f"import {format}"):
            counts["written"] += 1
            if isinstance(row, str):
                counts[row] += 1
                continue
            name = split_of(text_key(row.prompt.text), config)
            counts.update([KEPT, name])
            yield name, row

    write_splits(placed(), folder=folder / "data", rows=config.shard)
    counts.update({name: 0 for name in (KEPT, *SPLITS)})
    statistics = describe(rows_of(folder / "data", COLUMNS))
    statistics["funnel"] = {name: n for name, n in counts.items() if name not in SPLITS}
    write_json(folder / "statistics.json", statistics)
    write_card(folder, counts=counts, statistics=statistics, about=(
        f"Preferences of {format}: of two images of a prompt, people chose `chosen`. They know of no relations."))
    return {"imported": format, "counts": dict(counts), "statistics": statistics}


def pick_a_pic(source: Path) -> Iterator[Preference | str]:
    """The rows of Pick-a-Pic's parquet files; why there is no preference where there is none."""
    for path in sorted(source.glob("**/*.parquet")) if source.is_dir() else [source]:
        name = str(path.relative_to(source).with_suffix("") if source.is_dir() else path.stem).replace(os.sep, "-")
        with pq.ParquetFile(path) as file:
            if missing := [name for name in _PICK if name not in file.schema_arrow.names]:
                raise ValueError(f"{path}: not of Pick-a-Pic, the columns {', '.join(missing)} are missing")
            number = 0
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    yield _picked(row, f"{name}-{number}", f"{path}, row {number}")
                    number += 1


def _picked(row: dict[str, Any], id: str, where: str) -> Preference | str:
    labels = row["label_0"], row["label_1"]
    if not row.get("has_label", True) or set(labels) != {0.0, 1.0}:
        return NO_CHOICE
    best = labels.index(1.0)
    sides = [(_whole(row[f"jpg_{i}"], f"{where}, jpg_{i}"), row.get(f"model_{i}") or "unknown")
             for i in (best, 1 - best)]
    return _preference(id, row["caption"], sides, "pick-a-pic", {})


def hpsv3(source: Path) -> Iterator[Preference | str]:
    """The rows of a JSON list of HPSv3, whose first picture is the one that people chose."""
    try:
        rows = json.loads(source.read_text(encoding="utf-8"))
        read = [(row["prompt"], (row["path1"], row["path2"]), row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: not of HPSv3 ({error!r}); expected a JSON list of objects with prompt, path1 and "
                         "path2") from error
    for number, (text, paths, row) in enumerate(read):
        sides = []
        for i, path in enumerate(paths, 1):
            try:
                data = (source.parent / path).read_bytes()
            except FileNotFoundError as error:
                raise CorruptData(f"{source}, row {number}: there is no picture {source.parent / path}") from error
            sides.append((_whole(data, str(source.parent / path)), row.get(f"model{i}") or "unknown"))
        seen = {name: row[name] for name in ("confidence", "choice_dist") if name in row}
        yield _preference(f"{source.stem}-{number}", text, sides, "hpsv3", seen)


def _preference(id: str, text: str, sides: list[tuple[bytes, str]], judge: str, evidence: dict[str, Any]) -> Preference:
    verdict = Verdict(None, (), (), None, judge, evidence)  # people said which is better, not which is right
    pair = Pair(Prompt(id, text, "", ()), Prompt(f"{id}*", text, "", ()), ())
    (chosen, best), (rejected, other) = sides
    return Preference(pair, chosen, rejected, (Drawn(best, None), Drawn(other, None)), (verdict, verdict))


def _whole(data: bytes | None, where: str) -> bytes:
    try:
        decode(data or b"")
    except ValueError as error:
        raise CorruptData(f"{where}: {error}; fetch it again") from error
    return data


FORMATS: dict[str, Callable[[Path], Iterator[Preference | str]]] = {"pick-a-pic": pick_a_pic, "hpsv3": hpsv3}
