"""The four steps of a pair: written, perturbed, drawn, judged. Each is a function of named seeds and nothing else."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from PIL.Image import Image

from spatialt2i.core.config import RULES, DataConfig
from spatialt2i.core.protocols import Generator, Verifier, Writer
from spatialt2i.core.run import seed_of
from spatialt2i.core.types import Drawn, Pair, Prompt, Verdict
from spatialt2i.data.images import ImageStore

KEPT = "kept"
S, T = TypeVar("S"), TypeVar("T")
NOT_DRAWN = "not drawn"
_WHY = dict(zip(RULES, ("chosen image wrong", "rejected image wrong", *["fits the other prompt"] * 2), strict=True))
UNPERTURBED, EDITS_DROPPED = "no satisfiable edit", "edits dropped"  # why a prompt is not perturbed
PROMPT_DROPPED = "prompt dropped"  # and another one written in its place
_ATTEMPTS = 1000  # texts in a row that are taken already, before a writer counts as exhausted
_PATIENCE = 10  # times that a writer may drop one prompt


class Picture(NamedTuple):
    """A picture that was asked for.

    Attributes:
        by: who drew it, and how.
        image: its name in the store; empty where there is none. why: why there is none.
    """

    by: Drawn
    image: str = ""
    why: str = ""


class Dropped(RuntimeError):
    """A writer has no usable prompt, or no usable edits, for one seed.

    Attributes:
        kind: what to count it as.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class WriterError(RuntimeError):
    """A writer has nothing usable at all."""


def write_prompts(writer: Writer, *, indices: Sequence[int], config: DataConfig, seed: int,
                  taken: set[str] | None = None) -> tuple[list[Prompt], Counter[str]]:
    """One prompt per candidate index; how many relations each has follows ``config.relations``.

    Args:
        writer: a prompt that it drops is asked for anew, by another seed.
        indices: of the candidates. config: how many relations. seed: the run's.
        taken: texts that no prompt may have; it then has theirs. None allows all.

    Returns:
        The prompts, and how many were dropped on the way, by kind.

    Raises:
        ValueError: the writer has no other texts.
        WriterError: it drops everything.
    """
    weights = np.array(config.relations, dtype=np.float64) / sum(config.relations)
    drops: list[list[str]] = [[] for _ in indices]
    attempts = []
    for i, dropped in zip(indices, drops, strict=True):
        n = 1 + int(np.random.default_rng(seed_of(seed, "data-relations", i)).choice(len(weights), p=weights))
        attempts.append(_attempts(writer, id=f"{seed}-{i}", n_relations=n, drops=dropped,
                                  seeds=functools.partial(_prompt_seed, seed, i)))
    prompts = at_a_time(writer.threads, next, attempts)
    for i, others in enumerate(attempts if taken is not None else ()):
        prompts[i] = _first_new(itertools.chain([prompts[i]], others), taken)
    return prompts, Counter(itertools.chain(*drops))


def fresh_prompt(writer: Writer, *, id: str, n_relations: int, seeds: Callable[[int], int], taken: set[str]) -> Prompt:
    """A prompt whose text is not in ``taken``, which then has it.

    Args:
        writer, id, n_relations: see `Writer.write`.
        seeds: of the first attempt (0), the second ...
        taken: texts.

    Raises:
        ValueError: no other text was found.
        WriterError: the writer drops everything.
    """
    return _first_new(_attempts(writer, id=id, n_relations=n_relations, seeds=seeds, drops=[]), taken)


def _first_new(prompts: Iterable[Prompt], taken: set[str]) -> Prompt:
    prompt = next(prompt for prompt in prompts if prompt.text not in taken)
    taken.add(prompt.text)
    return prompt


def _attempts(writer: Writer, *, id: str, n_relations: int, seeds: Callable[[int], int],
              drops: list[str]) -> Iterator[Prompt]:
    """Prompts of one seed after another; the kinds of those that the writer drops are added to ``drops``."""
    for attempt in range(_ATTEMPTS):
        try:
            yield writer.write(id=id, n_relations=n_relations, seed=seeds(attempt))
        except Dropped as error:
            drops.append(error.kind)
            if len(drops) == _PATIENCE:
                raise WriterError(f"the writer has dropped the prompt {id} {_PATIENCE} times, at last because: "
                                  f"{error}; look into its settings. Finished work is kept") from error
    raise ValueError(f"the writer finds no new prompt with {n_relations} relations; ask for fewer prompts")


def _prompt_seed(seed: int, index: int, attempt: int) -> int:
    return seed_of(seed, "data-prompt", index, *([attempt] if attempt else []))


def perturb_prompts(writer: Writer, prompts: Sequence[Prompt], *, config: DataConfig, seed: int) -> list[Pair | str]:
    """One edit with probability ``config.one_perturbation``, else two or three.

    Returns:
        A pair for each prompt, or why there is none: `UNPERTURBED`, or `EDITS_DROPPED` and the kind.
    """
    def perturbed(prompt: Prompt) -> Pair | str:
        rng = np.random.default_rng(seed_of(seed, "data-edits", prompt.id))
        wanted = 1 if rng.random() < config.one_perturbation else int(rng.integers(2, 4))
        try:
            return writer.perturb(prompt=prompt, n_edits=min(wanted, len(prompt.relations)),
                                  seed=seed_of(seed, "data-perturb", prompt.id)) or UNPERTURBED
        except Dropped as error:
            return f"{EDITS_DROPPED}: {error.kind}"

    return at_a_time(writer.threads, perturbed, prompts)


def at_a_time(threads: int, function: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """The function's values; an error or Ctrl-C lets calls under way end, as they are paid, and begins no more."""
    pool = ThreadPoolExecutor(threads)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def draw_pairs(generators: tuple[Generator, Generator], images: ImageStore, pairs: Sequence[Pair], *,
               seed: int, same_seed: bool) -> list[tuple[Picture, Picture]]:
    """Both pictures of each pair, kept in ``images``.

    Args:
        generators: who draws the perfect, who the perturbed prompts; mostly one, so that style gives no answer away.
        images: where the pictures go. pairs: what is drawn. seed: the run's.
        same_seed: both pictures of a pair start from the same seed.
    """
    first = [seed_of(seed, "data-image", p.perfect.id) for p in pairs]
    other = first if same_seed else [seed_of(seed, "data-image", p.perfect.id, "rejected") for p in pairs]
    prompts = [p.perfect for p in pairs], [p.perturbed for p in pairs]
    if generators[0] is generators[1]:
        both = generators[0].generate(prompts=[*prompts[0], *prompts[1]], seeds=[*first, *other])
        drawn = both[:len(pairs)], both[len(pairs):]
    else:
        drawn = tuple(g.generate(prompts=p, seeds=s) for g, p, s in
                      zip(generators, prompts, (first, other), strict=True))

    def picture(side: int, i: int) -> Picture:
        found, by = drawn[side][i], Drawn(generators[side].name, (first, other)[side][i], generators[side].settings)
        return Picture(by, why=found) if isinstance(found, str) else Picture(by, image=images.keep(found))

    return [(picture(0, i), picture(1, i)) for i in range(len(pairs))]


class Judgement(NamedTuple):
    """What a verifier says of both pictures of a pair.

    Attributes:
        verdicts: of each picture under its own prompt.
        crossed: whether each picture satisfies the other prompt as well (None = not judged), in which case the pair
            would teach something false.
    """

    verdicts: tuple[Verdict, Verdict]
    crossed: tuple[bool | None, bool | None]


def judge_pairs(verifier: Verifier, pairs: Sequence[Pair], images: Sequence[tuple[Image, Image]]) -> list[Judgement]:
    """Judge both pictures of each pair under both its prompts."""
    perfect, perturbed = [p.perfect for p in pairs], [p.perturbed for p in pairs]
    chosen, rejected, n = [first for first, _ in images], [second for _, second in images], len(pairs)
    found = verifier.verify(images=[*chosen, *rejected] * 2, prompts=[*perfect, *perturbed, *perturbed, *perfect])
    return [Judgement((own, other), (crossed.overall, recrossed.overall))
            for own, other, crossed, recrossed in zip(*(found[i * n:(i + 1) * n] for i in range(4)), strict=True)]


def outcome(overall: tuple[bool | None, bool | None], crossed: tuple[bool | None, bool | None],
            keep: Sequence[str] = RULES) -> str:
    """Whether a pair is kept, or why not; ``keep`` says what must hold, see `RULES`."""
    holds = dict(zip(RULES, (*overall, *(None if fits is None else not fits for fits in crossed)), strict=True))
    asked = {rule: holds[rule] for rule in keep}
    if None in asked.values():
        return "not judged"
    broken = [rule for rule, held in asked.items() if not held]
    if {"chosen right", "rejected right"} <= set(broken):
        return "both images wrong"
    return _WHY[broken[0]] if broken else KEPT
