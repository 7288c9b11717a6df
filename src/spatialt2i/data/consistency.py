"""Whether a set of relations can be true together, and which of them cannot.

A viewer sees a scene along three axes: ``across`` (left to right), ``depth`` (front to back) and ``height``. A
predicate orders its objects along one of them, puts an object at an end or in the middle of one, or makes two objects
level on one. Relations contradict each other where the orders run in a circle, or something would have to lie beyond an
end. This is what texts can be checked for without a picture; it says nothing of sizes or distances.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

from spatialt2i.core.types import Relation

AXES = ("across", "depth", "height")
_LOW, _MIDDLE, _HIGH = "\0low", "\0middle", "\0high"  # the ends and the middle of an axis; no object has such a name
# (axis, +1 where the subject comes after the object on it)
ORDERS: dict[str, tuple[str, int]] = {
    "left of": ("across", -1), "right of": ("across", 1), "in front of": ("depth", -1), "behind": ("depth", 1),
    "below": ("height", -1), "under": ("height", -1), "above": ("height", 1), "on": ("height", 1)}
# (axis, where on it) of each absolute predicate; "front" is the side of the viewer
PLACES: dict[str, tuple[tuple[str, str], ...]] = {
    "in the centre": (("across", _MIDDLE), ("depth", _MIDDLE)),
    "at the left edge": (("across", _LOW),), "at the right edge": (("across", _HIGH),),
    "at the front edge": (("depth", _LOW),), "at the back edge": (("depth", _HIGH),),
    "against the left wall": (("across", _LOW),), "against the right wall": (("across", _HIGH),),
    "against the back wall": (("depth", _HIGH),),
    "in the front left corner": (("across", _LOW), ("depth", _LOW)),
    "in the front right corner": (("across", _HIGH), ("depth", _LOW)),
    "in the back left corner": (("across", _LOW), ("depth", _HIGH)),
    "in the back right corner": (("across", _HIGH), ("depth", _HIGH))}
# whose edges are level, on which axis
ALIGNED: dict[str, str] = {"aligned on the left with": "across", "aligned on the right with": "across",
                           "aligned in front with": "depth", "aligned at the back with": "depth"}
SIDES = ("left of", "right of", "in front of", "behind")  # of something that stands on the same ground
MIDDLES = ("between", "midway between")  # across or in depth, whichever way round
NEAR = ("next to",)  # orders nothing
PREDICATES = (*ORDERS, *PLACES, *ALIGNED, *MIDDLES, *NEAR)
ARITY = {p: 1 if p in PLACES else 3 if p in MIDDLES else 2 for p in PREDICATES}  # objects, with the subject


def contradiction(relations: Sequence[Relation]) -> str | None:
    """What is wrong with relations that cannot all be true, or None where they can.

    Args:
        relations: with predicates of `PREDICATES`.

    Returns:
        A sentence that names an object whose place is impossible, or a relation that says nothing sensible.
    """
    for r in relations:
        if r.predicate not in ARITY or len(r.names) != ARITY[r.predicate] or len(set(r.names)) != len(r.names):
            return f"{r.subject} {r.predicate} {', '.join(r.objects)}: not a relation of different objects"
    stacked = {frozenset(r.names) for r in relations if r.predicate in ("on", "under")}
    for r in relations:
        if frozenset(r.names) in stacked and r.predicate not in ("on", "under", *ALIGNED):
            return f"{r.subject} is {r.predicate} {r.objects[0]}, which it is on or under as well"
    taken = [r.predicate for r in relations if r.predicate == "in the centre" or r.predicate.endswith("corner")]
    if doubled := next((p for p in taken if taken.count(p) > 1), None):
        return f"more than one thing is {doubled}"
    middles = [r for r in relations if r.predicate in MIDDLES]
    fixed = [r for r in relations if r.predicate not in MIDDLES]
    circle = None
    for choice in itertools.product(*(tuple(_readings(r)) for r in middles)):
        circle = _circle(fixed, [order for orders in choice for order in orders])
        if circle is None:
            return None
    return f"{circle} would have to be on both sides of something, or beyond an end"


def _readings(relation: Relation) -> Iterator[tuple[tuple[str, str, str], ...]]:
    """The four orders (axis, before, after) that "between" can mean."""
    a, (b, c) = relation.subject, relation.objects
    for axis, (first, last) in itertools.product(AXES[:2], ((b, c), (c, b))):
        yield (axis, first, a), (axis, a, last)


def _circle(relations: Sequence[Relation], orders: Sequence[tuple[str, str, str]]) -> str | None:
    """An object that is part of a circle, or beyond an end; None where there is none."""
    for axis in AXES:
        level: dict[str, str] = {}  # name -> one that is level with it, nearer to what names the class
        place = functools.partial(_class_of, level)
        after: dict[str, set[str]] = {_LOW: {_MIDDLE}, _MIDDLE: {_HIGH}, _HIGH: set()}
        edges = [(first, last) for where, first, last in orders if where == axis]
        for r in relations:
            same = [spot for where, spot in PLACES.get(r.predicate, ()) if where == axis]
            same += list(r.objects) if ALIGNED.get(r.predicate) == axis else []
            for other in same:
                if place(r.subject) != place(other):
                    # an end stays the name of its class
                    old, new = sorted((place(r.subject), place(other)), key=lambda n: n.startswith("\0"))
                    if old.startswith("\0"):
                        return r.subject
                    level[old] = new
            where, sign = ORDERS.get(r.predicate, (None, 0))
            if where == axis:
                edges.append((r.subject, r.objects[0])[::-sign])
        for first, last in edges:
            if place(first) == place(last) or place(last) == _LOW or place(first) == _HIGH:
                return first
            after.setdefault(place(first), set()).add(place(last))
        if found := _on_a_circle(after):
            return next(name for name in (found, *level) if not name.startswith("\0") and place(name) == found)
    return None


def _class_of(level: dict[str, str], name: str) -> str:
    """What names the class of all that is level with a name."""
    while name in level:
        name = level[name]
    return name


def _on_a_circle(after: dict[str, set[str]]) -> str | None:
    """A node of a directed graph that can be reached from itself, or None."""
    before = dict.fromkeys(after, 0)
    for names in after.values():
        for name in names:
            before[name] = before.get(name, 0) + 1
    free = [name for name, n in before.items() if n == 0]
    while free:  # what is left when all that nothing comes before are taken off again and again
        name = free.pop()
        del before[name]
        for other in after.get(name, ()):
            before[other] -= 1
            if before[other] == 0:
                free.append(other)
    left = set(before)
    while ends := {name for name in left if not after.get(name, set()) & left}:  # these only come after a circle
        left -= ends
    return min(left, default=None)
