"""What relations can be true together."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spatialt2i.core.types import Relation
from spatialt2i.data.consistency import ALIGNED, ARITY, MIDDLES, ORDERS, PLACES, PREDICATES, contradiction


def relations(*texts: str) -> list[Relation]:
    """``"cup: left of: jar"``; objects of "between" are separated by "+"."""
    parts = [[part.strip() for part in text.split(":")] for text in texts]
    return [Relation(p, a, tuple(rest[0].split("+")) if rest else ()) for a, p, *rest in parts]


@pytest.mark.parametrize("texts", [
    ("cup: left of: jar", "jar: left of: pot"),
    ("cup: left of: jar", "cup: behind: jar"),  # behind and to the left
    ("cup: between: jar+pot", "jar: left of: cup"),
    ("cup: between: jar+pot", "jar: in front of: pot"),
    ("cup: at the left edge", "cup: left of: jar", "jar: in the centre"),
    ("cup: at the left edge", "jar: at the left edge", "cup: in front of: jar"),
    ("cup: in the back left corner", "jar: right of: cup", "pot: in front of: cup"),
    ("mat: aligned on the left with: tray", "mat: in front of: tray", "cup: left of: tray"),
    ("lamp: on: table", "box: under: table"),
    ("cup: next to: jar", "cup: left of: jar"),
    ("cup: between: jar+pot", "jar: between: cup+fork"),
])
def test_possible(texts: tuple[str, ...]) -> None:
    assert contradiction(relations(*texts)) is None


@pytest.mark.parametrize(("texts", "culprits"), [
    (("cup: left of: jar", "jar: left of: cup"), {"cup", "jar"}),
    (("cup: left of: jar", "jar: left of: pot", "pot: left of: cup"), {"cup", "jar", "pot"}),
    (("cup: behind: jar", "cup: in front of: jar"), {"cup", "jar"}),
    (("cup: at the left edge", "jar: left of: cup"), {"cup", "jar"}),
    (("cup: at the left edge", "jar: at the left edge", "cup: left of: jar"), {"cup", "jar"}),
    (("cup: at the left edge", "cup: at the right edge"), {"cup"}),
    (("cup: in the centre", "cup: at the front edge"), {"cup"}),
    (("cup: in the centre", "jar: at the left edge", "cup: left of: jar"), {"cup", "jar"}),
    (("cup: in the centre", "jar: in the centre"), {"centre"}),
    (("cup: in the back left corner", "jar: behind: cup"), {"cup", "jar"}),
    (("mat: aligned on the left with: tray", "mat: left of: tray"), {"mat", "tray"}),
    (("mat: aligned on the left with: tray", "mat: left of: cup", "cup: left of: tray"), {"mat", "tray", "cup"}),
    (("cup: between: jar+pot", "cup: left of: jar", "cup: left of: pot", "cup: behind: jar", "cup: behind: pot"),
     {"cup"}),
    (("lamp: on: table", "lamp: left of: table"), {"lamp"}),
    (("lamp: on: table", "lamp: under: table"), {"lamp", "table"}),
    (("cup: left of: cup",), {"cup"}),
    (("cup: beneath: jar",), {"cup"}),
    (("cup: between: jar",), {"cup"}),
])
def test_impossible_and_says_what(texts: tuple[str, ...], culprits: set[str]) -> None:
    found = contradiction(relations(*texts))
    assert found and any(name in found for name in culprits), found


def test_what_is_read_off_a_layout_never_contradicts() -> None:
    """Coordinates are a proof that relations can be true together."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        names = [f"thing {i}" for i in range(6)]
        x, z = rng.permutation(6), rng.permutation(6)
        found = []
        for a, b in itertools.permutations(range(6), 2):
            found.append(Relation("left of" if x[a] < x[b] else "right of", names[a], (names[b],)))
            found.append(Relation("in front of" if z[a] < z[b] else "behind", names[a], (names[b],)))
        for a, b, c in itertools.permutations(range(6), 3):
            if x[b] < x[a] < x[c]:
                found.append(Relation("between", names[a], (names[b], names[c])))
        found.append(Relation("at the left edge", names[int(x.argmin())]))
        found.append(Relation("at the back edge", names[int(z.argmax())]))
        some = [found[i] for i in rng.permutation(len(found))[:9]]
        some = [r for i, r in enumerate(some) if r.predicate != "between" or sum(
            o.predicate == "between" for o in some[:i]) < 3]
        assert contradiction(some) is None, some


def test_a_circle_is_found_wherever_it_is_and_whatever_else_is_said() -> None:
    for seed in range(100):
        rng = np.random.default_rng(seed)
        names = [f"thing {i}" for i in range(7)]
        ring = rng.permutation(names)[:int(rng.integers(2, 6))].tolist()
        predicate = ("left of", "right of", "in front of", "behind", "above", "below")[seed % 6]
        circle = [Relation(predicate, a, (b,)) for a, b in zip(ring, [*ring[1:], ring[0]], strict=True)]
        said = [*circle, Relation("next to", names[0], (names[1],))]
        assert contradiction([said[i] for i in rng.permutation(len(said))]) is not None


def test_every_predicate_has_one_meaning() -> None:
    groups = [set(ORDERS), set(PLACES), set(ALIGNED), set(MIDDLES), {"next to"}]
    assert set().union(*groups) == set(PREDICATES) == set(ARITY) and sum(map(len, groups)) == len(PREDICATES)
