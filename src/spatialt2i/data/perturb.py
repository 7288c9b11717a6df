"""Changes relations of a scene's prompt by rule, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from spatialt2i.core.types import Edit, Pair, Prompt, Relation, applied
from spatialt2i.data.consistency import ALIGNED, MIDDLES, PLACES, SIDES, contradiction
from spatialt2i.data.vocabulary import scenes, thing_of
from spatialt2i.data.wording import manners_of, render

_ATTEMPTS = 16  # choices of edits before a prompt counts as one that cannot be perturbed


def _mirrored(predicate: str) -> str:
    return predicate.replace("left", "right") if "left" in predicate else predicate.replace("right", "left")


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above",
            "on": "under", "under": "on",
            "at the front edge": "at the back edge", "at the back edge": "at the front edge",
            "aligned in front with": "aligned at the back with", "aligned at the back with": "aligned in front with",
            **{p: _mirrored(p) for p in (*PLACES, *ALIGNED) if _mirrored(p) != p}}
DEPTH = {"in front of": "behind", "behind": "in front of"}


def perturb(prompt: Prompt, *, n_edits: int, seed: int) -> Pair | None:
    """Edit ``n_edits`` relations, and flip those that contradict them then.

    Args:
        prompt: of the scene grammar. n_edits: how many relations to change. seed: decides which, and how.

    Returns:
        The pair, whose texts differ in relation words, articles and the order of objects alone; None where there are
        too few relations, or no edits without a contradiction were found.

    Raises:
        ValueError: the prompt is not of the scene grammar.
    """
    if prompt.scene not in scenes():
        raise ValueError(f"prompt {prompt.id!r} is about {prompt.scene!r}, which is no place of scenes.toml; name the "
                         "writer that wrote it (data.writer)")
    rng, scene = np.random.default_rng(seed), scenes()[prompt.scene]
    manners = manners_of(prompt.relations)
    options = [alternatives(i, r, fixed=any(manners[i:i + 2])) for i, r in enumerate(prompt.relations)]
    editable = [i for i, found in enumerate(options) if found]
    if len(editable) < n_edits:
        return None
    for _ in range(_ATTEMPTS):
        edits = [_one_of(options[i], rng) for i in rng.permutation(editable)[:n_edits].tolist()]
        edits = _carry_through(prompt.relations, edits, rng)
        if edits is not None:
            relations = applied(prompt.relations, edits)
            text = render(scene, relations, prompt.id, like=prompt.relations)
            return Pair(prompt, Prompt(f"{prompt.id}-p", text, prompt.scene, relations), tuple(edits))
    return None


def alternatives(index: int, relation: Relation, fixed: bool = False) -> list[Edit]:
    """All legal edits of one relation; with ``fixed`` those that exchange objects are left out."""
    p, a, others = relation.predicate, relation.subject, relation.objects
    hung = [thing_of(name).verb == "hangs" for name in relation.names]
    found = []
    if p in OPPOSITE and not (p in ("above", "below") and not all(hung)):
        found.append(Edit("flip", index, relation, Relation(OPPOSITE[p], a, others)))
    if p in DEPTH:
        found.append(Edit("depth", index, relation, Relation(DEPTH[p], a, others)))
    if p in SIDES or p == "above":
        sides = SIDES[:2] if any(hung) else SIDES
        found += [Edit("move", index, relation, Relation(q, a, others)) for q in sides if q not in (p, OPPOSITE.get(p))
                  and q != DEPTH.get(p)]
    if p in PLACES:
        kind = p.split()[0], p.split()[-1]
        alike = [q for q in PLACES if (q.split()[0], q.split()[-1]) == kind and q not in (p, OPPOSITE.get(p))]
        found += [Edit("move", index, relation, Relation(q, a)) for q in alike]
    if p in SIDES and not fixed and hung[0] == hung[1]:
        found.append(Edit("swap", index, relation, Relation(p, others[0], (a,))))
    if p in MIDDLES and not fixed:
        found += [Edit("swap", index, relation, Relation(p, others[i], (a, others[1 - i]))) for i in (0, 1)]
    return found


def _one_of(options: Sequence[Edit], rng: np.random.Generator) -> Edit:
    kinds = sorted({e.kind for e in options})
    kind = kinds[int(rng.integers(len(kinds)))]
    options = [e for e in options if e.kind == kind]
    return options[int(rng.integers(len(options)))]


def _carry_through(relations: Sequence[Relation], edits: list[Edit], rng: np.random.Generator) -> list[Edit] | None:
    """Add the edits that must follow: up to three clauses about edited objects that contradict them are flipped too."""
    for _ in range(4):
        if contradiction(applied(relations, edits)) is None:
            return edits
        moved = {name for e in edits for name in e.before.names}
        free = [i for i, r in enumerate(relations) if set(r.names) & moved and i not in {e.index for e in edits}]
        flips = [dataclasses.replace(e, dependent=True) for i in rng.permutation(free).tolist()
                 for e in alternatives(i, relations[i], fixed=True) if e.kind in ("flip", "depth")]
        if not flips:
            return None
        settled = (f for f in flips if contradiction(applied(relations, [*edits, f])) is None)
        edits = [*edits, next(settled, flips[0])]
    return None

