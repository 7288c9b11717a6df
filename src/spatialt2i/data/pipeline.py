"""Builds the dataset: shards of candidate pairs in as many processes as there are, then one set of parquet files.

Everything follows from seeds with names, so the files do not depend on the number of processes, on the order in which
they finish, or on how often the work was killed and started again. In the folder::

    prompts/ pairs/ drawn/ verdicts/   JSON lines of each step, one file per shard
    images/                        the pictures, named after what is in them
    shards/                        the manifest of each shard, with checksums
    data/                          the dataset's parquet files
    README.md                      its card; `datasets.load_dataset(FOLDER)` reads it
    statistics.json
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from spatialt2i.core.config import DataConfig
from spatialt2i.core.run import json_text, lasting, progress, seed_of, write_json
from spatialt2i.core.store import CorruptData
from spatialt2i.data.dataset import SPLITS, assemble, plan, rows_of, write_card
from spatialt2i.data.engines import in_processes, on_ray
from spatialt2i.data.shard import Parts, Shard, pictures_whole, stored, text_key
from spatialt2i.data.stages import EDITS_DROPPED, KEPT, PROMPT_DROPPED, UNPERTURBED, outcome
from spatialt2i.data.stats import COLUMNS, describe

log = logging.getLogger(__name__)


def build_dataset(*, config: DataConfig, seed: int, folder: Path, parts: Parts, exclude: frozenset[str] = frozenset(),
                  settings_of: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """Write, perturb, draw and judge ``config.pairs`` candidate pairs, and make a dataset of those that hold.

    Finished shards of an earlier call are used again where they are whole and were made with the same settings.

    Args:
        config: how many pairs, of what kind, in how many processes.
        seed: what everything is derived from.
        folder: where all files go.
        parts: makes the writer, the generators and the verifier; each process makes its own.
        exclude: texts that must not appear, those of evaluation sets.
        settings_of: what pictures and verdicts depend on besides ``config``, by who makes them; others are made again.

    Returns:
        ``counts`` (candidates, what became of them, and the pairs of each split), ``statistics``, and ``sha256`` of
        each parquet file.

    Raises:
        DiskFull: no space left; finished shards stay, and the same call goes on from there.
    """
    shards = _shards(config, seed, folder, settings_of)
    manifests = _manifests(shards, config, parts)
    try:
        return _publish(shards, manifests, config=config, folder=folder, exclude=exclude)
    except CorruptData as error:
        log.warning("%s; it is made again", error)
        for shard in shards:
            if not pictures_whole(shard):
                shard.manifest.unlink(missing_ok=True)
        return _publish(shards, _manifests(shards, config, parts), config=config, folder=folder, exclude=exclude)


def _publish(shards: Sequence[Shard], manifests: Sequence[dict[str, Any]], *, config: DataConfig, folder: Path,
             exclude: frozenset[str]) -> dict[str, Any]:
    """Make a dataset of the pairs that ``config.keep`` keeps."""
    found = [[(row, row[3] if isinstance(row[3], str) else outcome(*row[3], config.keep)) for row in m["pairs"]]
             for m in manifests]
    splits, dropped = plan([[row[:3] if result == KEPT else None for row, result in part] for part in found],
                           config=config, exclude=frozenset(map(text_key, exclude)))
    sums = assemble(shards, splits, folder=folder / "data", rows=config.shard)
    judged = sum((Counter(m["counts"]) for m in manifests), Counter(result for part in found for _, result in part))
    sizes = Counter(name for part in splits for name in part if name)
    again = {name: n for name, n in sorted(judged.items()) if name.startswith(PROMPT_DROPPED)}
    lost = {name: n for name, n in sorted((judged + dropped).items()) if name != KEPT and name not in again}
    unperturbed = sum(n for name, n in lost.items() if name.startswith((UNPERTURBED, EDITS_DROPPED)))
    counts = {**again, "written": config.pairs, "perturbed": config.pairs - unperturbed, **lost, KEPT: sizes.total(),
              **{name: sizes[name] for name in SPLITS}}
    statistics = describe(rows_of(folder / "data", COLUMNS))
    statistics["funnel"] = {name: n for name, n in counts.items() if name not in SPLITS}
    write_json(folder / "statistics.json", statistics)
    write_card(folder, counts=counts, statistics=statistics)
    return {"counts": counts, "statistics": statistics, "sha256": sums}


def _shards(config: DataConfig, seed: int, folder: Path, settings_of: Mapping[str, str]) -> list[Shard]:
    settings = lasting("data", config)

    def identity(*names: str) -> str:
        return f"{seed_of(seed, json_text({name: settings.get(name) for name in names})):016x}"

    written = identity("writer", "relations", "llm", "one_perturbation")
    judged = identity("verifier") + settings_of.get(config.verifier, "")
    ranges = [(start, min(start + config.shard, config.pairs)) for start in range(0, config.pairs, config.shard)]
    found = []
    for i, ((start, stop), names) in enumerate(zip(ranges, _turns(config), strict=False)):
        drawn = identity("image_format", "same_seed", "wrong_layout") + "".join(
            name + settings_of.get(name, "") for name in names)
        found.append(Shard(i, start, stop, config, seed, names,
                           (f"{written} {start} {stop}", f"{seed_of(drawn):016x}", judged), folder))
    return found


def _turns(config: DataConfig) -> Iterator[tuple[str, str]]:
    """Who draws shard after shard: whoever is furthest behind its share, so that the shares hold at any length."""
    names, shares = config.generators, np.array(config.generator_shares) / sum(config.generator_shares)
    drawn = np.zeros(len(names))
    for n in itertools.count(1):
        k = int(np.argmax(shares * n - drawn))
        drawn[k] += 1
        yield names[k], names[k if config.same_generator else (k + 1) % len(names)]


def _manifests(shards: Sequence[Shard], config: DataConfig, parts: Parts) -> list[dict[str, Any]]:
    """The manifests of all shards; those that are missing or damaged are computed now."""
    found = {s.number: stored(s) for s in shards}
    todo = [s for s in shards if found[s.number] is None]
    damaged = [s.number for s in todo if s.manifest.exists()]
    if damaged:
        log.warning("%s: the shards %s are damaged or were made with other settings, and are made again",
                    shards[0].folder, ", ".join(map(str, damaged)))
    todo.sort(key=lambda s: (s.drawn_by, s.number))  # a process changes its models as seldom as can be
    with progress(sum(s.stop - s.start for s in shards), desc="pairs",
                  initial=sum(s.stop - s.start for s in shards) - sum(s.stop - s.start for s in todo)) as bar:
        for shard, manifest in {"local": in_processes, "ray": on_ray}[config.engine](todo, config.workers, parts):
            found[shard.number] = manifest
            bar.update(shard.stop - shard.start)
    return [found[s.number] for s in shards]
