"""The four steps of a pair: written, perturbed, drawn, judged. Each is a function of named seeds and nothing else."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from spatialt2i.core.config import DataConfig
from spatialt2i.core.protocols import Generator, Verifier, Writer
from spatialt2i.core.run import seed_of
from spatialt2i.core.types import Pair, Preference, Prompt, Verdict

KEPT = "kept"
UNPERTURBED = "no satisfiable edit"
_ATTEMPTS = 1000  # texts in a row that are taken already, before a writer counts as exhausted
_BATCH = 64  # pairs drawn and judged at a time, which bounds the memory of their pictures


def write_prompts(writer: Writer, *, indices: Sequence[int], config: DataConfig, seed: int,
                  taken: set[str] | None = None) -> list[Prompt]:
    """One prompt per candidate index; how many relations each has follows ``config.relations``.

    None has a text in ``taken``, which then has theirs.

    Raises:
        ValueError: the writer has no other texts.
    """
    weights = np.array(config.relations, dtype=np.float64) / sum(config.relations)
    prompts = []
    for i in indices:
        n = 1 + int(np.random.default_rng(seed_of(seed, "data-relations", i)).choice(len(weights), p=weights))
        prompts.append(fresh_prompt(writer, id=f"{seed}-{i}", n_relations=n, taken=set() if taken is None else taken,
                                    seeds=functools.partial(_prompt_seed, seed, i)))
    return prompts


def fresh_prompt(writer: Writer, *, id: str, n_relations: int, seeds: Callable[[int], int], taken: set[str]) -> Prompt:
    """A prompt whose text is not in ``taken``, which then has it.

    Args:
        writer, id, n_relations: see `Writer.write`.
        seeds: of the first attempt (0), the second ...
        taken: texts.

    Raises:
        ValueError: no other text was found.
    """
    for attempt in range(_ATTEMPTS):
        prompt = writer.write(id=id, n_relations=n_relations, seed=seeds(attempt))
        if prompt.text not in taken:
            taken.add(prompt.text)
            return prompt
    raise ValueError(f"the writer finds no new prompt with {n_relations} relations beside {len(taken)} others; ask for "
                     "fewer prompts")


def _prompt_seed(seed: int, index: int, attempt: int) -> int:
    return seed_of(seed, "data-prompt", index, *([attempt] if attempt else []))


def perturb_prompts(writer: Writer, prompts: Sequence[Prompt], *, config: DataConfig, seed: int) -> list[Pair | None]:
    """One edit with probability ``config.one_perturbation``, else two or three; None where no legal edit exists."""
    pairs = []
    for prompt in prompts:
        rng = np.random.default_rng(seed_of(seed, "data-edits", prompt.id))
        wanted = 1 if rng.random() < config.one_perturbation else int(rng.integers(2, 4))
        pairs.append(writer.perturb(prompt=prompt, n_edits=min(wanted, len(prompt.relations)),
                                    seed=seed_of(seed, "data-perturb", prompt.id)))
    return pairs


def draw_and_judge(generator: Generator, verifier: Verifier, pairs: Sequence[Pair], *,
                   seed: int) -> Iterator[tuple[Preference, tuple[bool | None, bool | None]]]:
    """Both pictures of each pair, from one seed, with their verdicts.

    Yields:
        The preference, whose verdicts judge each picture under its own prompt, and whether each picture satisfies the
        other prompt as well (None = not judged), in which case the pair would teach something false.
    """
    for start in range(0, len(pairs), _BATCH):
        part = pairs[start:start + _BATCH]
        perfect, perturbed = [p.perfect for p in part], [p.perturbed for p in part]
        seeds = [seed_of(seed, "data-image", p.id) for p in perfect]
        images = generator.generate(prompts=[*perfect, *perturbed], seeds=seeds * 2)
        verdicts = verifier.verify(images=images * 2, prompts=[*perfect, *perturbed, *perturbed, *perfect])
        n = len(part)
        for i, pair in enumerate(part):
            own: tuple[Verdict, Verdict] = (verdicts[i], verdicts[n + i])
            crossed = (verdicts[2 * n + i].overall, verdicts[3 * n + i].overall)
            yield Preference(pair, _png(images[i]), _png(images[n + i]), generator.name, seeds[i], own), crossed


def outcome(verdicts: tuple[Verdict, Verdict], crossed: tuple[bool | None, bool | None]) -> str:
    """Whether a pair is kept, or why not."""
    overall = tuple(v.overall for v in verdicts)
    if None in (*overall, *crossed):
        return "not judged"
    if overall != (True, True):
        wrong = {(False, True): "chosen image wrong", (True, False): "rejected image wrong"}
        return wrong.get(overall, "both images wrong")
    return "fits the other prompt" if any(crossed) else KEPT


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=3)  # 3 is the fastest for flat pictures, and 6 saves only 7 % more
    return out.getvalue()
