"""The in-domain benchmark: the base and the tuned generator on held-out prompts, pictures judged one by one.

What was judged stays in the run, so that anyone can judge it again::

    eval/{base,tuned}/{set}/{index}.png
    eval/{set}.jsonl                       index, prompt, relations and seed of each picture
    eval/{base,tuned}/{set}_verdicts.jsonl
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spatialt2i.bench.stats import Figure, mean_interval, paired_gain
from spatialt2i.core.config import BenchConfig
from spatialt2i.core.protocols import Generator, Scorer, Verifier
from spatialt2i.core.run import atomic_path, progress, read_json, seed_of, write_json
from spatialt2i.core.store import write_jsonl
from spatialt2i.core.types import Benchmark, Prompt, Verdict

VERSION = "1"  # of how prompts are drawn and verdicts become shares
MEASURES = ("relations", "all", "presence", "clean")
CHUNK = 50  # pictures drawn between two writes; what an interruption may lose


def compare(*, generators: Mapping[str, Callable[[], Generator]], identities: Mapping[str, str], verifier: Verifier,
            scorer: Scorer, prompts: Mapping[str, Sequence[Prompt]], config: BenchConfig, seed: int,
            folder: Path) -> dict[str, Any]:
    """Draw, judge and compare. Pictures that are there already, drawn by the same generator, are used again.

    Args:
        generators: make ``base`` and ``tuned``, one after the other; both draw every prompt from the same seeds.
        identities: what makes each generator's pictures stale when it changes, for example a hash of its adapter.
        verifier: the judge, whom neither generator was trained on.
        scorer: the reward, averaged over all pictures for comparison.
        prompts: the sets by name.
        config: pictures per prompt, resamples.
        seed: of the pictures and of the bootstrap.
        folder: where the pictures go.

    Returns:
        Per set: ``version`` and ``judge``; ``base`` and ``tuned`` with ``relations`` (share of true ones), ``all``
        (every relation true and the picture clean), ``presence``, ``clean`` and ``coverage`` (pictures that could be
        judged); ``gain_all``, paired by prompt; ``predicates``, the share of true relations by predicate and generator.
        Beside the sets: ``spatialscore``, the mean score of each. Every figure is a mean over prompts, and its ``n``
        their number.
    """
    every = config.images_per_prompt
    sets = {name: Benchmark(name, VERSION, tuple(members), verifier, shares) for name, members in prompts.items()}
    figures: dict[str, Any] = {name: {"version": b.version, "judge": b.judge.name} for name, b in sets.items()}
    owners = {name: [p for p in bench.prompts for _ in range(every)] for name, bench in sets.items()}
    seeds = {name: [seed_of(seed, "eval", p.id, i % every) for i, p in enumerate(members)]
             for name, members in owners.items()}
    for name in sets:
        write_jsonl(folder / f"{name}.jsonl", [
            {"index": i, "prompt": p.text, "relations": [r.to_json() for r in p.relations], "id": p.id, "seed": s}
            for i, (p, s) in enumerate(zip(owners[name], seeds[name], strict=True))])
    right: dict[tuple[str, str], list[float]] = {}
    scores: dict[str, list[float]] = defaultdict(list)
    for who, make in generators.items():
        generator = make()
        for name, bench in sets.items():
            images = draw(generator, owners[name], seeds[name], folder=folder / who / name, identity=identities[who],
                          label=f"drawing {who}, {name}")
            verdicts = bench.judge.verify(images=images, prompts=owners[name])
            write_jsonl(folder / who / f"{name}_verdicts.jsonl", [v.to_json() for v in verdicts])
            figures[name][who], right[name, who] = measure(bench, verdicts, config=config, seed=seed)
            means = scorer.score(images=images, prompts=owners[name]).mean.tolist()
            scores[who] += [_mean(means[i:i + every]) for i in range(0, len(means), every)]
        del generator  # before the next one is made: two may not fit into memory
    for name in sets:
        figures[name]["gain_all"] = paired_gain(right[name, "base"], right[name, "tuned"], resamples=config.bootstrap,
                                                seed=seed_of(seed, "bootstrap", name, "gain"))
        tables = {who: figures[name][who].pop("predicates") for who in generators}
        figures[name]["predicates"] = {p: {who: table[p] for who, table in tables.items()} for p in tables["base"]}
    mean = {who: mean_interval(values, resamples=config.bootstrap, seed=seed_of(seed, "bootstrap", "score"))
            for who, values in scores.items()}
    return figures | {"spatialscore": mean}


def draw(generator: Generator, prompts: Sequence[Prompt], seeds: Sequence[int], *, folder: Path, identity: str,
         label: str) -> list[Image.Image]:
    """The pictures ``{index}.png`` of a folder, those that are missing or damaged drawn now.

    Args:
        generator: who draws.
        prompts, seeds: one each per picture.
        folder: of the pictures.
        identity: of the generator; a folder drawn by another one is emptied first.
        label: of the progress bar.
    """
    stamp = folder / "drawn_by.json"
    wanted = {"identity": identity, "prompts": [p.text for p in prompts], "seeds": list(seeds)}
    if not stamp.exists() or read_json(stamp) != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(stamp, wanted)
    images = [_read(folder / f"{i}.png") for i in range(len(prompts))]
    missing = [i for i, image in enumerate(images) if image is None]
    bar = progress(len(prompts), desc=label, initial=len(prompts) - len(missing))
    for at in range(0, len(missing), CHUNK):
        part = missing[at:at + CHUNK]
        drawn = generator.generate(prompts=[prompts[i] for i in part], seeds=[seeds[i] for i in part])
        for i, image in zip(part, drawn, strict=True):
            with atomic_path(folder / f"{i}.png") as path:
                image.save(path, "PNG")
            images[i] = image
        bar.update(len(part))
    bar.close()
    return images


def measure(bench: Benchmark, verdicts: Sequence[Verdict], *, config: BenchConfig,
            seed: int) -> tuple[dict[str, Any], list[float]]:
    """Figures of one generator on one set, and its share of right pictures per prompt (NaN where not judged).

    Args:
        bench: the set.
        verdicts: on the pictures, those of the first prompt first.
        config: resamples of the bootstrap.
        seed: of the bootstrap.
    """
    every = len(verdicts) // len(bench.prompts)
    pictures = [verdicts[i:i + every] for i in range(0, len(verdicts), every)]
    rows = [bench.aggregation(prompt, group) for prompt, group in zip(bench.prompts, pictures, strict=True)]
    predicates: dict[str, list[float]] = defaultdict(list)
    for prompt, group in zip(bench.prompts, pictures, strict=True):
        for name, share in by_predicate(prompt, group).items():
            predicates[name].append(share)

    def figure(name: str, values: Sequence[float]) -> Figure:
        return mean_interval(values, resamples=config.bootstrap, seed=seed_of(seed, "bootstrap", name))

    return {
        **{name: figure(name, [row[name] for row in rows]) for name in MEASURES},
        "coverage": float(np.mean([row["coverage"] for row in rows])),
        "predicates": {name: figure(name, values) for name, values in sorted(predicates.items())},
    }, [row["all"] for row in rows]


def shares(prompt: Prompt, verdicts: Sequence[Verdict]) -> dict[str, float]:
    """What the pictures of a prompt have right on average, by measure, and ``coverage``, the share that was judged."""
    parts = [(*v.relations, v.clean) for v in verdicts]
    right = [None if None in part else all(part) for part in parts]
    return {"relations": _mean([_mean(v.relations) for v in verdicts]), "all": _mean(right),
            "presence": _mean([_mean(v.present) for v in verdicts]), "clean": _mean([v.clean for v in verdicts]),
            "coverage": _mean([r is not None for r in right])}


def by_predicate(prompt: Prompt, verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The share of true relations of a prompt's pictures, by predicate; NaN where none was judged."""
    held: dict[str, list[bool | None]] = defaultdict(list)
    for verdict in verdicts:
        for relation, holds in zip(prompt.relations, verdict.relations, strict=True):
            held[relation.predicate].append(holds)
    return {name: _mean(values) for name, values in held.items()}


def _mean(values: Sequence[float | bool | None]) -> float:
    """Mean of what was judged; NaN where nothing was."""
    known = [float(v) for v in values if v is not None and not np.isnan(v)]
    return sum(known) / len(known) if known else np.nan


def _read(path: Path) -> Image.Image | None:
    """A picture of an earlier call, None where it is missing or damaged."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (FileNotFoundError, OSError, SyntaxError):
        return None
