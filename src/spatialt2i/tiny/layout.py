"""Places objects so that every relation of a prompt holds with a margin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spatialt2i.core.types import Relation
from spatialt2i.tiny.world import MARGIN, MARGINS, OVERLAPS, SIZE, Box, Scene, apart, covered_share, depths, radius_range

_AXIS = np.arange(SIZE, dtype=np.float64)
_GRID_X, _GRID_Y = (a.ravel() for a in np.meshgrid(_AXIS, _AXIS))


def overlapping(relations: Sequence[Relation]) -> set[frozenset[str]]:
    """The pairs of objects that a relation makes share pixels."""
    return {frozenset(r.names) for r in relations if r.predicate in OVERLAPS}


def places(name: str, r: float, z: int, placed: dict[str, Box], relations: Sequence[Relation],
           shared: set[frozenset[str]], rng: np.random.Generator) -> Box:
    """All places where an object may stand, given the objects that stand already.

    Only relations whose other objects are all placed are looked at. Objects that no relation overlaps keep 2 pixels
    of distance, related ones may touch.

    Returns:
        A box whose ``cx`` and ``cy`` are arrays of the legal centres in pixels, possibly empty.
    """
    shift = rng.random(2)
    x, y = _GRID_X + shift[0], _GRID_Y + shift[1]
    ok = (x >= r + 1) & (x <= SIZE - 1 - r) & (y >= r + 1) & (y <= SIZE - 1 - r)
    x, y = x[ok], y[ok]
    touching = {n for q in relations if name in q.names and q.predicate in ("on top of", "next to") for n in q.names}
    for other, box in placed.items():
        if frozenset((name, other)) not in shared:
            keep = apart(Box(x, y, r), box, 0.0 if other in touching else 2.0)
            x, y = x[keep], y[keep]
    for q in relations:
        if name in q.names and all(n == name or n in placed for n in q.names):
            here = Box(x, y, r, z)
            keep = MARGINS[q.predicate](*(here if n == name else placed[n] for n in q.names)) >= MARGIN
            x, y = x[keep], y[keep]
    return Box(x, y, r, z)


def choose(options: Box, rng: np.random.Generator) -> Box | None:
    """One of the legal places at random, None where there is none."""
    if not len(options.cx):
        return None
    i = int(rng.integers(len(options.cx)))
    return Box(float(options.cx[i]), float(options.cy[i]), options.r, options.z)


def solve(objects: Sequence[str], relations: Sequence[Relation], place: str, rng: np.random.Generator,
          tries: int = 40) -> Scene | None:
    """A random scene in which every relation holds by at least `MARGIN`; None when none was found.

    Args:
        objects: names, in the order in which they are placed.
        relations: what must hold.
        place: a key of `spatialt2i.tiny.world.SCENES`.
        rng: where the randomness comes from.
        tries: restarts before giving up.
    """
    z, shared = depths(relations), overlapping(relations)
    ranges = {name: radius_range(name, relations, len(objects)) for name in objects}
    for _ in range(tries):
        placed: dict[str, Box] = {}
        for name in objects:
            box = choose(places(name, rng.uniform(*ranges[name]), z.get(name, 0), placed, relations, shared, rng), rng)
            if box is None:
                break
            placed[name] = box
        if len(placed) == len(objects) and visible(relations, placed):
            return Scene(place, placed)
    return None


def visible(relations: Sequence[Relation], boxes: dict[str, Box]) -> bool:
    """Whether every covered object is covered enough to be seen as such, and shows enough of itself to be named."""
    pairs = [r.names if r.predicate == "in front of" else r.names[::-1] for r in relations
             if r.predicate in ("in front of", "behind")]
    return all(0.1 <= covered_share(front, back, boxes) <= 0.4 for front, back in pairs)
