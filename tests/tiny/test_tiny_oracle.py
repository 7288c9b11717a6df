"""The oracle: right about painted pictures, strict about bad ones."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from spatialt2i.core.types import Prompt, Relation, Verdict
from spatialt2i.tiny.grammar import TinyWriter
from spatialt2i.tiny.oracle import TinyOracle
from spatialt2i.tiny.painter import TinyPainter, paint
from spatialt2i.tiny.world import COLOURS, Box, Scene, margin, outline

LEFT = Relation("left of", "red circle", ("blue square",))
PROMPT = Prompt("o", "A red circle is left of a blue square.", "on a lawn", (LEFT,))
RIGHT_PLACES = {"red circle": Box(16.0, 32.0, 9.0), "blue square": Box(46.0, 34.0, 9.0)}


def picture(boxes: dict[str, Box]) -> np.ndarray:
    return paint(Scene("on a lawn", boxes), np.random.default_rng(0))


def judge(pixels: np.ndarray | Image.Image, prompt: Prompt = PROMPT) -> Verdict:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    return TinyOracle().verify(images=[image], prompts=[prompt])[0]


def reason(verdict: Verdict) -> str:
    return verdict.evidence["reasons"][0]


def test_it_agrees_with_the_coordinates() -> None:
    writer, painter, oracle = TinyWriter(), TinyPainter(wrong_layout=0.3), TinyOracle()
    right, total = defaultdict(int), defaultdict(int)
    for i in range(160):
        prompt = writer.write(id=f"o{i}", n_relations=1 + i % 8, seed=i)
        scene = painter.scene(prompt=prompt, seed=i)
        image = Image.fromarray(paint(scene, np.random.default_rng(i)))
        says = oracle.verify(images=[image], prompts=[prompt])[0].relations
        for relation, holds in zip(prompt.relations, says, strict=True):
            total[relation.predicate] += 1
            right[relation.predicate] += holds == (margin(relation, scene.boxes) > 0)
    assert sum(right.values()) / sum(total.values()) >= 0.99
    assert all(right[p] >= total[p] - max(1, 0.02 * total[p]) for p in total)


def test_a_right_picture_with_its_evidence() -> None:
    verdict = judge(picture(RIGHT_PLACES))
    assert verdict.overall and verdict.clean and verdict.relations == (True,) and verdict.present == (True, True)
    assert verdict.judge == "tiny-oracle-2"
    assert np.allclose(verdict.evidence["boxes"]["red circle"], [7, 23, 25, 41], atol=1)


def test_a_misplaced_object() -> None:
    verdict = judge(picture({"red circle": RIGHT_PLACES["blue square"], "blue square": RIGHT_PLACES["red circle"]}))
    assert (verdict.overall, verdict.relations, verdict.present, verdict.clean) == (False, (False,), (True, True), True)
    assert "misplaced by" in reason(verdict)


def test_a_blank_picture() -> None:
    verdict = judge(np.full((64, 64, 3), 220, dtype=np.uint8))
    assert (verdict.overall, verdict.relations, verdict.clean) == (False, (False,), True)
    assert verdict.present == (False, False)
    assert "nothing red in the picture" in reason(verdict)


def test_confetti_of_every_colour_is_never_right() -> None:
    rng = np.random.default_rng(0)
    for size in (2, 4, 8, 16):
        for seed in range(4):
            cells = np.random.default_rng(seed).integers(0, len(COLOURS), (64 // size, 64 // size))
            pixels = np.array(list(COLOURS.values()), dtype=np.uint8)[cells].repeat(size, 0).repeat(size, 1)
            verdict = judge(pixels)
            assert verdict.overall is False and verdict.clean is False
    pixels = picture(RIGHT_PLACES)
    at = rng.integers(0, 60, (60, 2))
    for y, x in at:
        pixels[y:y + 4, x:x + 4] = list(COLOURS.values())[int(rng.integers(len(COLOURS)))]
    assert judge(pixels).overall is False


def test_a_duplicated_object() -> None:
    pixels = picture(RIGHT_PLACES | {"red circle": Box(14.0, 32.0, 9.0)})
    pixels[2:20, 40:58] = picture({"red circle": Box(49.0, 11.0, 9.0)})[2:20, 40:58]
    verdict = judge(pixels)
    assert verdict.present[0] is False and verdict.overall is False and "drawn more than once" in reason(verdict)


def test_another_shape() -> None:
    verdict = judge(picture({"red triangle": RIGHT_PLACES["red circle"], "blue square": RIGHT_PLACES["blue square"]}))
    assert (verdict.present, verdict.relations, verdict.clean) == ((False, True), (False,), False)
    assert "the red object is a triangle" in reason(verdict)


def test_a_malformed_object() -> None:
    pixels = picture(RIGHT_PLACES)
    pixels[23:41, 16:25] = pixels[0, 0]  # half of the circle is gone
    pixels[20:24, 4:22] = COLOURS["red"]
    verdict = judge(pixels)
    assert verdict.present[0] is False and verdict.overall is False


def test_an_object_nobody_asked_for() -> None:
    verdict = judge(picture(RIGHT_PLACES | {"yellow cross": Box(32.0, 54.0, 8.0)}))
    assert (verdict.relations, verdict.clean, verdict.overall) == ((True,), False, False)
    assert verdict.evidence["unasked"] == ["yellow"]


def test_smears_are_not_clean() -> None:
    pixels = picture(RIGHT_PLACES)
    pixels[50:58, 20:40] = (120, 130, 110)  # a colour of no object and no ground
    verdict = judge(pixels)
    assert verdict.relations == (True,) and verdict.clean is False and verdict.overall is False


# ---- litter

def away(pixels: np.ndarray, litter: np.ndarray, band: float = 4) -> np.ndarray:
    """The picture with litter everywhere but on its objects and in a band around them."""
    at = np.arange(64) + 0.5
    near = [outline(n.split()[1], at[None, :] - b.cx, at[:, None] - b.cy, b.r) < band for n, b in RIGHT_PLACES.items()]
    return np.where(np.any(near, axis=0)[..., None], pixels, litter).astype(np.uint8)


def littered(kind: str) -> np.ndarray:
    pixels, rng = picture(RIGHT_PLACES), np.random.default_rng(0)
    if kind == "noise":
        return away(pixels, rng.integers(0, 256, (64, 64, 3)))
    if kind == "pale noise":
        return away(pixels, rng.integers(150, 226, (64, 64, 3)))
    if kind == "lines":
        return away(pixels, np.where((np.arange(64) % 4 == 0)[:, None, None], 0, pixels))
    if kind == "one line":
        pixels[3, 10:40] = COLOURS["black"]
    if kind == "specks of a named colour":
        pixels[2:20:3, 4:60:8] = COLOURS["red"]
    if kind == "stripes on an object":
        pixels[27:42:2, 40:53] = COLOURS["green"]
    return pixels


@pytest.mark.parametrize("kind", ["noise", "pale noise", "lines", "one line", "specks of a named colour",
                                  "stripes on an object"])
def test_litter_without_a_core_is_not_clean(kind: str) -> None:
    verdict = judge(littered(kind))
    assert verdict.clean is False and verdict.overall is False and verdict.evidence["litter_pixels"] > 10
    if kind != "stripes on an object":
        assert verdict.relations == (True,) and verdict.present == (True, True)


@pytest.mark.parametrize("colour", [(160, 160, 160), (255, 190, 210), (150, 225, 225), (152, 152, 220)])
@pytest.mark.parametrize("side", [5, 16])
def test_a_pale_block_is_not_clean(colour: tuple[int, int, int], side: int) -> None:
    pixels = picture(RIGHT_PLACES)
    pixels[46:46 + side, 24:24 + side] = colour
    verdict = judge(pixels)
    assert verdict.relations == (True,) and verdict.clean is False and verdict.overall is False


def test_a_picture_in_which_nothing_is_ground_is_not_clean() -> None:
    pixels = np.full((64, 64, 3), 120, dtype=np.uint8)
    assert judge(pixels).clean is False


@pytest.mark.parametrize("kind", ["blur", "noise", "side light"])
def test_what_generators_do_to_every_picture_is_clean(kind: str) -> None:
    """Slight blur, small noise, and light from the side."""
    for i in range(12):
        prompt = TinyWriter().write(id=f"c{i}", n_relations=1 + i % 6, seed=40 + i)
        pixels = TinyPainter(wrong_layout=0).generate(prompts=[prompt], seeds=[i])[0]
        values = np.asarray(pixels, dtype=np.float64)
        if kind == "blur":
            values = ndimage.gaussian_filter(values, (0.6, 0.6, 0))
        elif kind == "noise":
            values = values + np.random.default_rng(i).normal(0, 6, values.shape)
        else:
            values = values + np.linspace(-10, 10, 64)[None, :, None]
        verdict = judge(np.clip(values, 0, 255).round().astype(np.uint8), prompt)
        assert verdict.clean and verdict.evidence["litter_pixels"] <= 5


@pytest.mark.parametrize("size", [256, 128, 100])
def test_pictures_of_another_size_are_resized(size: int) -> None:
    image = Image.fromarray(picture(RIGHT_PLACES)).resize((size, size), Image.Resampling.LANCZOS)
    verdict = judge(image)
    assert verdict.relations == (True,)


def test_greyscale_and_transparent_pictures_are_read() -> None:
    grey = judge(Image.fromarray(picture(RIGHT_PLACES)).convert("L"))
    assert grey.overall is False and grey.present == (False, False)
    assert judge(Image.fromarray(picture(RIGHT_PLACES)).convert("RGBA")).overall


@pytest.mark.parametrize("strength", [6, 12])
def test_noise_does_not_confuse_it(strength: float) -> None:
    noise = np.random.default_rng(0).normal(0, strength, (64, 64, 3))
    assert judge(np.clip(picture(RIGHT_PLACES) + noise, 0, 255).astype(np.uint8)).relations == (True,)


def test_objects_of_another_world_are_not_judged() -> None:
    unknown = Prompt("u", "A cat is left of a blue square. A red circle is above a red square.", "on a lawn", (
        Relation("left of", "cat", ("blue square",)), Relation("above", "red circle", ("red square",))))
    verdict = judge(picture(RIGHT_PLACES), unknown)
    assert verdict.relations == (None, None) and verdict.overall is None and verdict.clean is None
    assert verdict.present == (None, True, None, None)


def test_a_picture_under_several_prompts_gets_the_verdicts_it_gets_alone() -> None:
    image = Image.fromarray(picture(RIGHT_PLACES))
    other = Prompt("p", "", "on a lawn", (Relation("right of", "red circle", ("blue square",)),))
    both = TinyOracle().verify(images=[image, image], prompts=[PROMPT, other])
    assert both == [judge(image), judge(image, other)] and [v.overall for v in both] == [True, False]


def test_the_hidden_part_of_an_object_is_guessed_and_depth_is_read() -> None:
    relation = Relation("in front of", "red circle", ("blue square",))
    prompt = Prompt("d", "", "on a lawn", (relation,))
    behind = Prompt("d", "", "on a lawn", (Relation("behind", "red circle", ("blue square",)),))
    boxes = {"red circle": Box(26.0, 30.0, 9.0, 1), "blue square": Box(36.0, 36.0, 9.0, 0)}
    assert judge(picture(boxes), prompt).overall and not judge(picture(boxes), behind).overall
