"""Builds the dataset: shards of candidate pairs in as many processes as there are, then one set of parquet files.

Everything follows from seeds with names, so the files do not depend on the number of processes, on the order in which
they finish, or on how often the work was killed and started again. In the folder::

    prompts/ pairs/ verdicts/      JSON lines of each step, one file per shard
    shards/                        the kept pairs of each shard, and its manifest with checksums
    data/                          the dataset's parquet files
    README.md                      its card; `datasets.load_dataset(FOLDER)` reads it
    statistics.json
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from spatialt2i.core.config import DataConfig
from spatialt2i.core.device import cpu_count
from spatialt2i.core.run import json_text, lasting, progress, seed_of, write_json
from spatialt2i.data.dataset import SPLITS, assemble, plan, rows_of, write_card
from spatialt2i.data.shard import FILES, Parts, Shard, make_shard, stored, text_key
from spatialt2i.data.stages import EDITS_DROPPED, KEPT, PROMPT_DROPPED, UNPERTURBED
from spatialt2i.data.stats import COLUMNS, describe

log = logging.getLogger(__name__)


def build_dataset(*, config: DataConfig, seed: int, folder: Path, parts: Parts,
                  exclude: frozenset[str] = frozenset(), drawn: str = "") -> dict[str, Any]:
    """Write, perturb, draw and judge ``config.pairs`` candidate pairs, and make a dataset of those that hold.

    Finished shards of an earlier call are used again where they are whole and were made with the same settings.

    Args:
        config: how many pairs, of what kind, in how many processes.
        seed: what everything is derived from.
        folder: where all files go.
        parts: makes the writer, the generator and the verifier; picklable, because each process makes its own.
        exclude: texts that must not appear, those of evaluation sets.
        drawn: what the pictures depend on besides ``config``; shards that were made with another are made again.

    Returns:
        ``counts`` (candidates, what became of them, and the pairs of each split), ``statistics``, and ``sha256`` of
        each parquet file.

    Raises:
        DiskFull: no space left; finished shards stay, and the same call goes on from there.
    """
    shards = _shards(config, seed, folder, parts, drawn)
    manifests = _manifests(shards, config)
    splits, dropped = plan([manifests[s.number] for s in shards], config=config,
                           exclude=frozenset(map(text_key, exclude)))
    sums = assemble([s.path(FILES[3]) for s in shards], splits, folder=folder / "data", rows=config.shard)
    judged = sum((Counter(manifest["counts"]) for manifest in manifests.values()), Counter())
    sizes = Counter(name for part in splits for name in part if name)
    again = {name: n for name, n in sorted(judged.items()) if name.startswith(PROMPT_DROPPED)}
    lost = {name: n for name, n in sorted((judged + dropped).items()) if name != KEPT and name not in again}
    unperturbed = sum(n for name, n in lost.items() if name.startswith((UNPERTURBED, EDITS_DROPPED)))
    counts = {**again, "written": config.pairs, "perturbed": config.pairs - unperturbed, **lost, KEPT: sizes.total(),
              **{name: sizes[name] for name in SPLITS}}
    statistics = describe(rows_of(folder / "data", COLUMNS))
    statistics["funnel"] = {name: n for name, n in counts.items() if name not in SPLITS}
    statistics["generators"] = list({json_text(m["generator"]): m["generator"] for m in manifests.values()}.values())
    write_json(folder / "statistics.json", statistics)
    write_card(folder, counts=counts, statistics=statistics)
    return {"counts": counts, "statistics": statistics, "sha256": sums}


def _shards(config: DataConfig, seed: int, folder: Path, parts: Parts, drawn: str) -> list[Shard]:
    # neither the number of processes nor how many pairs and splits are wanted changes what is in a full shard
    fixed = dataclasses.replace(config, workers=0, pairs=1, validation=0, test=0)
    ranges = [(start, min(start + config.shard, config.pairs)) for start in range(0, config.pairs, config.shard)]
    settings = json_text(lasting("data", fixed)) + drawn
    return [Shard(i, start, stop, config, seed, f"{seed_of(settings, seed, start, stop):016x}", folder, parts)
            for i, (start, stop) in enumerate(ranges)]


def _manifests(shards: Sequence[Shard], config: DataConfig) -> dict[int, dict[str, Any]]:
    """The manifests of all shards by number; those that are missing or damaged are computed now."""
    found = {s.number: stored(s) for s in shards}
    todo = [s for s in shards if found[s.number] is None]
    damaged = [s.number for s in todo if s.manifest.exists()]
    if damaged:
        log.warning("%s: the shards %s are damaged or were made with other settings, and are made again",
                    shards[0].folder, ", ".join(map(str, damaged)))
    with progress(sum(s.stop - s.start for s in shards), desc="pairs",
                  initial=sum(s.stop - s.start for s in shards) - sum(s.stop - s.start for s in todo)) as bar:
        for shard, manifest in _computed(todo, config.workers or cpu_count()):
            found[shard.number] = manifest
            bar.update(shard.stop - shard.start)
    return found


def _computed(shards: Sequence[Shard], workers: int) -> Iterator[tuple[Shard, dict[str, Any]]]:
    """The shards with their manifests, in the order in which they are finished."""
    if min(workers, len(shards)) <= 1:
        for shard in shards:
            yield shard, make_shard(shard)
        return
    context = multiprocessing.get_context("spawn")
    life, ours = context.Pipe(duplex=False)  # closed when this process ends, however it does: then the workers end too
    pool = ProcessPoolExecutor(min(workers, len(shards)), mp_context=context, initializer=_prepare, initargs=(life,))
    try:
        waiting = {pool.submit(make_shard, shard): shard for shard in shards}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
        pool.shutdown()
    finally:
        ours.close()
        pool.shutdown(cancel_futures=True)
        life.close()


def _prepare(life: Connection) -> None:
    """Make a worker leave Ctrl-C to its parent, and end with it; an unfinished shard leaves no file under its name."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        life.poll(None)  # returns when the other end is closed, because nothing is ever sent
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
