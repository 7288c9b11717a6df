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
from spatialt2i.core.types import Prompt, Verdict

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
        Per set: ``base`` and ``tuned`` with ``relations`` (share of true ones), ``all`` (every relation true and the
        picture clean), ``presence``, ``clean`` and ``coverage``; ``gain_all``, paired by prompt; ``predicates``, the
        share of true relations by predicate and generator. Beside the sets: ``spatialscore``, the mean score of each.
    """
    figures: dict[str, Any] = {name: {} for name in prompts}
    owners = {name: [p for p in members for _ in range(config.images_per_prompt)] for name, members in prompts.items()}
    seeds = {name: [seed_of(seed, "eval", p.id, i % config.images_per_prompt) for i, p in enumerate(members)]
             for name, members in owners.items()}
    for name in prompts:
        write_jsonl(folder / f"{name}.jsonl", [
            {"index": i, "prompt": p.text, "relations": [r.to_json() for r in p.relations], "id": p.id, "seed": s}
            for i, (p, s) in enumerate(zip(owners[name], seeds[name], strict=True))])
    right: dict[tuple[str, str], list[float]] = {}
    scores: dict[str, list[float]] = defaultdict(list)
    for who, make in generators.items():
        generator = make()
        for name in prompts:
            images = draw(generator, owners[name], seeds[name], folder=folder / who / name, identity=identities[who],
                          label=f"drawing {who}, {name}")
            verdicts = verifier.verify(images=images, prompts=owners[name])
            write_jsonl(folder / who / f"{name}_verdicts.jsonl", [v.to_json() for v in verdicts])
            figures[name][who], right[name, who] = judge(owners[name], verdicts, config=config, seed=seed)
            scores[who] += scorer.score(images=images, prompts=owners[name]).mean.tolist()
    for name in prompts:
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


def judge(prompts: Sequence[Prompt], verdicts: Sequence[Verdict], *, config: BenchConfig,
          seed: int) -> tuple[dict[str, Any], list[float]]:
    """Figures of one generator on one set, and its share of right pictures per prompt (NaN where not judged)."""
    every = config.images_per_prompt
    rows: dict[str, list[float]] = {"relations": [], "all": [], "presence": [], "clean": []}
    predicates: dict[str, list[float]] = defaultdict(list)
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        rows["relations"].append(_mean(verdict.relations))
        rows["presence"].append(_mean(verdict.present))
        rows["clean"].append(_mean([verdict.clean]))
        parts = (*verdict.relations, verdict.clean)
        rows["all"].append(np.nan if None in parts else float(all(parts)))
        for relation, holds in zip(prompt.relations, verdict.relations, strict=True):
            predicates[relation.predicate].append(_mean([holds]))
    grouped = {name: [_mean(values[i:i + every]) for i in range(0, len(values), every)]
               for name, values in rows.items()}

    def figure(name: str, values: Sequence[float]) -> Figure:
        return mean_interval(values, resamples=config.bootstrap, seed=seed_of(seed, "bootstrap", name))

    return {
        **{name: figure(name, values) for name, values in grouped.items()},
        "coverage": float(np.mean(~np.isnan(rows["all"]))),
        "predicates": {name: figure(name, values) for name, values in sorted(predicates.items())},
    }, grouped["all"]


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
