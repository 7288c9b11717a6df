"""Writes prompts about real places and perturbs their relations (a `Writer`), without any model.

A prompt is an opener and clauses that are chained to an anchor: each puts a new thing beside, before, on or over an
earlier one, or says one more thing of two that are there. Everything follows from seeds, so prompts are the same
everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spatialt2i.core.types import Pair, Prompt, Relation
from spatialt2i.data.consistency import ALIGNED, PLACES, SIDES, contradiction
from spatialt2i.data.perturb import perturb
from spatialt2i.data.vocabulary import COLOURS, Scene, Thing, scenes, thing_of, things
from spatialt2i.data.wording import LONGEST, SHORTEST, Stage, render, stage_of

MAX_RELATIONS = 12
_ATTEMPTS = 50  # layouts of a prompt before giving up, which no seed was seen to need
# how often a thing is put beside an earlier one in each way
_LINKS = {"left of": 4, "right of": 4, "in front of": 2.5, "behind": 2.5, "next to": 1.5, "between": 1.5,
          "midway between": 0.7}
_SMALL = ("lies", "rests")  # what may be under furniture
_WALLED = tuple(p for p in PLACES if p.startswith("against"))
_EDGES = tuple(p for p in PLACES if p.endswith("edge"))
_CORNERS = tuple(p for p in PLACES if p.endswith("corner"))


class SceneWriter:
    """Prompts about 25 kinds of places, and edits of their relations by rule."""

    threads, bill = 1, None

    def write(self, *, id: str, n_relations: int, seed: int) -> Prompt:
        """A prompt whose relations do not contradict each other.

        Args:
            id: the prompt's id; it also picks place and phrasing.
            n_relations: 1 to 12.
            seed: of the scene, its things and its relations.

        Raises:
            ValueError: ``n_relations`` is out of range.
        """
        if not 1 <= n_relations <= MAX_RELATIONS:
            raise ValueError(f"n_relations must be 1..{MAX_RELATIONS}, got {n_relations}")
        rng = np.random.default_rng(seed)
        kinds = list(scenes().values())
        shares = np.array([s.share for s in kinds], dtype=np.float64)
        scene = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
        stage = stage_of(scene, id)
        for _ in range(_ATTEMPTS):
            relations = _Layout(scene, stage, rng).grow(n_relations)
            if relations is None:
                continue
            text = render(scene, relations, id)
            if SHORTEST <= len(text.split()) <= LONGEST:
                return Prompt(id, text, scene.name, tuple(relations))
        raise RuntimeError(f"no prompt with {n_relations} relations about a {scene.name} after {_ATTEMPTS} attempts "
                           f"(seed {seed}); please report it")

    def perturb(self, *, prompt: Prompt, n_edits: int, seed: int) -> Pair | None:
        """Edit ``n_edits`` relations by rule, see `spatialt2i.data.perturb.perturb`."""
        return perturb(prompt, n_edits=n_edits, seed=seed)


class _Layout:
    """A prompt in the making: which things are where, and what was said of them."""

    def __init__(self, scene: Scene, stage: Stage, rng: np.random.Generator) -> None:
        self.scene, self.stage, self.rng = scene, stage, rng
        self.relations: list[Relation] = []
        self.planes: dict[str, str] = {}  # name -> "ground", "wall", or what it stands on

    def grow(self, n: int) -> list[Relation] | None:
        """``n`` relations, or None where this beginning has no such end."""
        anchor = self._named(self._pick(self._free(self.scene.top if self.stage.surface else self.scene.floor)))
        self.planes[anchor] = "ground"
        if self.rng.random() < 0.75 or n == 1:
            self._add(Relation(self._spot(thing_of(anchor)), anchor))
        for _ in range(6 * n):
            if len(self.relations) == n:
                return self.relations
            self._say_more() if len(self.planes) > 2 and self.rng.random() < 0.1 else self._put_another(n)
        return None

    def _add(self, relation: Relation, plane: str | None = None) -> bool:
        """Take a relation, and the place of its subject, unless it contradicts or repeats what was said."""
        told = any(set(relation.names) == set(r.names) for r in self.relations)
        if told or len(set(relation.names)) < len(relation.names) or contradiction([*self.relations, relation]):
            return False
        self.relations.append(relation)
        if plane is not None:
            self.planes[relation.subject] = plane
        return True

    def _put_another(self, n: int) -> None:
        """A new thing: on the ground, on a piece of furniture, under one, on the wall, or at an edge."""
        bearing = [name for name, plane in self.planes.items() if plane == "ground" and thing_of(name).bears]
        roll = self.rng.random()
        if roll < 0.12 and (kinds := self._free(self.scene.wall)):
            name, below = self._named(self._pick(kinds)), self._any("ground")
            hung = [other for other, plane in self.planes.items() if plane == "wall"]
            predicate, other = ("above", below) if not hung or self.rng.random() < 0.5 else (
                self._pick(("left of", "right of")), hung[-1])
            self._add(Relation(predicate, name, (other,)), "wall")
        elif bearing and roll < 0.4 and not self.stage.surface:
            other = self._pick(bearing)
            under = self.rng.random() < 0.2
            kinds = self._free(self.scene.floor if under else self.scene.top)
            if kinds := [kind for kind in kinds if not under or things()[kind].verb in _SMALL]:
                predicate = "under" if under else "on"
                self._add(Relation(predicate, self._named(self._pick(kinds)), (other,)), f"{predicate} {other}")
        else:
            plane = self._pick([p for p in self.planes.values() if p != "wall" and not p.startswith("under")])
            kinds = self._free(self.scene.floor if plane == "ground" and not self.stage.surface else self.scene.top)
            if not kinds:
                return
            name = self._named(self._pick(kinds))
            if plane == "ground" and self.rng.random() < 0.14:
                self._add(Relation(self._spot(thing_of(name)), name), plane)
            elif self._add(self._beside(name, plane), plane) and len(self.relations) < n and self.rng.random() < 0.95:
                # one more thing is said of it in the same breath, if something true is found
                any(self._add(Relation(self._pick(SIDES), name, (self._any(plane),))) for _ in range(4))

    def _beside(self, name: str, plane: str) -> Relation:
        """A relation of a new thing to earlier ones of the same plane; half of the time to the last of them."""
        others = [other for other, p in self.planes.items() if p == plane]
        weights = np.array(list(_LINKS.values()))
        predicate = list(_LINKS)[int(self.rng.choice(len(weights), p=weights / weights.sum()))]
        if predicate.endswith("between"):
            if len(others) > 1:
                return Relation(predicate, name, tuple(self.rng.permutation(others)[:2].tolist()))
            predicate = self._pick(SIDES)
        return Relation(predicate, name, (others[-1] if self.rng.random() < 0.5 else self._pick(others),))

    def _say_more(self) -> None:
        """One more relation of two things that are there."""
        plane = self._pick([p for p in self.planes.values() if p != "wall"])
        others = [other for other, p in self.planes.items() if p == plane]
        if len(others) < 2:
            return
        a, b = self.rng.permutation(others)[:2].tolist()
        before = [r for r in self.relations if r.predicate in ("in front of", "behind")]
        if before and self.rng.random() < 0.5:  # in a row from front to back, so their sides may be level
            r = before[int(self.rng.integers(len(before)))]
            level = [p for p, axis in ALIGNED.items() if axis == "across"]
            relation = Relation(self._pick(level), r.subject, r.objects)
            told = any(set(other.names) == set(r.names) and other.predicate in ALIGNED for other in self.relations)
            if not told and not contradiction([*self.relations, relation]):
                self.relations.append(relation)
            return
        self._add(Relation(self._pick(SIDES), a, (b,)))

    def _spot(self, thing: Thing) -> str:
        """Where on the ground a thing may be said to be."""
        inside = not self.stage.surface and self.scene.wall
        spots = (*_CORNERS, *(_WALLED if inside else _EDGES))
        return "in the centre" if self.rng.random() < 0.45 else self._pick(spots)

    def _free(self, kinds: Sequence[str]) -> list[str]:
        """The kinds of things of which none is there."""
        taken = {self.stage.ground, *(thing_of(name).name for name in self.planes)}
        return [kind for kind in kinds if kind not in taken]

    def _named(self, kind: str) -> str:
        """A full name for a thing of a kind, sometimes with its finish or a colour."""
        thing = things()[kind]
        roll = self.rng.random()
        if thing.tinted and roll < 0.3:
            return f"{self._pick(COLOURS)} {kind if roll < 0.25 else f'{self._pick(thing.tinted)} {kind}'}"
        return f"{self._pick(thing.finishes)} {kind}" if roll < 0.42 else kind

    def _any(self, plane: str) -> str:
        return self._pick([name for name, p in self.planes.items() if p == plane])

    def _pick(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]
