"""The records that the rooms exchange: plain, frozen, and free of any deep-learning import.

Axes: P prompts, G images per prompt, K kept images, T denoising steps, S latent tokens, C latent channels, B batch.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from PIL.Image import Image

if TYPE_CHECKING:
    from torch import Tensor

    from spatialt2i.core.protocols import Verifier

# "left" or "right" with what may be glued to it (leftmost, rightward); "bright" and "leftover" are not meant
_SIDE = re.compile(r"\b(left|right)(most|wards?|hand)?\b", re.IGNORECASE)
# "right in the middle", "right next to": an adverb and no side, unless the word before makes it a noun
_ADVERB = re.compile(r"\s+(in|at|on|next|above|below|behind|beside|between|under|over|by|against)\b", re.IGNORECASE)
_NOUN = re.compile(r"\b(the|to|its|their|on|far|further|farther|top|bottom|upper|lower|front|back|rear)[\s-]+$",
                   re.IGNORECASE)


@dataclass(frozen=True)
class Relation:
    """One spatial fact that a prompt states.

    Attributes:
        predicate: canonical name, for example ``"left of"`` or ``"in the centre"``.
        subject: the object the fact is about, for example ``"red circle"``.
        objects: what it is related to: nothing (absolute), one object, or two (``"between"``).
    """

    predicate: str
    subject: str
    objects: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every object the relation mentions, subject first."""
        return (self.subject, *self.objects)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; `from_json` is its inverse."""
        return {"predicate": self.predicate, "subject": self.subject, "objects": list(self.objects)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Relation:
        """Read what `to_json` wrote."""
        return cls(value["predicate"], value["subject"], tuple(value["objects"]))


@dataclass(frozen=True)
class Prompt:
    """A text together with the relations that it states, so that nobody ever has to parse it.

    Attributes:
        id: unique in a run; also seeds how the text is phrased.
        text: what a generator reads.
        scene: the place, for example ``"kitchen table"``.
        relations: the facts, in the order of the text's clauses.
    """

    id: str
    text: str
    scene: str
    relations: tuple[Relation, ...]

    @property
    def objects(self) -> tuple[str, ...]:
        """The named objects, in the order of their first mention among the relations."""
        return tuple(dict.fromkeys(name for r in self.relations for name in r.names))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; `from_json` is its inverse."""
        relations = [r.to_json() for r in self.relations]
        return {"id": self.id, "text": self.text, "scene": self.scene, "relations": relations}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Prompt:
        """Read what `to_json` wrote."""
        relations = tuple(Relation.from_json(r) for r in value["relations"])
        return cls(value["id"], value["text"], value["scene"], relations)


@dataclass(frozen=True)
class Edit:
    """One changed relation of a pair.

    Attributes:
        kind: ``"flip"``, ``"swap"``, ``"move"`` or ``"depth"`` (front and back exchanged).
        index: position of the relation in both prompts' ``relations``.
        before, after: the relation in the perfect and in the perturbed prompt.
        dependent: True when it only follows from another edit.
    """

    kind: str
    index: int
    before: Relation
    after: Relation
    dependent: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; `from_json` is its inverse."""
        return {"kind": self.kind, "index": self.index, "before": self.before.to_json(),
                "after": self.after.to_json(), "dependent": self.dependent}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Edit:
        """Read what `to_json` wrote."""
        return cls(value["kind"], value["index"], Relation.from_json(value["before"]),
                   Relation.from_json(value["after"]), value["dependent"])


def applied(relations: Sequence[Relation], edits: Sequence[Edit]) -> tuple[Relation, ...]:
    """The relations after the edits."""
    changed = {e.index: e.after for e in edits}
    return tuple(changed.get(i, r) for i, r in enumerate(relations))


@dataclass(frozen=True)
class Pair:
    """A perfect prompt, the same prompt with only relations changed, and the changes."""

    perfect: Prompt
    perturbed: Prompt
    edits: tuple[Edit, ...]

    @property
    def n_perturbations(self) -> int:
        """How many edits were asked for; dependent ones do not count (the paper's "1" and "2-3"); 0 in others' sets."""
        return sum(not e.dependent for e in self.edits)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; `from_json` is its inverse."""
        return {"perfect": self.perfect.to_json(), "perturbed": self.perturbed.to_json(),
                "edits": [e.to_json() for e in self.edits]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Pair:
        """Read what `to_json` wrote."""
        return cls(Prompt.from_json(value["perfect"]), Prompt.from_json(value["perturbed"]),
                   tuple(Edit.from_json(e) for e in value["edits"]))


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one image under one prompt. ``None`` always means "not judged", never "wrong".

    Attributes:
        overall: every object once, every relation true, nothing else in the picture.
        relations: one entry per ``prompt.relations``.
        present: one entry per ``prompt.objects``: the object is there, well formed, exactly once.
        clean: nothing is drawn that the prompt did not ask for.
        judge: id of the judge, with its version.
        evidence: what the judge saw (boxes, reasons), JSON-able.
    """

    overall: bool | None
    relations: tuple[bool | None, ...]
    present: tuple[bool | None, ...]
    clean: bool | None
    judge: str
    evidence: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; `from_json` is its inverse."""
        return {"overall": self.overall, "relations": list(self.relations), "present": list(self.present),
                "clean": self.clean, "judge": self.judge, "evidence": self.evidence}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Verdict:
        """Read what `to_json` wrote."""
        return cls(value["overall"], tuple(value["relations"]), tuple(value["present"]), value["clean"],
                   value["judge"], value["evidence"])


@dataclass(frozen=True)
class Drawn:
    """How a picture came about.

    Attributes:
        generator: who drew it. seed: its seed; None where it is not known.
        settings: what the generator's pictures depend on besides prompt and seed, JSON-able.
    """

    generator: str
    seed: int | None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preference:
    """Two images judged under one prompt: ``chosen`` follows its layout, ``rejected`` does not.

    Attributes:
        pair: the prompts and edits; ``pair.perfect`` is the prompt that both images are judged under.
        chosen, rejected: encoded image files (PNG, WebP or JPEG bytes).
        drawn: how each came about.
        verdicts: of the chosen image under the perfect prompt, and of the rejected one under the perturbed prompt.
    """

    pair: Pair
    chosen: bytes
    rejected: bytes
    drawn: tuple[Drawn, Drawn]
    verdicts: tuple[Verdict, Verdict]

    @property
    def prompt(self) -> Prompt:
        """The perfect prompt."""
        return self.pair.perfect

    def swap(self) -> Preference:
        """The same two images seen from the perturbed prompt: chosen and rejected change places.

        Valid because each image satisfies its own prompt, and every edit breaks the other's; so a pair without edits,
        from a set of others, has no such view.

        Raises:
            ValueError: there are no edits.
        """
        if not self.pair.edits:
            raise ValueError(f"pair {self.prompt.id} has no edits, so its rejected image is right under no prompt")

        def back(e: Edit) -> Edit:
            return dataclasses.replace(e, before=e.after, after=e.before)

        pair = Pair(self.pair.perturbed, self.pair.perfect, tuple(back(e) for e in self.pair.edits))
        return dataclasses.replace(self, pair=pair, chosen=self.rejected, rejected=self.chosen,
                                   drawn=self.drawn[::-1], verdicts=self.verdicts[::-1])

    def mirror(self) -> Preference:
        """Both images flipped horizontally, with left and right exchanged in texts, predicates and object names.

        The images become PNG, without loss. The verdicts stay, but not their evidence, whose boxes no longer fit.
        """
        def relation(r: Relation) -> Relation:
            return Relation(mirror_text(r.predicate), mirror_text(r.subject), tuple(mirror_text(o) for o in r.objects))

        def prompt(p: Prompt) -> Prompt:
            return Prompt(p.id, mirror_text(p.text), mirror_text(p.scene), tuple(relation(r) for r in p.relations))

        edits = tuple(dataclasses.replace(e, before=relation(e.before), after=relation(e.after))
                      for e in self.pair.edits)
        chosen_verdict, rejected_verdict = (dataclasses.replace(v, evidence={}) for v in self.verdicts)
        return dataclasses.replace(
            self, pair=Pair(prompt(self.pair.perfect), prompt(self.pair.perturbed), edits),
            chosen=_mirror_image(self.chosen), rejected=_mirror_image(self.rejected),
            verdicts=(chosen_verdict, rejected_verdict))


def mirror_text(text: str) -> str:
    """The text with left and right exchanged where they name a side; its own inverse.

    "right in the middle" and "right next to" stay, because no side is meant.
    """
    def exchange(match: re.Match[str]) -> str:
        if not match[2] and _ADVERB.match(text, match.end()) and not _NOUN.search(text, 0, match.start()):
            return match[0]
        word = "right" if match[1].lower() == "left" else "left"
        shaped = word.upper() if match[1].isupper() else word.capitalize() if match[1][0].isupper() else word
        return shaped + (match[2] or "")

    return _SIDE.sub(exchange, text)


def _mirror_image(data: bytes) -> bytes:
    out = io.BytesIO()
    with PIL.Image.open(io.BytesIO(data)) as image:
        image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT).save(out, "PNG")
    return out.getvalue()


@dataclass(frozen=True)
class Scores:
    """Scores of B images. A NaN mean says "not judged".

    Attributes:
        mean: float64 [B], unbounded, higher is better.
        std: float64 [B], or None where the scorer has no idea of its own doubt.
    """

    mean: np.ndarray
    std: np.ndarray | None = None


@dataclass(frozen=True)
class Benchmark:
    """What is drawn, who judges it, and what becomes of the verdicts.

    Attributes:
        name: for example ``"in_domain"``.
        version: figures can be compared where name, version and judge are the same.
        prompts: each is drawn equally often.
        judge: gives every picture a verdict.
        aggregation: a prompt and the verdicts on its pictures -> measure -> its share, NaN where nothing was judged.
            Prompts are what was sampled, so intervals are over prompts.
    """

    name: str
    version: str
    prompts: tuple[Prompt, ...]
    judge: Verifier
    aggregation: Callable[[Prompt, Sequence[Verdict]], dict[str, float]]


@dataclass
class Rollout:
    """Trajectories of P prompts x G images through T denoising steps.

    Attributes:
        prompts: the P prompts.
        images: [P][G] decoded pictures.
        latents: float32 [P, G, T+1, S, C], noise first, picture last.
        log_probs: float32 [P, G, T], mean over latent elements, NaN at steps without noise.
        sigmas: float32 [T+1], the schedule, 1 = noise.
    """

    prompts: list[Prompt]
    images: list[list[Image]]
    latents: Tensor
    log_probs: Tensor
    sigmas: Tensor

    def take(self, index: Tensor) -> Rollout:
        """Keep some images of each group.

        Args:
            index: int64 [P, K], positions in the group; -1 pads a group that keeps fewer than K.

        Returns:
            A rollout whose G is K; where the index was -1 it has some image of the group, which nobody may look at.
        """
        safe = index.clamp(min=0)
        row = (safe * 0 + 1).cumsum(0) - 1  # [P, K], the prompt of each entry, without importing torch here
        images = [[self.images[p][g] for g in chosen] for p, chosen in enumerate(safe.tolist())]
        return Rollout(self.prompts, images, self.latents[row, safe], self.log_probs[row, safe], self.sigmas)
