"""The four steps of a pair: written, perturbed, drawn, judged. Each is a function of named seeds and nothing else."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from spatialt2i.core.config import DataConfig
from spatialt2i.core.protocols import Generator, Verifier, Writer
from spatialt2i.core.run import seed_of
from spatialt2i.core.types import Pair, Preference, Prompt, Verdict
from spatialt2i.data.images import encode

KEPT = "kept"
S, T = TypeVar("S"), TypeVar("T")
NOT_DRAWN = "not drawn"
UNPERTURBED, EDITS_DROPPED = "no satisfiable edit", "edits dropped"  # why a prompt is not perturbed
PROMPT_DROPPED = "prompt dropped"  # and another one written in its place
_ATTEMPTS = 1000  # texts in a row that are taken already, before a writer counts as exhausted
_PATIENCE = 10  # times that a writer may drop one prompt
_BATCH = 64  # pairs drawn and judged at a time, which bounds the memory of their pictures


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


class Judged(NamedTuple):
    """What became of a pair.

    Attributes:
        pair: the prompts.
        outcome: `KEPT`, or why not.
        preference: with both pictures, each judged under its own prompt; None where one was not drawn.
        crossed: whether each picture satisfies the other prompt as well (None = not judged), in which case the pair
            would teach something false.
    """

    pair: Pair
    outcome: str
    preference: Preference | None = None
    crossed: tuple[bool | None, bool | None] = (None, None)


def draw_and_judge(generator: Generator, verifier: Verifier, pairs: Sequence[Pair], *, seed: int) -> Iterator[Judged]:
    """Both pictures of each pair, from one seed, and what the verifier says of them."""
    for start in range(0, len(pairs), _BATCH):
        part = pairs[start:start + _BATCH]
        perfect, perturbed, n = [p.perfect for p in part], [p.perturbed for p in part], len(part)
        seeds = [seed_of(seed, "data-image", p.id) for p in perfect]
        images = generator.generate(prompts=[*perfect, *perturbed], seeds=seeds * 2)
        missing = {i % n: why for i, why in enumerate(images) if isinstance(why, str)}
        drawn = [i for i in range(n) if i not in missing]
        under = ((0, perfect), (n, perturbed), (0, perturbed), (n, perfect))
        verdicts = verifier.verify(images=[images[at + i] for at, _ in under for i in drawn],
                                   prompts=[prompts[i] for _, prompts in under for i in drawn])
        four = {i: verdicts[k::len(drawn)] for k, i in enumerate(drawn)}
        for i, pair in enumerate(part):
            if i in missing:
                yield Judged(pair, f"{NOT_DRAWN}: {missing[i]}")
                continue
            own, crossed = (four[i][0], four[i][1]), (four[i][2].overall, four[i][3].overall)
            chosen, rejected = encode(images[i], "png"), encode(images[n + i], "png")
            preference = Preference(pair, chosen, rejected, generator.name, seeds[i], own)
            yield Judged(pair, outcome(own, crossed), preference, crossed)


def outcome(verdicts: tuple[Verdict, Verdict], crossed: tuple[bool | None, bool | None]) -> str:
    """Whether a pair is kept, or why not."""
    overall = tuple(v.overall for v in verdicts)
    if None in (*overall, *crossed):
        return "not judged"
    if overall != (True, True):
        wrong = {(False, True): "chosen image wrong", (True, False): "rejected image wrong"}
        return wrong.get(overall, "both images wrong")
    return "fits the other prompt" if any(crossed) else KEPT
