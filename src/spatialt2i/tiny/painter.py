"""Paints scenes of the tabletop world (a `Generator`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from spatialt2i.core.types import Prompt, applied
from spatialt2i.tiny.grammar import alternatives
from spatialt2i.tiny.layout import solve
from spatialt2i.tiny.world import COLOURS, SCENES, SIZE, Box, Scene, outline


def paint(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A scene as pixels, with jittered colours and a softly lit background.

    Returns:
        uint8 [64, 64, 3].
    """
    ground = np.asarray(SCENES[scene.place], dtype=np.float32) + rng.uniform(-6, 6, 3)
    light = np.linspace(-1, 1, SIZE, dtype=np.float32) * rng.uniform(-6, 6)
    canvas = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    canvas[:] = ground + light[:, None, None]
    for name, box in sorted(scene.boxes.items(), key=lambda item: item[1].z):
        colour, shape = name.split()
        x0, y0 = max(int(box.cx - box.r) - 1, 0), max(int(box.cy - box.r) - 1, 0)
        x1, y1 = min(int(box.cx + box.r) + 2, SIZE), min(int(box.cy + box.r) + 2, SIZE)
        x = np.arange(x0, x1, dtype=np.float32) + 0.5 - box.cx
        y = np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5 - box.cy
        cover = np.clip(0.5 - outline(shape, x, y, box.r), 0, 1).astype(np.float32)[..., None]
        region = canvas[y0:y1, x0:x1]
        region += cover * ((np.asarray(COLOURS[colour], dtype=np.float32) + rng.uniform(-10, 10, 3)) - region)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def scatter(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """The prompt's objects at random places, for relations that found no layout: verification rejects these."""
    scene = solve(prompt.objects, (), prompt.scene, rng)
    if scene is None:
        z = {name: Box(*rng.uniform(8, SIZE - 8, 2), 7.0) for name in prompt.objects}
        return Scene(prompt.scene, z)
    return scene


def wrong(prompt: Prompt, rng: np.random.Generator) -> Scene | None:
    """A clear scene in which one relation of the prompt is replaced by another; None where none was found."""
    edits = [e for i, relation in enumerate(prompt.relations) for e in alternatives(i, relation)]
    scenes = (solve(prompt.objects, applied(prompt.relations, [edits[i]]), prompt.scene, rng, tries=8)
              for i in rng.permutation(len(edits)).tolist())
    return next((scene for scene in scenes if scene is not None), None)


class TinyPainter:
    """Draws prompts of the tabletop world exactly, or wrongly with a set probability.

    Args:
        wrong_layout: probability of breaking one relation, so that verification has something to reject.
    """

    name = "tiny-painter"

    def __init__(self, *, wrong_layout: float = 0.1) -> None:
        self.wrong_layout = wrong_layout
        self.settings = {"wrong_layout": wrong_layout, "license": "Apache-2.0"}

    def scene(self, *, prompt: Prompt, seed: int) -> Scene:
        """The layout that `generate` paints for this prompt and seed."""
        return self._scene(prompt, np.random.default_rng(seed))

    def generate(self, *, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        """One 64 x 64 picture per prompt; a prompt and a seed always give the same picture.

        Raises:
            ValueError: a prompt is not about the tabletop world.
        """
        if strange := next((p for p in prompts if p.scene not in SCENES), None):
            raise ValueError(f"prompt {strange.id} is about a {strange.scene}, and the tiny painter draws the tabletop "
                             "world alone; write prompts with data.writer=tiny-grammar")
        rngs = [np.random.default_rng(seed) for seed in seeds]
        return [Image.fromarray(paint(self._scene(p, rng), rng)) for p, rng in zip(prompts, rngs, strict=True)]

    def _scene(self, prompt: Prompt, rng: np.random.Generator) -> Scene:
        scene = solve(prompt.objects, prompt.relations, prompt.scene, rng)
        if scene is None:
            return scatter(prompt, rng)
        return (wrong(prompt, rng) if rng.random() < self.wrong_layout else None) or scene
