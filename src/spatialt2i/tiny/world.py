"""The tabletop world: its objects, its places, and what each spatial word means in pixels.

Everything here is exact geometry on a 64 x 64 canvas, x to the right and y downwards. ``docs/world.md`` holds the same
definitions as a table. A predicate is a signed margin in pixels: positive means that it holds, and scenes closer than
`MARGIN` to the boundary are never made, so that no picture is ambiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from spatialt2i.core.types import Relation

SIZE = 64
CENTRE = SIZE / 2
MARGIN = 2.0  # pixels between any stated relation and its boundary, in every scene that is made

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (45, 75, 215), "yellow": (240, 205, 35),
    "purple": (140, 50, 185), "cyan": (50, 195, 220), "pink": (250, 130, 195), "black": (35, 35, 40),
}
SHAPES = ("circle", "square", "triangle", "cross")
CONTAINERS = ("circle", "square")  # shapes wide enough to hold another object
SCENES: dict[str, tuple[int, int, int]] = {
    "on a kitchen table": (226, 208, 180), "on a marble counter": (236, 236, 238), "on a school desk": (218, 200, 168),
    "on a picnic blanket": (235, 214, 212), "on a lawn": (203, 224, 196), "on a sandy beach": (238, 226, 196),
    "on a garage floor": (204, 206, 210), "on a workbench": (214, 204, 196), "on a bathroom tile": (212, 228, 236),
    "on a balcony": (222, 222, 212), "on a window sill": (240, 234, 224), "on a white shelf": (244, 244, 242),
}
OBJECTS = tuple(f"{c} {s}" for c in COLOURS for s in SHAPES)


@dataclass(frozen=True)
class Box:
    """A square region; the fields may be arrays that broadcast, which is how whole grids of places are tested at once.

    Attributes:
        cx, cy: centre in pixels. r: half the side. z: depth, higher is nearer to the viewer.
    """

    cx: float | np.ndarray
    cy: float | np.ndarray
    r: float | np.ndarray
    z: int = 0

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) in pixels."""
        return self.cx - self.r, self.cy - self.r, self.cx + self.r, self.cy + self.r


@dataclass(frozen=True)
class Scene:
    """A place and the boxes of the objects that stand there, with exact coordinates.

    Attributes:
        place: a key of `SCENES`.
        boxes: object name -> box.
    """

    place: str
    boxes: dict[str, Box]


def _left(a: Box, b: Box) -> np.ndarray:
    # within 45 degrees of straight left, and apart: the four sides exclude each other and exclude overlap
    return np.minimum((b.cx - a.cx) - np.abs(b.cy - a.cy), (b.cx - b.r) - (a.cx + a.r) + 3)


def _transposed(box: Box) -> Box:
    return Box(box.cy, box.cx, box.r, box.z)


def _above(a: Box, b: Box) -> np.ndarray:
    return _left(_transposed(a), _transposed(b))


def _overlap(a: Box, b: Box) -> np.ndarray:
    distance, reach = np.hypot(a.cx - b.cx, a.cy - b.cy), a.r + b.r
    return np.minimum(distance - 0.3 * reach, 0.75 * reach - distance)


def _front(a: Box, b: Box) -> np.ndarray:
    return _overlap(a, b) if a.z > b.z else -np.abs(_overlap(a, b)) - MARGIN


def _inside(a: Box, b: Box) -> np.ndarray:
    return b.r - np.hypot(a.cx - b.cx, a.cy - b.cy) - 1.3 * a.r


def _on_top(a: Box, b: Box) -> np.ndarray:
    gap = np.abs((b.cy - b.r) - (a.cy + a.r))
    return np.minimum(4 - gap, 0.75 * np.minimum(a.r, b.r) - np.abs(a.cx - b.cx))


def _next_to(a: Box, b: Box) -> np.ndarray:
    gap = np.abs(a.cx - b.cx) - a.r - b.r
    return np.minimum(np.minimum(gap + 3, 9 - gap), 7 - np.abs(a.cy - b.cy))


def _between(a: Box, b: Box, c: Box) -> np.ndarray:
    ways = [np.minimum(side(p, a), side(a, q)) for side in (_left, _above) for p, q in ((b, c), (c, b))]
    return np.maximum(np.maximum(ways[0], ways[1]), np.maximum(ways[2], ways[3]))


def _centre(a: Box) -> np.ndarray:
    return 8 - np.maximum(np.abs(a.cx - CENTRE), np.abs(a.cy - CENTRE))


def _left_edge(a: Box) -> np.ndarray:
    # a container has less room along the edge, so that none is at two edges at once
    return np.minimum(6 - (a.cx - a.r), np.minimum(15, 24.5 - a.r) - np.abs(a.cy - CENTRE))


def _top_left(a: Box) -> np.ndarray:
    return np.minimum(6 - (a.cx - a.r), 6 - (a.cy - a.r))


def _mirrored(a: Box, x: bool, y: bool) -> Box:
    return Box(SIZE - a.cx if x else a.cx, SIZE - a.cy if y else a.cy, a.r, a.z)


MARGINS: dict[str, Callable[..., np.ndarray]] = {
    "left of": _left,
    "right of": lambda a, b: _left(b, a),
    "above": _above,
    "below": lambda a, b: _above(b, a),
    "in front of": _front,
    "behind": lambda a, b: _front(b, a),
    "inside": _inside,
    "on top of": _on_top,
    "next to": _next_to,
    "between": _between,
    "in the centre": _centre,
    "at the left edge": _left_edge,
    "at the right edge": lambda a: _left_edge(_mirrored(a, True, False)),
    "at the top edge": lambda a: _left_edge(_transposed(a)),
    "at the bottom edge": lambda a: _left_edge(_transposed(_mirrored(a, False, True))),
    "in the top left corner": _top_left,
    "in the top right corner": lambda a: _top_left(_mirrored(a, True, False)),
    "in the bottom left corner": lambda a: _top_left(_mirrored(a, False, True)),
    "in the bottom right corner": lambda a: _top_left(_mirrored(a, True, True)),
}
PREDICATES = tuple(MARGINS)
SIDES = ("left of", "right of", "above", "below")
OVERLAPS = ("in front of", "behind", "inside")  # the only relations whose objects may share pixels
TOUCHING = ("on top of", "next to")  # relations whose objects may stand side by side without a gap
GAP = 2.0  # pixels between other objects
ABSOLUTE = PREDICATES[PREDICATES.index("in the centre"):]
EDGES, CORNERS = ABSOLUTE[1:5], ABSOLUTE[5:]
ARITY = {p: 1 if p in ABSOLUTE else 3 if p == "between" else 2 for p in PREDICATES}


def margin(relation: Relation, boxes: dict[str, Box]) -> float | np.ndarray:
    """Signed margin in pixels of a relation between boxes; positive means that it holds."""
    return MARGINS[relation.predicate](*(boxes[name] for name in relation.names))


def apart(a: Box, b: Box, gap: float) -> np.ndarray:
    """Whether two boxes are at least ``gap`` pixels from each other along x or along y."""
    return np.maximum(np.abs(a.cx - b.cx), np.abs(a.cy - b.cy)) >= a.r + b.r + gap


def outline(shape: str, x: np.ndarray, y: np.ndarray, r: float | np.ndarray) -> np.ndarray:
    """Signed distance in pixels (negative inside, exact on the sides) to a shape that fills a box of half-size r."""
    if shape == "circle":
        return np.hypot(x, y) - r
    ax, ay = np.abs(x), np.abs(y)
    if shape == "square":
        return np.maximum(ax, ay) - r
    if shape == "triangle":  # apex up
        return np.maximum(y - r, (2 * ax - (y + r)) / np.sqrt(5))
    if shape == "cross":
        arm = 0.35 * r
        return np.minimum(np.maximum(ax - r, ay - arm), np.maximum(ax - arm, ay - r))
    raise ValueError(f"unknown shape {shape!r}: expected circle, square, triangle or cross")


def covers(shape: str, x: np.ndarray, y: np.ndarray, r: float | np.ndarray) -> np.ndarray:
    """Where `outline` is negative, faster: x and y may be axes that only the last, boolean step broadcasts."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return x * x + y * y < r * r
    if shape == "square":
        return (ax < r) & (ay < r)
    if shape == "triangle":
        return (y < r) & (2 * ax < y + r)
    if shape == "cross":
        arm = 0.35 * r
        return (ax < r) & (ay < arm) | (ax < arm) & (ay < r)
    raise ValueError(f"unknown shape {shape!r}: expected circle, square, triangle or cross")


def covered_share(front: str, back: str, boxes: dict[str, Box]) -> float:
    """Share of the object at the back that the one in front hides, 0 to 1."""
    a, b = boxes[front], boxes[back]
    at = np.linspace(-b.r, b.r, 15)
    x, y = at[None, :], at[:, None]
    behind = covers(back.split()[1], x, y, b.r)
    hidden = behind & covers(front.split()[1], x + b.cx - a.cx, y + b.cy - a.cy, a.r)
    return np.count_nonzero(hidden) / np.count_nonzero(behind)


def radius_range(name: str, relations: Sequence[Relation], n_objects: int) -> tuple[float, float]:
    """Smallest and largest half-size of an object: containers are large, their contents small, crowds smaller."""
    if any(r.predicate == "inside" and r.objects[0] == name for r in relations):
        return 15.0, 16.5
    if any(r.predicate == "inside" and r.subject == name for r in relations):
        return 6.0, 6.8
    return (8.0, 9.5) if n_objects <= 4 else (6.5, 7.5)


def depths(relations: Sequence[Relation]) -> dict[str, int]:
    """Depth of each object that overlaps another: the one in front (or inside) is painted later."""
    z: dict[str, int] = {}
    for r in relations:
        if r.predicate in ("in front of", "inside"):
            z[r.subject] = 1
        elif r.predicate == "behind":
            z[r.objects[0]] = 1
    return z
