"""Pictures in which objects are broken as an image generator breaks them, for pre-training the tiny Qwen2.5-VL.

A generator that is tuned on a score drifts to whatever the score does not see. All pictures of the dataset are well
drawn, so a score that learnt from nothing else cannot tell a triangle from a smear. Here a picture is a blend of two
paintings of a scene: one as it should be, and one in which an object is missing, another, elsewhere or washed out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from spatialt2i.tiny.painter import paint
from spatialt2i.tiny.world import COLOURS, SHAPES, SIZE, Box, Scene

SPOILT = 0.5  # share of pictures with something broken
LITTERED = 0.15  # share of pictures with something on the ground that is no object
KINDS = ("missing", "pale", "half", "eaten", "reshaped", "mixed", "recoloured", "patched", "smeared", "dented",
         "bleeding", "muddled", "torn", "twice")
_ROWS, _COLUMNS = np.mgrid[:SIZE, :SIZE] + 0.5


@dataclass(frozen=True)
class Picture:
    """A painted scene in which some things may be broken.

    Attributes:
        pixels: uint8 [64, 64, 3].
        broken: objects of the scene that are not to be seen as they should be.
        litter: whether something lies about that is no object.
        touched: bool [64, 64], where what is seen is not what the scene says.
    """

    pixels: np.ndarray
    broken: frozenset[str]
    litter: bool
    touched: np.ndarray


def spoil(scene: Scene, rng: np.random.Generator) -> Picture:
    """Paint a scene; in half of the pictures one object is broken, or several."""
    light = int(rng.integers(2**62))  # both paintings of a blend have the same light and colours
    pixels = paint(scene, np.random.default_rng(light)).astype(np.float32)
    touched, names, broken = np.zeros((SIZE, SIZE), dtype=bool), list(scene.boxes), []
    if rng.random() < SPOILT:
        broken = [name for name in names if rng.random() < 0.3] or [names[int(rng.integers(len(names)))]]
    for name in broken:
        other, mask = _breakage(scene, name, pixels, light, rng)
        pixels += mask[..., None] * (other - pixels)
        touched |= mask > 0
    litter = bool(rng.random() < LITTERED)
    if litter:
        other, mask = _litter(scene, rng)
        litter = bool(mask.any())
        pixels += mask[..., None] * (other - pixels)
        touched |= mask > 0
    return Picture(np.clip(pixels + 0.5, 0, 255).astype(np.uint8), frozenset(broken), litter, touched)


def _breakage(scene: Scene, name: str, pixels: np.ndarray, light: int,
              rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What to blend in to break an object: float32 [64, 64, 3], and how much of it where, [64, 64] in 0 to 1."""
    box, (colour, shape) = scene.boxes[name], name.split()
    others = [c for c in COLOURS if not any(c in n for n in scene.boxes)] or [c for c in COLOURS if c != colour]
    recoloured = f"{others[int(rng.integers(len(others)))]} {shape}"
    shapes = [s for s in SHAPES if s != shape]
    reshaped = f"{colour} {shapes[int(rng.integers(len(shapes)))]}"
    area, kind = _region(box), rng.choice(KINDS)
    if kind == "reshaped":
        return _painted(scene, name, reshaped, box, light), area
    if kind == "mixed":
        part = _half(box, rng) if rng.random() < 0.5 else rng.uniform(0.4, 0.6)
        return _painted(scene, name, reshaped, box, light), area * part
    if kind == "recoloured":
        return _painted(scene, name, recoloured, box, light), area
    if kind == "patched":
        part = _half(box, rng) if rng.random() < 0.5 else _blots(rng, 2.5)
        return _painted(scene, name, recoloured, box, light), area * part
    if kind == "bleeding":  # a neighbour's colour runs into it
        present = [n.split()[0] for n in scene.boxes if not n.startswith(colour)]
        recoloured = f"{present[int(rng.integers(len(present)))]} {shape}" if present else recoloured
        return _painted(scene, name, recoloured, box, light), area * _half(box, rng, softness=rng.uniform(3, 8))
    gone = Box(box.cx, box.cy, -9, box.z)  # outside of every outline: nothing is painted, but its colour is drawn
    without = _painted(scene, name, name, gone, light)
    if kind == "missing":
        return without, area
    if kind == "pale":
        return without, area * rng.uniform(0.4, 0.75)
    if kind == "half":
        return without, area * _half(box, rng)
    if kind == "eaten":
        return without, area * _blots(rng, 2.0)
    if kind == "smeared":
        width = rng.uniform(2.5, 4.5)
        return without + ndimage.gaussian_filter(pixels - without, (width, width, 0)), _region(box, 5)
    if kind == "dented":
        return without + _warped(pixels - without, rng.uniform(2.5, 4.5), rng), _region(box, 5)
    if kind == "muddled":  # two places, colours or outlines at once, each here and there
        layer = _painted(scene, name, reshaped if rng.random() < 0.5 else recoloured, box, light) - without
        shifted = ndimage.shift(_warped(layer, 3, rng), (*rng.uniform(-0.8, 0.8, 2) * box.r, 0), order=1)
        return without + ndimage.gaussian_filter(shifted, (1, 1, 0)), _region(box, 5) * _blots(rng, 3)
    if kind == "torn":  # the object and a shifted copy of it have grown together
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.6) * box.r
        moved = Box(box.cx + distance * np.cos(angle), box.cy + distance * np.sin(angle), box.r, box.z)
        copy = _painted(scene, name, name, moved, light)
        return copy, np.where(np.abs(copy - without).sum(-1) > 30, rng.uniform(0.5, 1), 0)
    place = _free(scene, box.r, rng)
    if place is None:
        return without, area
    return _painted(scene, name, name, dataclasses.replace(place, z=box.z), light), _region(place)


def _litter(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A blot, a stripe or noise on free ground; the mask is empty where there is no room."""
    place = _free(scene, rng.uniform(2.5, 6), rng)
    if place is None:
        return np.zeros((SIZE, SIZE, 3), dtype=np.float32), np.zeros((SIZE, SIZE))
    colour = np.array(list(COLOURS.values()))[int(rng.integers(len(COLOURS)))]
    colour = colour + rng.uniform(-40, 40, 3) + rng.normal(0, 1, (SIZE, SIZE, 3)) * rng.choice((0, 40))
    mask = _blots(rng, 1.5) if rng.random() < 0.6 else np.abs(_ROWS - place.cy) < rng.uniform(0.6, 2)
    return colour.astype(np.float32), _region(place, 0) * mask * rng.uniform(0.4, 1)


def _painted(scene: Scene, name: str, becomes: str, box: Box, light: int) -> np.ndarray:
    """The scene with one object replaced, in the same light."""
    boxes = {becomes if n == name else n: box if n == name else b for n, b in scene.boxes.items()
             if n == name or n != becomes}
    return paint(Scene(scene.place, boxes), np.random.default_rng(light)).astype(np.float32)


def _region(box: Box, margin: float = 1.5) -> np.ndarray:
    """1 on a box and a margin around it, else 0; float [64, 64]."""
    reach = box.r + margin
    return ((np.abs(_COLUMNS - box.cx) < reach) & (np.abs(_ROWS - box.cy) < reach)).astype(np.float32)


def _warped(layer: np.ndarray, by: float, rng: np.random.Generator) -> np.ndarray:
    """A layer [64, 64, 3] whose outlines are pushed about by some pixels."""
    push = ndimage.gaussian_filter(rng.normal(size=(2, SIZE, SIZE)), (0, 3, 3))
    at = np.mgrid[:SIZE, :SIZE] + by * push / push.std()
    return np.stack([ndimage.map_coordinates(layer[..., c], at, order=1) for c in range(3)], axis=-1)


def _half(box: Box, rng: np.random.Generator, softness: float = 1) -> np.ndarray:
    """1 on one side of a line near the middle of a box, 0 on the other; ``softness`` pixels wide."""
    angle, shift = rng.uniform(0, 2 * np.pi), rng.uniform(-0.25, 0.25) * box.r
    distance = (_COLUMNS - box.cx) * np.cos(angle) + (_ROWS - box.cy) * np.sin(angle) + shift
    return np.clip(distance / softness + 0.5, 0, 1)


def _blots(rng: np.random.Generator, width: float) -> np.ndarray:
    """Blots that cover about half of everything."""
    noise = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), width)
    return np.clip(2 * noise / noise.std() + 0.5, 0, 1)


def _free(scene: Scene, r: float, rng: np.random.Generator) -> Box | None:
    """A place of half-size r that no box of the scene touches; None where ten draws found none."""
    for _ in range(10):
        cx, cy = rng.uniform(r, SIZE - r, 2)
        if all(max(abs(cx - b.cx), abs(cy - b.cy)) > r + b.r + 2 for b in scene.boxes.values()):
            return Box(cx, cy, r)
    return None
