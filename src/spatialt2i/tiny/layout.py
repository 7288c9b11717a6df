"""Places objects so that every relation of a prompt holds with a margin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from spatialt2i.core.types import Relation
from spatialt2i.tiny.bounds import bounds, fixed, window
from spatialt2i.tiny.world import (
    GAP, MARGIN, MARGINS, OVERLAPS, SIZE, TOUCHING, Box, Scene, apart, covered_share, depths, radius_range,
)

_ANYWHERE = (np.array([0, 0, 0, -SIZE]), np.array([SIZE, SIZE, 2 * SIZE, SIZE]))
_COVERED = (0.1, 0.4)  # share of a covered object that must be hidden, to be seen as such and still be named


def overlapping(relations: Sequence[Relation]) -> set[frozenset[str]]:
    """The pairs of objects that a relation makes share pixels."""
    return {frozenset(r.names) for r in relations if r.predicate in OVERLAPS}


def places(name: str, r: float, z: int, placed: dict[str, Box], relations: Sequence[Relation],
           shared: set[frozenset[str]], rng: np.random.Generator,
           within: tuple[np.ndarray, np.ndarray] = _ANYWHERE) -> Box:
    """All places where an object may stand, given the objects that stand already.

    Only relations whose other objects are all placed are looked at. Objects that no relation overlaps keep `GAP`
    pixels of distance, or may touch.

    Args:
        name: the object. r: half its size in pixels. z: its depth.
        placed: where the other objects stand. relations: at least all that name the object. shared: what `overlapping`
            returned.
        rng: shifts the grid of places by less than a pixel.
        within: least and greatest x, y, x + y and x - y of the centre.

    Returns:
        A box whose ``cx`` and ``cy`` are arrays of the legal centres in pixels, possibly empty.
    """
    shift = rng.random(2)
    xs, ys = (np.arange(math.ceil(max(low, r + 1) - by), math.floor(min(high, SIZE - 1 - r) - by) + 1) + by
              for low, high, by in zip(within[0][:2].tolist(), within[1][:2].tolist(), shift.tolist(), strict=True))
    grid = np.empty((2, len(ys), len(xs)))
    grid[0], grid[1] = xs, ys[:, None]
    x, y = grid.reshape(2, -1)
    if within is not _ANYWHERE:
        u, v = x + y, x - y
        keep = (u >= within[0][2]) & (u <= within[1][2]) & (v >= within[0][3]) & (v <= within[1][3])
        x, y = x[keep], y[keep]
    touching: set[str] = set()
    for q in relations:
        if not len(x):  # most restarts of a search end here: nothing else can bring a place back
            break
        names = q.names
        if name in names:
            if q.predicate in TOUCHING:
                touching.update(names)
            if all(n == name or n in placed for n in names):
                here = Box(x, y, r, z)
                keep = MARGINS[q.predicate](*(here if n == name else placed[n] for n in names)) >= MARGIN
                x, y = x[keep], y[keep]
    for other, box in placed.items():
        if not len(x):
            break
        if frozenset((name, other)) not in shared:
            keep = apart(Box(x, y, r), box, 0.0 if other in touching else GAP)
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
    room = bounds(objects, relations)
    if room is None:
        return None
    z, shared = depths(relations), overlapping(relations)
    covering = [r.names if r.predicate == "in front of" else r.names[::-1] for r in relations
                if r.predicate in ("in front of", "behind")]  # (front, back)
    nested = [q for q in relations if q.predicate == "inside"]
    ranges = {name: radius_range(name, nested, len(objects)) for name in objects}
    about = {name: [q for q in relations if name in q.names] for name in objects}
    for _ in range(tries):
        placed: dict[str, Box] = {}
        left = room  # shrinks with every object that is placed
        for i, name in enumerate(objects):
            r = rng.uniform(*ranges[name])
            box = choose(places(name, r, z.get(name, 0), placed, about[name], shared, rng, window(left, i)), rng)
            if box is None:
                break
            placed[name] = box
            if not _visible(name, covering, placed):
                break
            left = fixed(left, i, box.cx, box.cy)
        else:
            return Scene(place, placed)
    return None


def _visible(name: str, covering: Sequence[tuple[str, ...]], placed: dict[str, Box]) -> bool:
    """Whether what the object covers, or what covers it, is hidden enough and not too much."""
    return all(_COVERED[0] <= covered_share(front, back, placed) <= _COVERED[1] for front, back in covering
               if name in (front, back) and front in placed and back in placed)
