"""Pictures of the tiny world with their captions and object maps, as arrays on disk, for training the tiny models.

    python scripts/tiny_corpus.py --out build/corpus --count 80000
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from spatialt2i.core.run import progress, seed_of, write_json
from spatialt2i.core.types import Prompt, Relation
from spatialt2i.tiny.grammar import TinyWriter, alternatives
from spatialt2i.tiny.layout import solve
from spatialt2i.tiny.painter import paint
from spatialt2i.tiny.phrases import render
from spatialt2i.tiny.tokenizer import make_tokenizer
from spatialt2i.tiny.world import OBJECTS, SIZE, Scene, margin, outline

RELATIONS = (0.15, 0.25, 0.25, 0.13, 0.09, 0.07, 0.06)  # share of captions with 1, 2, ... relations
TEXT_TOKENS = 40
CAPTIONS = 4  # phrasings (and scramblings) per picture
CHUNK = 500
MOST_OBJECTS = 7
CONTACT = ("inside", "in front of", "behind", "on top of", "next to")  # objects that touch; never stated wrongly


def scrambled(relations: tuple[Relation, ...], share: float, rng: np.random.Generator) -> list[Relation]:
    """The relations in random order, a share of those at a distance replaced by one of their wrong edits."""
    out = []
    for i in rng.permutation(len(relations)).tolist():
        options = alternatives(i, relations[i])
        wrong = options and relations[i].predicate not in CONTACT and rng.random() < share
        out.append(options[int(rng.integers(len(options)))].after if wrong else relations[i])
    return out


def object_map(scene: Scene) -> np.ndarray:
    """Which object is visible at every fourth pixel.

    Returns:
        uint8 [16, 16], 0 = background, else 1 + position in `OBJECTS`.
    """
    at = np.arange(2, SIZE, 4, dtype=np.float64)
    found = np.zeros((len(at), len(at)), dtype=np.uint8)
    for name, box in sorted(scene.boxes.items(), key=lambda item: item[1].z):
        inside = outline(name.split()[1], at[None, :] - box.cx, at[:, None] - box.cy, box.r) < 0
        found[inside] = 1 + OBJECTS.index(name)
    return found


def object_boxes(scene: Scene) -> np.ndarray:
    """Where each object is, hidden or not.

    Returns:
        float16 [7, 5], a row an object: position in `OBJECTS`, cx, cy, r in pixels, depth; -1 where there is no more.
    """
    rows = np.full((MOST_OBJECTS, 5), -1, dtype=np.float16)
    for row, (name, box) in zip(rows, scene.boxes.items(), strict=False):
        row[:] = OBJECTS.index(name), box.cx, box.cy, box.r, box.z
    return rows


def clearest(prompt: Prompt, layouts: int, rng: np.random.Generator) -> Scene | None:
    """Of some layouts the one whose tightest relation holds by most; None where none was found."""
    found = (solve(prompt.objects, prompt.relations, prompt.scene, rng) for _ in range(layouts))
    return max((scene for scene in found if scene is not None), default=None,
               key=lambda scene: min(float(margin(r, scene.boxes)) for r in prompt.relations))


def make_chunk(start: int, *, stop: int, seed: int, scramble: float, layouts: int) -> dict[str, np.ndarray]:
    """The pictures from ``start`` on, CHUNK or those before ``stop``; each is reproducible from its number alone."""
    writer, tokenizer = TinyWriter(), make_tokenizer(max_length=TEXT_TOKENS)
    images, maps, boxes, texts = [], [], [], []
    numbers = range(start, min(start + CHUNK, stop))
    for i in numbers:
        rng = np.random.default_rng(seed_of(seed, "corpus", i))
        scene = None
        while scene is None:
            n = 1 + int(rng.choice(len(RELATIONS), p=RELATIONS))
            prompt = writer.write(id=f"corpus-{seed}-{i}", n_relations=n, seed=int(rng.integers(2**60)))
            scene = clearest(prompt, layouts, rng)
        images.append(paint(scene, rng))
        maps.append(object_map(scene))
        boxes.append(object_boxes(scene))
        for _ in range(CAPTIONS):
            texts.append(render(prompt.scene, scrambled(prompt.relations, scramble, rng), int(rng.integers(2**60))))
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="np").input_ids
    return {"images": np.stack(images), "maps": np.stack(maps), "boxes": np.stack(boxes),
            "tokens": ids.reshape(len(numbers), CAPTIONS, TEXT_TOKENS).astype(np.int16)}


def main() -> None:
    """Write ``images``, ``maps``, ``boxes`` and ``tokens`` (.npy); goes on where an earlier call was stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/corpus"))
    parser.add_argument("--count", type=int, default=80_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scramble", type=float, default=0.0,
                        help="share of relations that captions state wrongly, those of things that touch aside")
    parser.add_argument("--layouts", type=int, default=1,
                        help="layouts tried per picture, of which the clearest is painted: what draws a relation a "
                             "little off then still draws it rightly")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    wanted = {"count": args.count, "seed": args.seed, "scramble": args.scramble, "layouts": args.layouts}
    manifest = args.out / "manifest.json"
    found = json.loads(manifest.read_text()) if manifest.exists() else {}
    done = found.pop("done", args.count) if found else 0  # a finished manifest has no such entry
    done = done if found == wanted else 0
    args.out.mkdir(parents=True, exist_ok=True)
    shapes = {"images": ((SIZE, SIZE, 3), np.uint8), "maps": ((16, 16), np.uint8),
              "boxes": ((MOST_OBJECTS, 5), np.float16), "tokens": ((CAPTIONS, TEXT_TOKENS), np.int16)}
    files = {k: np.lib.format.open_memmap(args.out / f"{k}.npy", "r+" if done else "w+", dtype, (args.count, *shape))
             for k, (shape, dtype) in shapes.items()}
    starts = range(done, args.count, CHUNK)
    with ProcessPoolExecutor(args.workers) as pool:
        chunk_of = partial(make_chunk, stop=args.count, seed=args.seed, scramble=args.scramble, layouts=args.layouts)
        chunks = pool.map(chunk_of, starts)
        for n, (start, chunk) in enumerate(zip(progress(starts, desc="corpus"), chunks, strict=True), 1):
            for key, values in chunk.items():
                files[key][start:start + CHUNK] = values
            if n % 20 == 0 or n == len(starts):
                for file in files.values():
                    file.flush()
                write_json(manifest, wanted | ({} if n == len(starts) else {"done": start + CHUNK}))


if __name__ == "__main__":
    main()
