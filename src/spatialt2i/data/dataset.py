"""From shards to the dataset: splits that share no scene, parquet files, and the card that `load_dataset` reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from spatialt2i.core.config import DataConfig
from spatialt2i.core.run import progress, write_atomic
from spatialt2i.core.store import write_preferences
from spatialt2i.core.types import Preference
from spatialt2i.data.shard import Shard, preferences
from spatialt2i.data.stages import KEPT

SPLITS = ("train", "validation", "test")
_FILE_BYTES = 2**28  # of pictures
_SPAN = 2**63  # scene keys are uniform below it


def plan(shards: Sequence[Sequence[Sequence[int] | None]], *, config: DataConfig,
         exclude: frozenset[int]) -> tuple[list[list[str | None]], Counter[str]]:
    """Which split each pair of each shard goes to.

    All pairs with the same place and objects go to one split, whatever else is in the dataset: so no text, no scene and
    no list of relations is in two splits. Of equal texts the first stays.

    Args:
        shards: the pairs of each, as keys of the scene and of both texts, or None for a pair that is not kept.
        config: the shares of the splits.
        exclude: keys of texts that must not appear, as either prompt of a pair.

    Returns:
        A split's name, or None for a pair that is left out, per pair of each shard; and how many of those to be kept
        were left out, and why.
    """
    seen: set[int] = set()
    dropped: Counter[str] = Counter()
    splits: list[list[str | None]] = []
    for rows in shards:
        splits.append([])
        for row in rows:
            if row is None:
                splits[-1].append(None)
                continue
            scene, perfect, perturbed = row
            why = ("in an evaluation set" if exclude & {perfect, perturbed} else
                   "text written before" if perfect in seen else None)
            dropped.update([why] if why else [])
            seen.add(perfect)
            splits[-1].append(None if why else split_of(scene, config))
    return splits, dropped


def split_of(key: int, config: DataConfig) -> str:
    """The split of whatever has that hash."""
    at = key / _SPAN
    return "test" if at < config.test else "validation" if at < config.test + config.validation else "train"


def assemble(shards: Sequence[Shard], splits: Sequence[Sequence[str | None]], *, folder: Path,
             rows: int) -> dict[str, str]:
    """Write the splits as parquet files ``{split}-{i}-of-{n}.parquet``; equal shards give equal bytes.

    An empty split has no file, because `datasets` does not read one without rows.

    Args:
        shards: finished ones, read one at a time.
        splits: what `plan` returned.
        folder: where the files go; parquet files of an earlier plan are removed.
        rows: most rows per file, which has fewer where their pictures are large; memory is bounded by those of one
            file per split.

    Returns:
        The sha256 of each file, by name.
    """
    def placed() -> Iterator[tuple[str, Preference]]:
        for shard, part in progress(list(zip(shards, splits, strict=True)), desc="publishing"):
            kept = [name for name in part if name is not None]
            yield from zip(kept, preferences(shard, [name is not None for name in part]), strict=True)

    return write_splits(placed(), folder=folder, rows=rows)


def write_splits(placed: Iterable[tuple[str, Preference]], *, folder: Path, rows: int) -> dict[str, str]:
    """Write preferences, each with its split's name, as parquet files; see `assemble`."""
    for path in folder.glob("*.parquet*"):
        path.unlink()
    waiting: dict[str, list[Preference]] = {name: [] for name in SPLITS}
    weight: Counter[str] = Counter()
    written: dict[str, list[Path]] = {name: [] for name in SPLITS}
    sums: dict[Path, str] = {}

    def write(name: str) -> None:
        path = folder / f"{name}-{len(written[name]):05d}.parquet.tmp"  # its name says how many there are
        written[name].append(path)
        sums[path] = write_preferences(path, waiting[name])
        waiting[name].clear()
        weight[name] = 0

    for name, row in placed:
        waiting[name].append(row)
        weight[name] += len(row.chosen) + len(row.rejected)
        if len(waiting[name]) == rows or weight[name] > _FILE_BYTES:
            write(name)
    for name in SPLITS:
        if waiting[name]:
            write(name)
    return {path.rename(folder / f"{name}-{i:05d}-of-{len(paths):05d}.parquet").name: sums[path]
            for name, paths in sorted(written.items()) for i, path in enumerate(paths)}


def rows_of(folder: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Some columns of all rows of a dataset, file by file in the order of the splits."""
    for name in SPLITS:
        for path in sorted(folder.glob(f"{name}-*.parquet")):
            for batch in pq.ParquetFile(path).iter_batches(batch_size=1000, columns=list(columns)):
                yield from batch.to_pylist()


OURS = """Each row is a prompt with spatial relations, an image that follows it (`chosen`), and an image of the same
prompt after one to three of its relations were changed (`rejected`). Scores are for `prompt`."""


def write_card(folder: Path, *, counts: dict[str, int], statistics: dict[str, Any], about: str) -> None:
    """Write ``README.md``, the dataset card; its header tells `datasets` where the splits are.

    Args:
        folder: of the dataset. counts: of the splits. statistics: of `describe`, with the ``funnel``.
        about: what a row is.
    """
    drawn = statistics["generators"]
    free = drawn and all(by["license"] == "Apache-2.0" for by in drawn.values())
    generators = "\n".join(f"| {name} | {by['pictures']} | {by['license'] or 'not known'} |"
                           for name, by in drawn.items())
    files = "\n".join(f"  - split: {name}\n    path: data/{name}-*.parquet" for name in SPLITS if counts[name])
    rows = "\n".join(f"| {name} | {counts[name]} |" for name in SPLITS)
    funnel = "\n".join(f"| {name} | {n} |" for name, n in statistics["funnel"].items())
    write_atomic(folder / "README.md", f"""---
license: {"apache-2.0" if free else "other"}
task_categories:
- text-to-image
size_categories:
- {_size(counts[KEPT])}
configs:
- config_name: default
  data_files:
{files}
---
# Spatial preference pairs

{about}

| column | meaning |
|---|---|
| `id`, `perturbed_id` | ids of the two prompts |
| `prompt`, `perturbed_prompt` | their texts; only relation words and the order of objects (and articles) differ |
| `chosen`, `rejected` | the images |
| `relations`, `perturbed_relations` | JSON lists of `predicate`, `subject`, `objects`, in the order of the clauses |
| `edits` | JSON list: `kind`, `index`, `before`, `after`; `dependent` where an edit only follows from another |
| `n_perturbations` | edits that are not dependent |
| `generator`, `seed` | who drew `chosen`, and its seed; by default the same for `rejected` |
| `drawn` | JSON: of `chosen` and of `rejected` the generator, its seed and its settings |
| `verdicts` | JSON: of `chosen` under `prompt` and of `rejected` under `perturbed_prompt`, with evidence |
| `scene` | the place |

| split | pairs |
|---|---|
{rows}

No two splits share a place together with its objects, so they share no text and no list of relations either.

| who drew | pictures | licence of the pictures |
|---|---|---|
{generators}

| step | pairs |
|---|---|
{funnel}

Relations per prompt: mean {statistics["relations_per_prompt"]["mean"]}. Words per prompt: mean \
{statistics["words_per_prompt"]["mean"]}.
""")


def _size(n: int) -> str:
    bounds = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    return next((name for limit, name in bounds if n < limit), "1M<n<10M")
