"""How often the oracle agrees with the coordinates of the scenes that were painted, by predicate.

    python scripts/check_oracle.py --count 10000

Each render is a scene of a fresh prompt or of its perturbation, in turn, and is judged under both prompts, so true and
false relations of every kind are asked about.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from spatialt2i.core.run import progress, seed_of, write_json
from spatialt2i.tiny.grammar import MAX_RELATIONS, TinyWriter
from spatialt2i.tiny.layout import solve
from spatialt2i.tiny.oracle import TinyOracle
from spatialt2i.tiny.painter import paint
from spatialt2i.tiny.world import margin

CHUNK = 250


def check(start: int, *, stop: int, seed: int) -> Counter[tuple[str, bool, bool]]:
    """Counts of (predicate, holds in the scene, the oracle says so) over the renders from ``start``."""
    writer, oracle = TinyWriter(), TinyOracle()
    found: Counter[tuple[str, bool, bool]] = Counter()
    for i in range(start, min(start + CHUNK, stop)):
        for attempt in itertools.count():
            at = (i, attempt)
            prompt = writer.write(id=f"check-{seed}-{i}-{attempt}", n_relations=1 + i % MAX_RELATIONS,
                                  seed=seed_of(seed, "check", *at))
            pair = writer.perturb(prompt=prompt, n_edits=1, seed=seed_of(seed, "check-edit", *at))
            prompts = [prompt] if pair is None else [pair.perfect, pair.perturbed]
            rng = np.random.default_rng(seed_of(seed, "check-image", *at))
            own = prompts[i % len(prompts)]
            scene = solve(own.objects, own.relations, own.scene, rng)
            if scene is not None:
                break
        image = Image.fromarray(paint(scene, rng))
        for asked, verdict in zip(prompts, oracle.verify(images=[image] * len(prompts), prompts=prompts), strict=True):
            for relation, says in zip(asked.relations, verdict.relations, strict=True):
                found[relation.predicate, bool(margin(relation, scene.boxes) > 0), bool(says)] += 1
    return found


def main() -> None:
    """Print the table; with ``--json`` also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="renders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="also write the whole table to this file")
    args = parser.parse_args()
    total: Counter[tuple[str, bool, bool]] = Counter()
    with ProcessPoolExecutor(args.workers) as pool:
        starts = range(0, args.count, CHUNK)
        for part in progress(pool.map(partial(check, stop=args.count, seed=args.seed), starts), desc="renders of 250",
                             total=len(starts)):
            total.update(part)
    figures = {name: row(total, name) for name in sorted({key[0] for key in total})} | {"overall": row(total, None)}
    for name, values in figures.items():
        print(f"{name:<26}" + "  ".join(f"{key} {value:>7}" for key, value in values.items()))
    worst = min(values["accuracy"] for name, values in figures.items() if name != "overall")
    print(json.dumps({"renders": args.count, "overall": figures["overall"]["accuracy"], "worst_predicate": worst}))
    if args.json:
        write_json(args.json, {"renders": args.count, "seed": args.seed, "predicates": figures})


def row(total: Counter[tuple[str, bool, bool]], predicate: str | None) -> dict[str, float | int]:
    """Accuracy of one predicate, or of all, and its two kinds of mistakes."""
    mine = Counter()
    for (name, holds, says), n in total.items():
        if predicate in (None, name):
            mine[holds, says] += n
    relations = sum(mine.values())
    right = mine[True, True] + mine[False, False]
    return {"relations": relations, "accuracy": round(right / relations, 5),
            "false": mine[False, False] + mine[False, True],
            "missed": mine[True, False], "invented": mine[False, True]}


if __name__ == "__main__":
    main()
