"""Judges pictures of the tabletop world from their pixels alone (a `Verifier`).

Pixels are sorted by colour, each colour's region is fitted with the four outlines (pixels hidden by other objects
count neither for nor against a fit), and relations are evaluated on the fitted boxes. What is neither ground nor an
object is litter.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from spatialt2i.core.types import Prompt, Verdict
from spatialt2i.tiny.world import COLOURS, OBJECTS, SHAPES, SIZE, Box, covers, margin, outline

_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
_UNKNOWN = -1
_COLOUR_RADIUS = 90.0  # farthest RGB distance at which a pixel still has a colour of the palette
_MIN_FIT = 0.78  # least overlap (intersection over union) of a region with the outline it is taken for
_MIN_CORE = 4  # pixels whose whole 3 x 3 neighbourhood has the colour; rims and blends have none
_HIDDEN_PRICE = 0.12  # weight of an outline's pixel under other paint; a missing one weighs 1
_MAX_STRAY = 10  # pixels of an object's colour outside its outline before it counts as malformed; also of litter
_GROUND_RADIUS = 30.0  # farthest RGB distance from the ground's median at which a pixel is ground; light varies by 10
_RIM = 2.5  # pixels to either side of an outline where blends and an autoencoder's ringing are nobody's litter
_CENTRES = np.arange(SIZE, dtype=np.float32) + 0.5
_NEIGHBOURHOOD = np.ones((3, 3), dtype=bool)
_AROUND = np.array(list(itertools.product((-1, 0, 1), repeat=3)), dtype=np.float32)


@dataclass(frozen=True)
class Found:
    """What one colour's region turned out to be.

    Attributes:
        shape: the best fitting shape.
        box: its place in pixels.
        fit: intersection over union, 0 to 1.
        fault: why it is no well-formed single object; empty when it is one.
    """

    shape: str
    box: Box
    fit: float
    fault: str = ""


def segment(pixels: np.ndarray) -> np.ndarray:
    """Colour index per pixel: 0 background, 1.. in the order of `COLOURS`, -1 neither.

    Args:
        pixels: uint8 [64, 64, 3].
    """
    rgb = pixels.reshape(-1, 3).astype(np.float32)
    distance = (rgb**2).sum(1, keepdims=True) - 2 * rgb @ _PALETTE.T + (_PALETTE**2).sum(1)
    labels = distance.argmin(1) + 1
    labels[distance.min(1) > _COLOUR_RADIUS**2] = _UNKNOWN
    labels = labels.reshape(SIZE, SIZE)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    low, high = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    labels[(low >= 150) & (high - low <= 75)] = 0
    return labels


class _View:
    """A window of the picture, against which outlines are tried.

    Args:
        region: the pixels to explain. own: all pixels of its colour. hidden: those of other paint; bool [h, w] each.
        x, y: centres of the columns [w] and of the rows [h] in pixels.
    """

    def __init__(self, region: np.ndarray, own: np.ndarray, hidden: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        self.x, self.y = x, y[:, None]
        self.layers = np.stack([region, own, hidden, np.ones_like(own)], -1).reshape(-1, 4).astype(np.float32)
        self.size = float(np.count_nonzero(region))

    def overlap(self, places: np.ndarray, shape: str) -> np.ndarray:
        """Intersection over union with outlines at N places [N, 3] (cx, cy, r); hidden pixels weigh little."""
        cx, cy, r = (places[:, i, None, None] for i in range(3))
        inside = covers(shape, self.x - cx, self.y - cy, r)
        # one product counts the pixels of all four layers inside every outline; float32 holds such counts exactly
        explained, common, covered, area = (inside.reshape(len(places), -1).astype(np.float32) @ self.layers).T
        # a price for what is hidden, or an outline could grow under its neighbours for nothing
        return common / (self.size - explained + area - covered + _HIDDEN_PRICE * covered)

    def best(self, places: np.ndarray, shape: str) -> tuple[float, np.ndarray]:
        """The best of some places, with its overlap."""
        overlap = self.overlap(places, shape)
        i = int(overlap.argmax())
        return float(overlap[i]), places[i]


def _window(region: np.ndarray, reach: int) -> tuple[slice, slice]:
    """The rows and columns of a region, and ``reach`` pixels around it."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    return (slice(max(int(rows[0]) - reach, 0), int(rows[-1]) + 1 + reach),
            slice(max(int(columns[0]) - reach, 0), int(columns[-1]) + 1 + reach))


def _fit(region: np.ndarray, own: np.ndarray, painted: np.ndarray, *, whole: bool) -> Found:
    """The shape and place that explain a region best; unless it is whole, what other paint hides may belong to it."""
    rows, columns = _window(region, 0)
    y0, y1, x0, x1 = rows.start, rows.stop, columns.start, columns.stop
    half = max(x1 - x0, y1 - y0) / 2
    at = _window(region, 2 if whole else int(half) + 3)
    view = _View(region[at], own[at], painted[at] & ~own[at], _CENTRES[at[1]], _CENTRES[at[0]])
    if whole:
        starts = [((x0 + x1) / 2, (y0 + y1) / 2, half)]
    else:
        starts = [(cx, cy, r) for r in (half, 1.15 * half, 1.35 * half, 1.6 * half)
                  for cx in {x0 + r, x1 - r, (x0 + x1) / 2} for cy in {y0 + r, y1 - r, (y0 + y1) / 2}]
    places = np.array(starts, dtype=np.float32)
    tried = sorted(((*view.best(places, shape), shape) for shape in SHAPES), key=lambda f: -f[0])
    fits = []
    for overlap, place, shape in tried[:1 if whole and tried[0][0] > 0.9 else 2 if whole else 3]:
        for step in (0.5,) if whole else (1.0, 0.5):
            overlap, place = view.best(place + step * _AROUND, shape)
        fits.append((overlap, place, shape))
    overlap, (cx, cy, r), shape = max(fits, key=lambda f: f[0])
    return Found(shape, Box(float(cx), float(cy), float(r)), overlap)


def detect(pixels: np.ndarray, labels: np.ndarray) -> tuple[dict[str, Found], int]:
    """Every colour's object, and how many pixels of litter there are.

    Args:
        pixels: uint8 [64, 64, 3]. labels: what `segment` returned for them.
    """
    found: dict[str, Found] = {}
    core = ndimage.maximum_filter(labels, 3) == ndimage.minimum_filter(labels, 3)
    cores = np.bincount(labels[core] + 1, minlength=len(COLOURS) + 2)  # pixels of each label, from -1
    for index, colour in enumerate(COLOURS, start=1):
        if cores[index + 1] >= _MIN_CORE:
            found[colour] = _find(labels, core, index)
    smear = core & (labels == _UNKNOWN)  # unrecognisable paint is nobody's blend where it has a core
    return found, int(np.count_nonzero(smear | _litter(pixels, labels, found)))


def _litter(pixels: np.ndarray, labels: np.ndarray, found: dict[str, Found]) -> np.ndarray:
    """Where something is drawn that is no part of a well-formed object, however thin or pale; bool [64, 64].

    Within `_RIM` of an object's outline anything may be; farther inside only its own colour, or that of an object which
    lies over it.
    """
    light = pixels[labels == 0]
    ground = np.median(light, axis=0).astype(np.float32) if len(light) else np.full(3, np.inf, dtype=np.float32)
    away = pixels - ground
    strange = np.einsum("yxc,yxc->yx", away, away) > _GROUND_RADIUS**2
    rows, columns = np.nonzero(strange)
    explained = np.zeros(len(rows), dtype=bool)
    for index, colour in enumerate(COLOURS, start=1):
        one = found.get(colour)
        if one is not None and not one.fault:
            from_outline = outline(one.shape, _CENTRES[columns] - one.box.cx, _CENTRES[rows] - one.box.cy, one.box.r)
            own = labels[rows, columns] == index
            explained |= (from_outline <= _RIM) & (own | (from_outline >= -_RIM))
    strange[rows, columns] = ~explained
    return strange


def _find(labels: np.ndarray, core: np.ndarray, index: int) -> Found:
    """What the region of a colour is."""
    region = labels == index
    at, parts = _window(region, 0), np.zeros(region.shape, dtype=np.int32)
    parts[at], count = ndimage.label(region[at], _NEIGHBOURHOOD)
    cores = np.bincount(parts[core], minlength=count + 1)
    cores[0] = 0  # the background of the parts
    if count > 1:
        region = (cores > 0)[parts]  # parts without a core are rims
    own = region
    at = _window(region, 3)
    others = core[at] & (labels[at] != 0) & (labels[at] != index)
    whole = not (ndimage.binary_dilation(region[at], _NEIGHBOURHOOD, iterations=3) & others).any()
    if not whole:
        # opening drops rims: the blend of two neighbours' colours along their edge can look like a third colour
        region = region & ndimage.maximum_filter(region & core, 3)
    best = _fit(region, own, labels != 0, whole=whole)
    if best.fit < _MIN_FIT and np.count_nonzero(cores) > 1:
        largest = parts == int(cores.argmax())
        best = dataclasses.replace(_fit(largest, largest, labels != 0, whole=False), fault="drawn more than once")
    return best if best.fault else dataclasses.replace(best, fault=_fault(best, region))


def _fault(found: Found, region: np.ndarray) -> str:
    box = found.box
    stray = outline(found.shape, _CENTRES[None, :] - box.cx, _CENTRES[:, None] - box.cy, box.r) > 1.5
    if found.fit < _MIN_FIT:
        return f"malformed (fits a {found.shape} at {found.fit:.2f})"
    if (stray & region).sum() > _MAX_STRAY:
        return "drawn with stray parts"
    return ""


def _with_depth(labels: np.ndarray, a: Found, b: Found, ia: int, ib: int) -> tuple[Box, Box]:
    """Two boxes with the depth that the pixels of their common area tell."""
    common = np.ones_like(labels, dtype=bool)
    for f in (a, b):
        common &= covers(f.shape, _CENTRES[None, :] - f.box.cx, _CENTRES[:, None] - f.box.cy, f.box.r)
    na, nb = int((labels[common] == ia).sum()), int((labels[common] == ib).sum())
    return dataclasses.replace(a.box, z=int(na > nb)), dataclasses.replace(b.box, z=int(nb > na))


class TinyOracle:
    """Exact verdicts for painted and for generated pictures."""

    name = "tiny-oracle-2"

    def verify(self, *, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Verdict]:
        """One verdict per picture. Objects that the world does not know are not judged."""
        seen: dict[int, tuple[np.ndarray, dict[str, Found], int]] = {}  # a picture is looked at once, for all prompts
        for image in images:
            if id(image) not in seen:
                seen[id(image)] = _look(image)
        return [self._judge_all(prompt, *seen[id(image)]) for image, prompt in zip(images, prompts, strict=True)]

    def _judge_all(self, prompt: Prompt, labels: np.ndarray, found: dict[str, Found], litter: int) -> Verdict:
        names = prompt.objects
        colours = [name.split()[0] for name in names]
        known = {n: n in OBJECTS and colours.count(c) == 1 for n, c in zip(names, colours, strict=True)}
        reasons = {name: _why_absent(name, found) for name in names if known[name]}
        present = tuple(not reasons[n] if known[n] else None for n in names)
        relations, why = [], []
        for relation in prompt.relations:
            holds, reason = _judge(relation, known, reasons, found, labels)
            relations.append(holds)
            why.append(reason)
        asked = {name.split()[0] for name in names if known[name] and not reasons[name]}
        extra = sorted(set(found) - asked)
        clean = not extra and litter <= _MAX_STRAY if all(known.values()) else None
        parts = (*relations, *present, clean)
        overall = None if None in parts else all(parts)
        evidence: dict[str, Any] = {
            "boxes": {f"{c} {f.shape}": [round(v, 1) for v in f.box.corners] for c, f in found.items()},
            "reasons": why, "unasked": extra, "litter_pixels": litter}
        return Verdict(overall, tuple(relations), present, clean, self.name, evidence)


def _look(image: Image.Image) -> tuple[np.ndarray, dict[str, Found], int]:
    """The labels of a picture's pixels, and what `detect` finds in them."""
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"))
    labels = segment(pixels)
    return labels, *detect(pixels, labels)


def _why_absent(name: str, found: dict[str, Found]) -> str:
    colour, shape = name.split()
    if colour not in found:
        return f"no {name}: nothing {colour} in the picture"
    if found[colour].fault:
        return f"no {name}: the {colour} object is {found[colour].fault}"
    if found[colour].shape != shape:
        return f"no {name}: the {colour} object is a {found[colour].shape}"
    return ""


def _judge(relation: Any, known: dict[str, bool], reasons: dict[str, str], found: dict[str, Found],
           labels: np.ndarray) -> tuple[bool | None, str]:
    """Whether one relation holds, and why not."""
    if not all(known[n] for n in relation.names):
        return None, "not judged: an object is not of this world, or its colour is named twice"
    absent = next((reasons[n] for n in relation.names if reasons[n]), "")
    if absent:
        return False, absent
    boxes = {n: found[n.split()[0]].box for n in relation.names}
    if relation.predicate in ("in front of", "behind"):
        a, b = relation.names
        index = {c: i for i, c in enumerate(COLOURS, start=1)}
        fa, fb = (found[n.split()[0]] for n in (a, b))
        boxes[a], boxes[b] = _with_depth(labels, fa, fb, index[a.split()[0]], index[b.split()[0]])
    value = float(margin(relation, boxes))
    return (True, "") if value > 0 else (False, f"misplaced by {abs(value):.1f} pixels")
