"""Judges pictures by asking a vision-language model, one relation at a time (a `Verifier`).

It pre-filters; it does not replace people. It is asked about relations alone, so it judges neither the presence of
objects nor cleanness; a relation of a thing that is missing does not hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from spatialt2i.core.types import Prompt, Relation, Verdict
from spatialt2i.data.endpoint import AskError, Endpoint
from spatialt2i.data.images import encode
from spatialt2i.data.stages import at_a_time
from spatialt2i.data.verifiers import VLMConfig

ANSWERS = ("yes", "no", "unclear")


class _Answer(NamedTuple):
    """holds: None where nothing is known. why: what was answered, or why nothing."""

    holds: bool | None
    why: str


class VLMVerifier:
    """A chat model that looks at pictures.

    Args:
        config: how it is asked. endpoint: where it is.
    """

    def __init__(self, *, config: VLMConfig, endpoint: Endpoint) -> None:
        self.name = f"{config.endpoint.model} (sure {config.sure:g})"
        self._config, self._endpoint = config, endpoint

    def verify(self, *, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Verdict]:
        """One verdict per picture: of its relations, and of all of them together."""
        files = {id(image): self._file(image) for image in images}
        asked = [[(files[id(image)], relation) for relation in prompt.relations]
                 for image, prompt in zip(images, prompts, strict=True)]
        once = list(dict.fromkeys(itertools.chain(*asked)))  # both prompts of a pair share most of their relations
        answers = dict(zip(once, at_a_time(self._config.endpoint.concurrency, self._ask, once), strict=True))
        return [self._verdict(prompt, [answers[one] for one in each])
                for prompt, each in zip(prompts, asked, strict=True)]

    def _file(self, image: Image.Image) -> bytes:
        if max(image.size) > self._config.max_side:
            image = image.copy()
            image.thumbnail((self._config.max_side, self._config.max_side))
        return encode(image, "jpeg")

    def _ask(self, asked: tuple[bytes, Relation]) -> _Answer:
        file, relation = asked
        try:
            found = self._endpoint.choose(question(relation), file, options=ANSWERS, probable=self._config.probable)
        except AskError as error:
            return _Answer(None, error.kind)
        best = max(ANSWERS, key=lambda answer: found.get(answer, 0.0))
        p = found.get(best, 0.0)
        return _Answer({"yes": True, "no": False, "unclear": None}[best] if p >= self._config.sure else None,
                       f"{best} ({p:.2f})" if found else "no such answer")

    def _verdict(self, prompt: Prompt, answers: Sequence[_Answer]) -> Verdict:
        holds = tuple(answer.holds for answer in answers)
        overall = False if False in holds else None if None in holds else True
        return Verdict(overall, holds, (None,) * len(prompt.objects), None, self.name,
                       {"answers": [answer.why for answer in answers]})


def question(relation: Relation) -> str:
    """What is asked about a relation."""
    stated = " ".join([f"the {relation.subject} is {relation.predicate}",
                       " and ".join(f"the {name}" for name in relation.objects)]).rstrip()
    return (f"Look at the picture. Left and right are the viewer's. Is it true that {stated}? Answer with one word: "
            "yes; no, also where one of these things is not in the picture; or unclear, where it cannot be told.")
