"""Proves without searching that relations contradict each other, which is what most random edits of a prompt do.

A relation bounds the difference of two centres along x, along y and along both diagonals (the sides are cones of 45
degrees, so along the diagonals they are exact). The bounds are closed under addition: shortest paths, as in the "simple
temporal networks" of Dechter, Meiri and Pearl (Artificial Intelligence 49:61, 1991). A cycle that asks a coordinate to
be smaller than itself is a contradiction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from spatialt2i.core.types import Relation
from spatialt2i.tiny.world import CENTRE, CORNERS, EDGES, GAP, MARGIN, OVERLAPS, SIZE, TOUCHING, radius_range

_X, _Y, _U, _V = range(4)  # u = x + y, v = x - y
_ROUNDS = 3  # each lets the bounds along the axes and along the diagonals tighten one another
# what "left of" and "above" mean: the first centre comes before the second along these, and v where it runs forwards
_ORDERS = {"left of": (_X, True), "above": (_Y, False)}
_REVERSED = {"right of": "left of", "below": "above"}
_Link = tuple[str, int, int]  # ("left of" or "above", first, second)


def bounds(objects: Sequence[str], relations: Sequence[Relation]) -> np.ndarray | None:
    """What the relations say of where the centres can be.

    Args:
        objects: names of all N objects. relations: what must hold by `MARGIN` between them.

    Returns:
        float64 [4, N+1, N+1]: along x, y, x + y and x - y, the greatest value of centre i minus centre j; node 0 is the
        origin, node i+1 the i-th object. None where this proves that no scene exists (the converse does not hold).
    """
    nested = [q for q in relations if q.predicate == "inside"]
    ranges = [radius_range(name, nested, len(objects)) for name in objects]
    low, high = (np.array([CENTRE, *(r[i] for r in ranges)]) for i in (0, 1))  # the origin is node 0, its radius unused
    index = {name: i for i, name in enumerate(objects, start=1)}
    upper = np.full((4, len(low), len(low)), 2.0 * SIZE)  # [axis, i, j]: greatest value of (centre i - centre j)
    upper[:2, 1:, 0] = SIZE - 1 - low[1:]
    upper[:2, 0, 1:] = -(low[1:] + 1)
    upper[:, range(len(low)), range(len(low))] = 0
    reach = _reach(relations, index, low)
    # between the centres of objects of which one is on a side of the other
    gap = np.maximum(np.maximum(low[:, None] + low - 1, reach), MARGIN)
    undecided: list[list[tuple[_Link, _Link]]] = []
    for relation in relations:
        at = [index[name] for name in relation.names]
        if relation.predicate in _REVERSED:
            _order(upper, (_REVERSED[relation.predicate], at[1], at[0]), gap)
        elif relation.predicate in _ORDERS:
            _order(upper, (relation.predicate, *at), gap)
        elif relation.predicate == "between":
            undecided.append([((side, p, at[0]), (side, at[0], q)) for side in _ORDERS for p, q in (at[1:], at[:0:-1])])
        for axis, i, j, bound in _bounds(relation.predicate, at, low, high):
            upper[axis, i, j] = min(upper[axis, i, j], bound)
    for _ in range(_ROUNDS):
        _close(upper)
        if _contradictory(upper):
            return None
        for ways in undecided:
            ways[:] = [way for way in ways if all(_may_order(upper, link, gap) for link in way)]
            if not ways:
                return None
            for link in ways[0] if len(ways) == 1 else ():
                _order(upper, link, gap)
        if not _keep_apart(upper, reach):
            return None
    _close(upper)
    return None if _contradictory(upper) else upper


def fixed(upper: np.ndarray, i: int, cx: float, cy: float) -> np.ndarray:
    """The bounds after object i (counted from 0) was placed there."""
    node, at = i + 1, np.array([cx, cy, cx + cy, cx - cy])[:, None, None]
    upper = np.minimum(upper, upper[:, :, node, None] + at + upper[:, 0, None, :])
    return np.minimum(upper, upper[:, :, 0, None] - at + upper[:, node, None, :])


def window(upper: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest x, y, x + y and x - y [4] of the centre of object i (counted from 0)."""
    return -upper[:, 0, i + 1], upper[:, i + 1, 0]


def _close(upper: np.ndarray) -> None:
    """Exchange what axes and diagonals say of each other, then shortest paths (Floyd and Warshall), in place."""
    x, y, u, v = upper
    np.minimum(u, x + y, out=u)
    np.minimum(v, x + y.T, out=v)
    np.minimum(x, (u + v) / 2, out=x)
    np.minimum(y, (u + v.T) / 2, out=y)
    for k in range(upper.shape[1]):
        np.minimum(upper, upper[:, :, k, None] + upper[:, k, None, :], out=upper)


def _contradictory(upper: np.ndarray) -> bool:
    return bool((np.diagonal(upper, axis1=1, axis2=2) < 0).any())


def _differences(link: _Link, gap: np.ndarray) -> Iterator[tuple[int, int, int, float]]:
    """(axis, i, j, least value of centre j - centre i) for each that an order of two objects sets."""
    side, first, second = link
    axis, forwards = _ORDERS[side]
    yield axis, first, second, gap[first, second]
    yield _U, first, second, MARGIN
    yield (_V, first, second, MARGIN) if forwards else (_V, second, first, MARGIN)


def _order(upper: np.ndarray, link: _Link, gap: np.ndarray) -> None:
    for axis, i, j, least in _differences(link, gap):
        upper[axis, i, j] = min(upper[axis, i, j], -least)


def _may_order(upper: np.ndarray, link: _Link, gap: np.ndarray) -> bool:
    return all(upper[axis, j, i] >= least for axis, i, j, least in _differences(link, gap))


def _bounds(predicate: str, at: Sequence[int], low: np.ndarray,
            high: np.ndarray) -> Iterator[tuple[int, int, int, float]]:
    """(axis, i, j, b) for each bound "centre i - centre j <= b" that a relation sets whatever else holds."""
    a, b = at[0], at[1] if len(at) > 1 else 0
    near: tuple[float, float] | None = None  # greatest distance along x and along y
    if predicate in OVERLAPS:
        reach = high[b] - 1.3 * low[a] if predicate == "inside" else 0.75 * (high[a] + high[b])
        near = (reach - MARGIN, reach - MARGIN)
    elif predicate == "on top of":
        yield 1, a, b, -(low[a] + low[b] - 2)
        near = (0.75 * min(high[a], high[b]) - MARGIN, high[a] + high[b] + 2)
    elif predicate == "next to":
        near = (high[a] + high[b] + 7, 5)
    elif predicate == "in the centre":
        for axis in (0, 1):
            yield axis, a, 0, CENTRE + 6
            yield axis, 0, a, 6 - CENTRE
    elif predicate in EDGES or predicate in CORNERS:
        for axis, word, far in ((0, "left", False), (0, "right", True), (1, "top", False), (1, "bottom", True)):
            if word in predicate.split():
                yield (axis, 0, a, 4 + high[a] - SIZE) if far else (axis, a, 0, 4 + high[a])
                if predicate in EDGES:
                    yield 1 - axis, a, 0, CENTRE + 13
                    yield 1 - axis, 0, a, 13 - CENTRE
    if near is not None:
        for axis, reach in enumerate(near):
            yield axis, a, b, reach
            yield axis, b, a, reach


def _reach(relations: Sequence[Relation], index: dict[str, int], low: np.ndarray) -> np.ndarray:
    """[N+1, N+1]: how far apart two centres are along x or along y at least; -inf where objects may overlap."""
    reach = low[:, None] + low + GAP
    reach[0], reach[:, 0] = -np.inf, -np.inf
    np.fill_diagonal(reach, -np.inf)
    for relation in relations:
        if relation.predicate in OVERLAPS or relation.predicate in TOUCHING:
            i, j = (index[name] for name in relation.names)
            least = -np.inf if relation.predicate in OVERLAPS else min(reach[i, j], low[i] + low[j])
            reach[i, j] = reach[j, i] = least
    return reach


def _keep_apart(upper: np.ndarray, reach: np.ndarray) -> bool:
    """Tighten where two objects can be apart on one side only; False where they cannot be apart at all."""
    fits = upper[:2] >= reach  # [axis, i, j]: i can be on the far side of j
    ways = fits.sum(0) + fits.sum(0).T
    forced = fits & (ways == 1)
    if forced.any():
        upper[:2] = np.minimum(upper[:2], np.where(forced, -reach, np.inf).transpose(0, 2, 1))
    return bool((ways > 0).all())
