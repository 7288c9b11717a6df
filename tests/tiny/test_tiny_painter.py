"""The painter: reproducible, correct, and wrong as often as asked."""

from __future__ import annotations

import time

import numpy as np

from spatialt2i.tiny.grammar import TinyWriter
from spatialt2i.tiny.painter import TinyPainter, paint
from spatialt2i.tiny.world import margin

PROMPTS = [TinyWriter().write(id=f"p{i}", n_relations=2 + i % 3, seed=i) for i in range(120)]
SEEDS = list(range(120))


def pixels(painter: TinyPainter, prompts: list, seeds: list[int]) -> list[np.ndarray]:
    return [np.asarray(image) for image in painter.generate(prompts=prompts, seeds=seeds)]


def test_the_same_prompt_and_seed_give_the_same_picture_in_any_batch() -> None:
    painter = TinyPainter()
    together = pixels(painter, PROMPTS[:6], SEEDS[:6])
    alone = [pixels(painter, [p], [s])[0] for p, s in zip(PROMPTS[:6], SEEDS[:6], strict=True)]
    assert all((a == b).all() for a, b in zip(together, alone, strict=True))
    assert together[0].shape == (64, 64, 3) and together[0].dtype == np.uint8
    assert (pixels(painter, PROMPTS[:1], [9])[0] != together[0]).any()


def test_seeds_move_and_tint_objects() -> None:
    scenes = [TinyPainter(wrong_layout=0).scene(prompt=PROMPTS[0], seed=s) for s in range(5)]
    assert len({tuple(b.corners for b in s.boxes.values()) for s in scenes}) == 5
    backgrounds = [p[0, 0].tolist() for p in pixels(TinyPainter(), [PROMPTS[0]] * 5, list(range(5)))]
    assert len({tuple(b) for b in backgrounds}) > 1


def test_wrong_layouts_are_as_frequent_as_asked() -> None:
    def right(painter: TinyPainter) -> float:
        scenes = [painter.scene(prompt=p, seed=s) for p, s in zip(PROMPTS, SEEDS, strict=True)]
        return np.mean([all(margin(r, s.boxes) > 0 for r in p.relations) for p, s in zip(PROMPTS, scenes, strict=True)])

    assert right(TinyPainter(wrong_layout=0)) > 0.97
    assert 0.4 < right(TinyPainter(wrong_layout=0.5)) < 0.6
    assert right(TinyPainter(wrong_layout=1)) < 0.05


def test_painting_is_fast() -> None:
    scenes = [TinyPainter().scene(prompt=p, seed=0) for p in PROMPTS[:50]]
    rng, start = np.random.default_rng(0), time.process_time()
    for scene in scenes:
        paint(scene, rng)
    assert 50 / (time.process_time() - start) > 500, "pictures per second of one core"
