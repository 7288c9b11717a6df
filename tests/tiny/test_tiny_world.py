"""Geometry of the tabletop: predicates, bounds, layouts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spatialt2i.core.types import Relation, applied
from spatialt2i.tiny.bounds import bounds
from spatialt2i.tiny.grammar import TinyWriter, _edits, alternatives
from spatialt2i.tiny.layout import solve
from spatialt2i.tiny.world import ARITY, MARGIN, MARGINS, PREDICATES, SHAPES, SIDES, Box, apart, covers, margin, outline

WRITER = TinyWriter()


def boxes(rng: np.random.Generator, n: int) -> list[Box]:
    return [Box(*rng.uniform(8, 56, 2), rng.uniform(6, 16), int(rng.integers(2))) for _ in range(n)]


def test_the_world_has_what_it_must_have() -> None:
    sides, overlaps = {"left of", "right of", "above", "below"}, {"in front of", "behind", "inside"}
    assert sides | overlaps | {"on top of", "next to", "between", "in the centre"} <= set(PREDICATES)
    assert sum("edge" in p for p in PREDICATES) == sum("corner" in p for p in PREDICATES) == 4
    assert [sum(a == n for a in ARITY.values()) for n in (1, 2, 3)] == [9, 9, 1]


def test_mirrored_predicates_are_mirror_images() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = boxes(rng, 2)
        flipped = [Box(64 - box.cx, box.cy, box.r, box.z) for box in (a, b)]
        assert MARGINS["left of"](a, b) == pytest.approx(MARGINS["right of"](*flipped))
        assert MARGINS["at the left edge"](a) == pytest.approx(MARGINS["at the right edge"](flipped[0]))
        assert MARGINS["in the top left corner"](a) == pytest.approx(MARGINS["in the top right corner"](flipped[0]))
        assert MARGINS["left of"](a, b) == MARGINS["right of"](b, a)
        assert MARGINS["above"](a, b) == MARGINS["below"](b, a)


def test_the_four_sides_and_overlap_exclude_each_other() -> None:
    rng = np.random.default_rng(1)
    for _ in range(2000):
        a, b = boxes(rng, 2)
        a, b = Box(a.cx, a.cy, min(a.r, 9.5), a.z), Box(b.cx, b.cy, min(b.r, 9.5), b.z)
        true = [p for p in (*SIDES, "in front of", "behind", "inside") if MARGINS[p](a, b) >= MARGIN]
        assert len([p for p in true if p != "inside"]) <= 1, true


@pytest.mark.parametrize("predicate", PREDICATES)
def test_every_alternative_excludes_what_it_replaces_for_objects_of_every_size(predicate: str) -> None:
    rng, n, names = np.random.default_rng(3), 20_000, ("red circle", "blue circle", "pink circle")
    places = []
    for depth in (0, 1, 0):
        r = np.where(rng.random(n) < 0.3, rng.uniform(15, 16.5, n), rng.uniform(6, 9.5, n))
        places.append(Box(rng.uniform(r + 1, 63 - r), rng.uniform(r + 1, 63 - r), r, depth))
    before = Relation(predicate, names[0], names[1:ARITY[predicate]])
    options = alternatives(0, before)
    assert options
    for after in (e.after for e in options):
        for order in (places, [*places[1::-1], places[2]]):  # either of the first two is nearer
            scene = dict(zip(names, order, strict=True))
            here, there = margin(before, scene), margin(after, scene)
            assert not ((here >= MARGIN) & (there > 0) | (there >= MARGIN) & (here > 0)).any(), after


def test_a_container_is_not_at_two_edges() -> None:
    corner = Box(20.0, 20.0, 16.0)
    assert MARGINS["at the left edge"](corner) < 0 and MARGINS["at the top edge"](corner) < 0
    assert MARGINS["at the left edge"](Box(18.0, 32.0, 16.0)) >= MARGIN


@pytest.mark.parametrize("shape", SHAPES)
def test_covers_is_where_the_outline_is_negative(shape: str) -> None:
    x, y = np.linspace(-12, 12, 101)[None, :], np.linspace(-12, 12, 97)[:, None]
    assert (covers(shape, x, y, 7.3) == (outline(shape, x, y, 7.3) < 0)).all()


def test_an_unknown_shape_is_named() -> None:
    for function in (outline, covers):
        with pytest.raises(ValueError, match="unknown shape 'star': expected circle"):
            function("star", np.zeros(1), np.zeros(1), 3.0)


def test_solved_scenes_hold_with_margin_and_keep_unrelated_objects_apart() -> None:
    for i in range(60):
        prompt = WRITER.write(id=f"{i}", n_relations=1 + i % 8, seed=i)
        scene = solve(prompt.objects, prompt.relations, prompt.scene, np.random.default_rng(i))
        if scene is None:
            continue
        assert set(scene.boxes) == set(prompt.objects)
        assert all(margin(r, scene.boxes) >= MARGIN for r in prompt.relations)
        assert all(b.r + 1 <= c <= 63 - b.r for b in scene.boxes.values() for c in (b.cx, b.cy))
        related = {frozenset(r.names) for r in prompt.relations}
        for (m, a), (n, b) in itertools.combinations(scene.boxes.items(), 2):
            assert frozenset((m, n)) in related or apart(a, b, 2.0)


def test_bounds_never_reject_what_has_a_scene() -> None:
    rng, proofs = np.random.default_rng(7), 0
    for i in range(120):
        prompt = WRITER.write(id=f"{i}", n_relations=2 + i % 9, seed=i)
        assert bounds(prompt.objects, prompt.relations) is not None
        edits = _edits(prompt.relations, 1, rng)
        if edits:
            edited = applied(prompt.relations, edits)
            proofs += bounds(prompt.objects, edited) is None
    assert proofs > 20


@pytest.mark.parametrize("relations", [
    [("left of", "a", "b"), ("left of", "b", "c"), ("left of", "c", "a")],
    [("left of", "a", "b"), ("above", "a", "b")],
    [("on top of", "a", "b"), ("on top of", "b", "c"), ("on top of", "c", "d"), ("on top of", "d", "e")],
    [("between", "a", "b", "c"), ("left of", "b", "a"), ("left of", "c", "a")],
    [("in the top left corner", "a"), ("right of", "a", "b")],
    [("inside", "a", "b"), ("left of", "a", "b")],
])
def test_bounds_prove_contradictions(relations: list[tuple[str, ...]]) -> None:
    shape = {"a": "cross", "b": "circle", "c": "cross", "d": "cross", "e": "cross"}
    colour = dict(zip("abcde", ("red", "green", "blue", "pink", "cyan"), strict=True))
    names = {k: f"{colour[k]} {shape[k]}" for k in shape}
    stated = [Relation(p, names[s], tuple(names[o] for o in others)) for p, s, *others in relations]
    objects = list(dict.fromkeys(n for r in stated for n in r.names))
    assert bounds(objects, stated) is None
    assert solve(objects, stated, "on a lawn", np.random.default_rng(0)) is None
