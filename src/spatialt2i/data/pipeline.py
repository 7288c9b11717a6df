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
from spatialt2i.core.run import RunError, json_text, lasting, progress, seed_of, write_json
from spatialt2i.core.store import CorruptData
from spatialt2i.data.dataset import OURS, SPLITS, assemble, plan, rows_of, write_card
from spatialt2i.data.engines import Work, in_processes, on_ray
from spatialt2i.data.shard import PHASES, Parts, Shard, draw_shard, judge_shard, pictures_whole, stored, text_key
from spatialt2i.data.stages import EDITS_DROPPED, KEPT, PROMPT_DROPPED, UNPERTURBED, outcome
from spatialt2i.data.stats import COLUMNS, describe

log = logging.getLogger(__name__)


def build_dataset(*, config: DataConfig, seed: int, folder: Path, parts: Parts, exclude: frozenset[str] = frozenset(),
                  settings_of: Mapping[str, str] = MappingProxyType({}), until: str = "published") -> dict[str, Any]:
    """Write, perturb, draw and judge ``config.pairs`` candidate pairs, and make a dataset of those that hold.

    Finished shards of an earlier call are used again where they are whole and were made with the same settings.

    Args:
        config: how many pairs, of what kind, in how many processes.
        seed: what everything is derived from.
        folder: where all files go.
        parts: makes the writer, the generators and the verifier; each process makes its own.
        exclude: texts that must not appear, those of evaluation sets.
        settings_of: what pictures and verdicts depend on besides ``config``, by who makes them; others are made again.
        until: stop when all is ``"drawn"`` or ``"judged"``; only the counts are returned then.

    Returns:
        ``counts`` (candidates, what became of them, and the pairs of each split), ``statistics``, and ``sha256`` of
        each parquet file.

    Raises:
        DiskFull: no space left; finished shards stay, and the same call goes on from there.
        CorruptData: a picture is damaged, and was so again after it was drawn again.
        ValueError: pairs of two generators are asked for, and there is one.
    """
    shards = _shards(config, seed, folder, settings_of)
    shards[0].images.tidy()

    def work() -> dict[str, Any]:
        drawn = _phase("drawn", draw_shard, shards, config, parts)
        if until == "drawn":
            return {"counts": _counts(drawn)}
        judged = _phase("judged", judge_shard, shards, config, parts)
        if until == "judged":
            return {"counts": _counts(judged) + Counter(r for part in _outcomes(judged, config) for r in part if r)}
        return _publish(shards, judged, config=config, folder=folder, exclude=exclude)

    try:
        return work()
    except CorruptData as error:
        log.warning("%s; it is made again", error)
        for shard in shards:
            if stored(shard, "drawn") and not pictures_whole(shard):
                for phase in PHASES:
                    shard.manifest(phase).unlink(missing_ok=True)
        return work()


def _counts(manifests: Sequence[dict[str, Any]]) -> Counter[str]:
    return sum((Counter(m["counts"]) for m in manifests), Counter())


def _outcomes(manifests: Sequence[dict[str, Any]], config: DataConfig) -> list[list[str]]:
    """What became of each pair that was drawn, by ``config.keep``; "" for one that was not."""
    return [[outcome(*facts, config.keep) if facts else "" for *_, facts in m["pairs"]] for m in manifests]


def _publish(shards: Sequence[Shard], manifests: Sequence[dict[str, Any]], *, config: DataConfig, folder: Path,
             exclude: frozenset[str]) -> dict[str, Any]:
    """Make a dataset of the pairs that ``config.keep`` keeps."""
    found = _outcomes(manifests, config)
    splits, dropped = plan([[row[:3] if result == KEPT else None for row, result in zip(m["pairs"], part, strict=True)]
                            for m, part in zip(manifests, found, strict=True)],
                           config=config, exclude=frozenset(map(text_key, exclude)))
    sums = assemble(shards, splits, folder=folder / "data", rows=config.shard)
    judged = _counts(manifests) + Counter(result for part in found for result in part if result)
    sizes = Counter(name for part in splits for name in part if name)
    again = {name: n for name, n in sorted(judged.items()) if name.startswith(PROMPT_DROPPED)}
    lost = {name: n for name, n in sorted((judged + dropped).items()) if name != KEPT and name not in again}
    unperturbed = sum(n for name, n in lost.items() if name.startswith((UNPERTURBED, EDITS_DROPPED)))
    counts = {**again, "written": config.pairs, "perturbed": config.pairs - unperturbed, **lost, KEPT: sizes.total(),
              **{name: sizes[name] for name in SPLITS}}
    statistics = describe(rows_of(folder / "data", COLUMNS))
    statistics["funnel"] = {name: n for name, n in counts.items() if name not in SPLITS}
    write_json(folder / "statistics.json", statistics)
    write_card(folder, counts=counts, statistics=statistics, about=(
        f"{OURS}\n\nA pair is kept where {config.verifier} says: {', '.join(config.keep)}. An image is right under its "
        "own prompt; it differs where it is wrong under the other one."))
    return {"counts": counts, "statistics": statistics, "sha256": sums}


def _shards(config: DataConfig, seed: int, folder: Path, settings_of: Mapping[str, str]) -> list[Shard]:
    settings = lasting("data", config)

    def identity(*names: str) -> str:
        return f"{seed_of(seed, json_text({name: settings.get(name) for name in names})):016x}"

    written = identity("writer", "relations", "llm", "one_perturbation")
    judged = identity("verifier") + settings_of.get(config.verifier, "")
    ranges = [(start, min(start + config.shard, config.pairs)) for start in range(0, config.pairs, config.shard)]
    if not config.same_generator and len(config.generators) < 2:
        raise ValueError("data.same_generator = false: expected at least two data.generators")
    if len(ranges) < (drawing := sum(share > 0 for share in config.generator_shares)):
        log.warning("%d generators and %d shards: a shard is drawn by one of them, so some draw nothing; lower "
                    "data.shard = %d", drawing, len(ranges), config.shard)
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


def _phase(phase: str, work: Work, shards: Sequence[Shard], config: DataConfig, parts: Parts) -> list[dict[str, Any]]:
    """The manifests of a phase of all shards, after those that lack it, or where it is damaged, were worked on."""
    found = {s.number: stored(s, phase) for s in shards}
    todo = [s for s in shards if found[s.number] is None]
    damaged = [s.number for s in todo if s.manifest(phase).exists()]
    if damaged:
        log.warning("%s: the shards %s are damaged or were %s with other settings, and are %s again",
                    shards[0].folder, ", ".join(map(str, damaged)), phase, phase)
    todo.sort(key=lambda s: (s.drawn_by, s.number))  # a process changes its models as seldom as can be
    left = sum(s.stop - s.start for s in todo)
    with progress(config.pairs, desc=phase, initial=config.pairs - left) as bar:
        for shard in {"local": in_processes, "ray": on_ray}[config.engine](todo, config.workers, parts, work):
            found[shard.number] = stored(shard, phase)
            bar.update(shard.stop - shard.start)
    if missing := [s.manifest(phase) for s in shards if found[s.number] is None]:
        raise RunError(f"{missing[0]}: was made, and is not here or not whole; all machines of a cluster must have the "
                       "run's folder under the same path, and nothing else may write there")
    return [found[s.number] for s in shards]
