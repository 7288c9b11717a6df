"""How the relations of a scene are put into words. Data, and the one function that renders it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spatialt2i.core.run import seed_of
from spatialt2i.core.types import Relation
from spatialt2i.data.consistency import PLACES
from spatialt2i.data.vocabulary import Scene, thing_of

# Those of one row are aligned, so that an edited relation keeps its phrasing.
PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("to the left of", "left of", "left of", "left of"),
    "right of": ("to the right of", "right of", "right of", "right of"),
    "in front of": ("in front of", "in front of", "in front of", "just in front of"),
    "behind": ("behind", "behind", "behind", "right behind"),
    "above": ("above", "above", "above", "directly above"),
    "below": ("below", "below", "below", "directly below"),
    "on": ("on", "on top of", "on", "on top of"), "under": ("under", "underneath", "under", "underneath"),
    "next to": ("next to", "right beside", "close to", "near"),
    "between": ("between", "in between", "between", "between"),
    "midway between": ("midway between", "halfway between", "at the midpoint between", "centered between"),
    "in the centre": ("in the center of", "in the middle of", "in the center of", "at the center of"),
} | {f"at the {side} edge": (f"at the {side} edge of", f"along the {side} edge of", f"close to the {side} edge of",
                             f"at the {side} edge of") for side in ("left", "right", "front", "back")
} | {f"against the {side} wall": (f"against the {side} wall", f"along the {side} wall", f"against the {side} wall",
                                  f"against the {side} wall") for side in ("left", "right", "back")
} | {f"in the {side} corner": (f"in the {side} corner of", f"tucked into the {side} corner of",
                               f"in the {side} corner of", f"in the far {side} corner of")
     for side in ("front left", "front right", "back left", "back right")}
# "... stands to its left": in place of the object, where that is what the clause before was about
PRONOUNS = {"left of": "to its left", "right of": "to its right", "in front of": "in front of it",
            "behind": "behind it", "above": "above it", "below": "below it", "next to": "next to it",
            "on": "on top of it", "under": "underneath it"}
EDGES = {"aligned on the left with": "left", "aligned on the right with": "right", "aligned in front with": "front",
         "aligned at the back with": "back"}
LEVEL = ("are aligned", "line up", "are level")
IT, ALSO = "it", "also"  # how a clause leans on the one before
JOINS = (". ", ". ", ". ", ". ", ", and ", ", while ")
MOODS = (
    "Soft morning light fills the scene.", "The air looks warm and still.", "The light is gentle and even.",
    "Everything is in sharp focus.", "The mood is calm and quiet.", "The colors are natural and muted.",
    "It looks like an ordinary weekday afternoon.", "The photograph is taken at eye level.",
    "Fine details and textures are clearly visible.", "The scene is tidy and realistic.")
SHORTEST, LONGEST = 35, 125  # words of the paper's prompts


@dataclass(frozen=True)
class Stage:
    """What the clauses of a prompt stand on; named by the prompt's id, so that an edited prompt has the same.

    Attributes:
        place: ``"in a sunlit kitchen"``. ground: what has edges and corners, ``"marble island"``.
        surface: whether that is a piece of furniture, and not the whole place.
    """

    place: str
    ground: str
    surface: bool


def stage_of(scene: Scene, id: str) -> Stage:
    """Where a prompt of this id takes place."""
    rng = np.random.default_rng(seed_of("stage", id))
    surface = not scene.floor or rng.random() < 0.55
    place = scene.places[int(rng.integers(len(scene.places)))]
    ground = scene.surfaces[int(rng.integers(len(scene.surfaces)))] if surface else scene.floor_name
    return Stage(place, ground, surface)


def render(scene: Scene, relations: Sequence[Relation], id: str,
           like: Sequence[Relation] | None = None) -> str:
    """The text of a prompt.

    The id picks opener, frames and phrasings, and the i-th clause keeps its choices whatever its relation says of the
    same objects. So two lists of relations that name the same objects clause by clause differ, with one id and the same
    ``like``, in relation words, articles and the order of objects alone.

    Args:
        scene: of the prompt. relations: one clause each, in this order. id: of the prompt, or of the one it was made
            of.
        like: the relations of the prompt that an edited one was made of; its clauses lean on each other as theirs do.
    """
    text = _clauses(scene, relations, id, manners_of(like or relations))
    words = len((_clauses(scene, like, id, manners_of(like)) if like else text).split())
    for mood in np.random.default_rng(seed_of("mood", id)).permutation(MOODS).tolist():
        if words < SHORTEST:
            text, words = f"{text} {mood}", words + len(mood.split())
    return _capital(text)


def _clauses(scene: Scene, relations: Sequence[Relation], id: str, manners: Sequence[str]) -> str:
    """Opener and clauses, with full stops."""
    stage, rng = stage_of(scene, id), np.random.default_rng(seed_of("style", id))
    picks = rng.integers(0, 12, size=(len(relations) + 1, 3)).tolist()  # 12: all our choices are of 2, 3, 4 or 6
    manners = (*manners, "")
    text = _opener(stage, relations[0], picks[-1][0])
    seen = {stage.ground} if stage.ground in text else set()
    joined = True  # the clause before this one was joined to another
    for i, relation in enumerate(relations):
        manner, leant_on = manners[i], manners[i + 1]
        inverted = manner == IT or leant_on != ALSO and picks[i][0] % 3 == 1
        clause = _clause(relation, stage, seen, picks[i][1:], manner=manner, inverted=inverted)
        if manner == ALSO:
            text += f", which is {clause}" if manners[i - 1] == IT else f" and {clause}"
            continue
        join = ". " if joined or manner or leant_on == ALSO else JOINS[picks[i][0] // 2]
        text += clause if i == 0 else ". " + _capital(clause) if join == ". " else join + clause
        joined = i == 0 or join != ". "
    return text + "."


def manners_of(relations: Sequence[Relation]) -> tuple[str, ...]:
    """How each clause leans on the one before it.

    `IT` where it puts a new thing beside what that one was about, `ALSO` where it says one more thing of the same
    subject, else "". The objects of a clause that leans, or is leant on, cannot be exchanged without another wording.
    """
    found, seen = [""], set(relations[0].names)
    for before, relation in itertools.pairwise(relations):
        manner = ""
        if found[-1] != ALSO and not {relation.predicate, before.predicate} & EDGES.keys():
            if relation.subject == before.subject:
                manner = ALSO
            elif not found[-1] and relation.predicate in PRONOUNS and relation.objects[0] == before.subject \
                    and relation.subject not in seen:
                manner = IT
        found.append(manner)
        seen |= set(relation.names)
    return tuple(found)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _opener(stage: Stage, first: Relation, pick: int) -> str:
    if stage.surface and first.predicate not in PLACES:  # else the first clause names the ground
        return (f"on the {stage.ground} {stage.place}, ", f"{stage.place}, on the {stage.ground}, ")[pick % 2]
    return f"{stage.place}, "


def _clause(relation: Relation, stage: Stage, seen: set[str], picks: Sequence[int], *, manner: str,
            inverted: bool) -> str:
    """A clause without its capital and its full stop; what it names is put into ``seen``."""
    def mention(name: str) -> str:
        if name in seen:
            return f"the {thing_of(name).name}"
        seen.add(name)
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"

    predicate, known = relation.predicate, relation.subject in seen
    if predicate in EDGES:
        both = " and ".join(mention(name) for name in relation.names)
        return f"the {EDGES[predicate]} edges of {both} {LEVEL[picks[0] % 3]}"
    subject = "" if inverted or manner == ALSO else mention(relation.subject)
    phrase = PRONOUNS[predicate] if manner == IT else PHRASES[predicate][picks[0] % 4]
    if manner == IT:
        pass  # the object is the "it" of the phrase
    elif relation.objects:
        phrase += " " + " and ".join(mention(name) for name in relation.objects)
    elif phrase.endswith("of"):
        phrase += f" the {stage.ground.split()[-1] if stage.ground in seen else stage.ground}"
        seen.add(stage.ground)
    if manner == ALSO:
        return phrase
    verb = "is" if known or picks[1] % 4 == 3 else thing_of(relation.subject).verb
    return f"{phrase} {verb} {mention(relation.subject)}" if inverted else f"{subject} {verb} {phrase}"
