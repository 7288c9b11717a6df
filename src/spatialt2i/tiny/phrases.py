"""How the world's relations are put into words. Data, and the one function that renders it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spatialt2i.core.types import Relation
from spatialt2i.tiny.world import ABSOLUTE, CORNERS, EDGES

# Four phrasings each. Those of one row are aligned, so an edited relation keeps its phrasing where it can.
PHRASES: dict[str, tuple[str, str, str, str]] = {
    "left of": ("to the left of", "left of", "on the left side of", "further left than"),
    "right of": ("to the right of", "right of", "on the right side of", "further right than"),
    "above": ("above", "higher than", "over", "further up than"),
    "below": ("below", "lower than", "beneath", "further down than"),
    "in front of": ("in front of", "partly covering", "overlapping the front of", "partly in front of"),
    "behind": ("behind", "partly covered by", "overlapping the back of", "partly behind"),
    "inside": ("inside", "within", "contained in", "in the interior of"),
    "on top of": ("on top of", "resting on", "stacked on", "standing on"),
    "next to": ("next to", "beside", "close beside", "side by side with"),
    "between": ("between", "in between", "flanked by", "in the gap between"),
    "in the centre": ("in the centre", "in the middle", "at the centre of the picture", "right in the middle"),
} | {
    edge: (edge, *(edge.replace("at", other, 1) for other in ("against", "along", "close to")))
    for edge in EDGES
} | {
    corner: (corner, *(corner.replace("in", other, 1) for other in ("tucked into", "deep in", "at")))
    for corner in CORNERS
}
FRAMES = ("{a} is {r}", "{a} sits {r}", "{r} is {a}", "there is {a} {r}")
_STATING, _INTRODUCING = 0, 3
OPENERS = ("{place}, ", "here, {place}, ", "a view {place}: ", "picture this {place}: ")


def relation_words(predicate: str, variant: int) -> str:
    """The words of a predicate in one of its four phrasings."""
    return PHRASES[predicate][variant % 4]


def render(place: str, relations: Sequence[Relation], style: int) -> str:
    """The text of a prompt.

    Args:
        place: the scene, for example ``"on a kitchen table"``.
        relations: one clause each, in this order.
        style: seeds the choice of opener, frames and phrasings; the i-th clause keeps its choices whatever the
            relations say of its objects, so two relation lists that name the same objects clause by clause differ, with
            one style, in relation words and object order alone.
    """
    picks = np.random.default_rng(style).integers(0, 4, size=(len(relations) + 1, 2)).tolist()
    seen: set[str] = set()

    def mention(name: str) -> str:
        article = "the" if name in seen else "a"
        seen.add(name)
        return f"{article} {name}"

    clauses = []
    for relation, (frame, variant) in zip(relations, picks[1:], strict=True):
        # "there is" introduces, so not what was named already; all names count, since an edit may exchange them
        if frame == _INTRODUCING and not seen.isdisjoint(relation.names):
            frame = _STATING
        inverted = FRAMES[frame].startswith("{r}")
        subject = "" if inverted else mention(relation.subject)
        words = [relation_words(relation.predicate, variant)]
        if relation.predicate not in ABSOLUTE:
            words.append(" and ".join(mention(name) for name in relation.objects))
        subject = mention(relation.subject) if inverted else subject
        clauses.append(FRAMES[frame].format(a=subject, r=" ".join(words)))
    opener = OPENERS[picks[0][0]].format(place=place)
    text = opener + clauses[0] + "".join(f". {c[0].upper()}{c[1:]}" for c in clauses[1:]) + "."
    return text[0].upper() + text[1:]
