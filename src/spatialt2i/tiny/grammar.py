"""Writes prompts about the tabletop world and perturbs their relations (a `Writer`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from spatialt2i.core.run import seed_of
from spatialt2i.core.types import Edit, Pair, Prompt, Relation, applied
from spatialt2i.tiny.bounds import bounds
from spatialt2i.tiny.layout import choose, overlapping, places, solve
from spatialt2i.tiny.phrases import render
from spatialt2i.tiny.world import (
    ABSOLUTE, ARITY, COLOURS, CONTAINERS, CORNERS, EDGES, MARGIN, OVERLAPS, PREDICATES, SCENES, SHAPES, SIDES, Box,
    depths, margin, radius_range,
)

MAX_OBJECTS = 7
MAX_RELATIONS = 12
_ATTEMPTS = 16  # random edits of a prompt, before it counts as one that cannot be perturbed
_TRIES = 8  # restarts of the search for a scene of some edits; most that have one show it so soon
_PATIENCE = 100  # restarts before a dependent edit is called needed; only pairs that have one pay for them
# How often a new object is chained to an earlier one by each predicate.
_LINK_WEIGHTS = {"left of": 3, "right of": 3, "above": 3, "below": 3, "in front of": 1.5, "behind": 1.5,
                 "on top of": 1.5, "next to": 1.5, "between": 1.5}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "on top of": "below",
             "at the left edge": "at the right edge", "at the right edge": "at the left edge",
             "at the top edge": "at the bottom edge", "at the bottom edge": "at the top edge"}


def _flipped_corner(corner: str) -> str:
    return corner.replace("left", "right") if "left" in corner else corner.replace("right", "left")


_OPPOSITE |= {c: _flipped_corner(c) for c in CORNERS}
# Every alternative excludes the original geometrically, so an edit always breaks what it edits.
_MOVES: dict[str, tuple[str, ...]] = {
    "left of": ("above", "below"), "right of": ("above", "below"), "above": ("left of", "right of"),
    "below": ("left of", "right of"), "on top of": ("left of", "right of"), "next to": ("above", "below"),
    "in front of": SIDES, "behind": SIDES, "inside": SIDES, "in the centre": EDGES,
} | {e: tuple(o for o in EDGES if o not in (e, _OPPOSITE[e])) for e in EDGES} | {
    c: tuple(o for o in CORNERS if o not in (c, _OPPOSITE[c])) for c in CORNERS}


class TinyWriter:
    """Prompts of the tabletop world: an opener, an anchor object, and clauses chained to it."""

    threads, bill = 1, None

    def write(self, *, id: str, n_relations: int, seed: int) -> Prompt:
        """A prompt that can be satisfied: it is read off a scene that was laid out on the way.

        Args:
            id: the prompt's id; it also picks the phrasing.
            n_relations: 1 to 12.
            seed: of the objects and relations.

        Raises:
            ValueError: ``n_relations`` is out of range.
        """
        if not 1 <= n_relations <= MAX_RELATIONS:
            raise ValueError(f"n_relations must be 1..{MAX_RELATIONS}, got {n_relations}")
        rng = np.random.default_rng(seed)
        while True:
            relations = _grow(n_relations, rng)
            if relations is not None:
                place = list(SCENES)[int(rng.integers(len(SCENES)))]
                return Prompt(id, render(place, relations, seed_of("style", id)), place, tuple(relations))

    def perturb(self, *, prompt: Prompt, n_edits: int, seed: int) -> Pair | None:
        """Edit ``n_edits`` relations, and those that could not stay true beside them.

        The perturbed text keeps the phrasing of the perfect one, so only relation words and the order of objects
        differ. Every edit excludes the relation that it replaces, so a scene of the perturbed prompt breaks exactly
        the edited relations of the perfect one.

        Returns:
            The pair, or None when no satisfiable edit was found.

        Raises:
            ValueError: the prompt is not about the tabletop.
        """
        if prompt.scene not in SCENES:
            raise ValueError(f"prompt {prompt.id!r} is about {prompt.scene!r}, which is no place of the tabletop; name "
                             "the writer that wrote it (data.writer)")
        rng = np.random.default_rng(seed)
        for _ in range(_ATTEMPTS):
            edits = _edits(prompt.relations, n_edits, rng)
            if edits is None:
                continue
            edits = _carry_through(prompt, edits, rng)
            if edits is None:
                continue
            relations = applied(prompt.relations, edits)
            text = render(prompt.scene, relations, seed_of("style", prompt.id))
            return Pair(prompt, Prompt(f"{prompt.id}-p", text, prompt.scene, relations), tuple(edits))
        return None


def _grow(n_relations: int, rng: np.random.Generator) -> list[Relation] | None:
    """Lay out objects one after another, noting how each was placed, then add facts that hold in the result."""
    fewest = 2 if n_relations <= 3 else int(np.ceil(0.6 * (n_relations + 1)))
    n = int(rng.integers(min(fewest, MAX_OBJECTS), min(n_relations + 1, MAX_OBJECTS) + 1))
    names = [f"{c} {SHAPES[int(rng.integers(len(SHAPES)))]}" for c in rng.permutation(list(COLOURS))[:n]]
    anchored = n <= n_relations and rng.random() < 0.5
    nested = rng.random() < 0.2 and names[0].split()[1] in CONTAINERS
    radii = {name: rng.uniform(*radius_range(name, _nest(names) if nested else (), n)) for name in names}
    relations: list[Relation] = []
    placed: dict[str, Box] = {}
    for i, name in enumerate(names):
        for _ in range(8):
            link = _nest(names) if nested and i == 1 else _links(i, names, anchored, nested, relations, rng)
            trial = [*relations, *link]
            z = depths(trial)
            boxes = {other: dataclasses.replace(box, z=z.get(other, 0)) for other, box in placed.items()}
            box = choose(places(name, radii[name], z.get(name, 0), boxes, trial, overlapping(trial), rng), rng)
            if box is not None:
                relations, placed = trial, boxes | {name: box}
                break
        else:
            return None
    told = {frozenset(r.names) for r in relations}
    for fact in _facts(names, placed, rng):
        if len(relations) == n_relations:
            break
        if frozenset(fact.names) not in told and margin(fact, placed) >= MARGIN:
            relations.append(fact)
            told.add(frozenset(fact.names))
    return relations if len(relations) == n_relations else None


def _nest(names: Sequence[str]) -> list[Relation]:
    return [Relation("inside", names[1], (names[0],))]


def _links(i: int, names: Sequence[str], anchored: bool, nested: bool, relations: Sequence[Relation],
           rng: np.random.Generator) -> list[Relation]:
    """The relation that places object i: absolute for an anchor, else to earlier objects, most often the anchor."""
    if i == 0:
        spots = ABSOLUTE[:1] if nested or rng.random() < 0.4 else ABSOLUTE
        return [Relation(spots[int(rng.integers(len(spots)))], names[0])] if anchored else []
    busy = {name for pair in overlapping(relations) for name in pair}
    weights = np.array(list(_LINK_WEIGHTS.values()))
    predicate = list(_LINK_WEIGHTS)[int(rng.choice(len(weights), p=weights / weights.sum()))]
    others = [o for o in names[:i] if predicate not in ("in front of", "behind") or o not in busy]
    if len(others) < ARITY[predicate] - 1:
        return [Relation(SIDES[int(rng.integers(4))], names[i], (names[i - 1],))]
    if predicate == "between":
        picked = rng.permutation(others)[:2].tolist()
        return [Relation(predicate, names[i], tuple(picked))]
    target = others[0] if rng.random() < 0.4 else others[int(rng.integers(len(others)))]
    return [Relation(predicate, names[i], (target,))]


def _facts(names: Sequence[str], boxes: dict[str, Box], rng: np.random.Generator) -> list[Relation]:
    """What could be said of a layout beside what overlaps, in random order; containers are too large for edges."""
    found = [Relation(p, a) for a in names for p in ABSOLUTE if boxes[a].r < 15 or p == ABSOLUTE[0]]
    pairwise = [p for p in PREDICATES if ARITY[p] == 2 and p not in OVERLAPS]
    found += [Relation(p, a, (b,)) for a in names for b in names if a != b for p in pairwise]
    found += [Relation("between", a, (b, c)) for a in names for b in names for c in names if a not in (b, c) and b < c]
    return [found[i] for i in rng.permutation(len(found)).tolist()]


def _edits(relations: Sequence[Relation], n_edits: int, rng: np.random.Generator) -> list[Edit] | None:
    """``n_edits`` random edits of different relations, or None where the prompt has too few."""
    if n_edits > len(relations):
        return None
    order = rng.permutation(len(relations)).tolist()
    edits: list[Edit] = []
    for index in order:
        options = alternatives(index, relations[index])
        if options and len(edits) < n_edits:
            kinds = sorted({e.kind for e in options})
            kind = kinds[int(rng.integers(len(kinds)))]
            options = [e for e in options if e.kind == kind]
            edits.append(options[int(rng.integers(len(options)))])
    return edits if len(edits) == n_edits else None


def alternatives(index: int, relation: Relation) -> list[Edit]:
    """All legal edits of one relation, each of which excludes it geometrically."""
    p, a, others = relation.predicate, relation.subject, relation.objects
    found = []
    if p in _OPPOSITE:
        found.append(Edit("flip", index, relation, Relation(_OPPOSITE[p], a, others)))
    if p in ("in front of", "behind"):
        other = "behind" if p == "in front of" else "in front of"
        found.append(Edit("depth", index, relation, Relation(other, a, others)))
    found += [Edit("move", index, relation, Relation(q, a, others)) for q in _MOVES.get(p, ())]
    if p in (*SIDES, "in front of", "behind", "on top of"):
        found.append(Edit("swap", index, relation, Relation(p, others[0], (a,))))
    if p == "inside" and a.split()[1] in CONTAINERS:
        found.append(Edit("swap", index, relation, Relation(p, others[0], (a,))))
    if p == "between":
        found += [Edit("swap", index, relation, Relation(p, others[i], (a, others[1 - i]))) for i in (0, 1)]
    return found


def _flip(i: int, r: Relation) -> Edit:
    return Edit("flip", i, r, Relation(_OPPOSITE[r.predicate], r.subject, r.objects), dependent=True)


def _carry_through(prompt: Prompt, edits: list[Edit], rng: np.random.Generator) -> list[Edit] | None:
    """Add the edits that must follow: a clause about an edited object that contradicts its new place is flipped too."""
    for _ in range(3):
        if _satisfiable(prompt, edits, rng, tries=_TRIES):
            return _without_needless(prompt, edits, rng)
        moved = {name for e in edits for name in e.before.names}
        free = [i for i, r in enumerate(prompt.relations) if r.predicate in _OPPOSITE and set(r.names) & moved
                and i not in {e.index for e in edits}]
        if not free:
            return None
        flips = [_flip(i, prompt.relations[i]) for i in rng.permutation(free).tolist()]
        edits = next((e for e in ([*edits, flip] for flip in flips)
                      if bounds(prompt.objects, applied(prompt.relations, e)) is not None), [*edits, flips[0]])
    return None


def _satisfiable(prompt: Prompt, edits: Sequence[Edit], rng: np.random.Generator, *, tries: int) -> bool:
    """Whether a scene of the edited prompt was found."""
    return solve(prompt.objects, applied(prompt.relations, edits), prompt.scene, rng, tries=tries) is not None


def _without_needless(prompt: Prompt, edits: list[Edit], rng: np.random.Generator) -> list[Edit]:
    """Drop dependent edits without which there is a scene, too: the short search that asked for them had missed it."""
    for edit in edits:
        fewer = [e for e in edits if e is not edit]
        if edit.dependent and _satisfiable(prompt, fewer, rng, tries=_PATIENCE):
            return _without_needless(prompt, fewer, rng)  # those that were needed beside it may be needless now
    return edits
