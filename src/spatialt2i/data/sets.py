"""Prompts for evaluation and for Spatial-RL; they never meet."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from spatialt2i.core.config import BenchConfig, RLConfig
from spatialt2i.core.protocols import Writer
from spatialt2i.core.run import seed_of
from spatialt2i.core.types import Prompt
from spatialt2i.data.stages import fresh_prompt


def evaluation_sets(writer: Writer, *, config: BenchConfig, seed: int) -> dict[str, list[Prompt]]:
    """The sets ``in_domain`` and ``hard``: distinct texts, the numbers of relations in turn."""
    taken: set[str] = set()
    sets: dict[str, list[Prompt]] = {}
    for name, size, relations in (("in_domain", config.in_domain_prompts, config.in_domain_relations),
                                  ("hard", config.hard_prompts, config.hard_relations)):
        sets[name] = [_fresh(writer, id=f"{name}-{i}", n_relations=relations[i % len(relations)], seed=seed,
                             taken=taken) for i in range(size)]
    return sets


def training_stream(writer: Writer, *, config: RLConfig, seed: int, avoid: set[str]) -> Callable[[int], list[Prompt]]:
    """The prompts of an RL step, as a function of the step; none has a text in ``avoid``."""
    weights = np.array(config.relations) / sum(config.relations)

    def prompts(step: int) -> list[Prompt]:
        draws = np.random.default_rng(seed_of(seed, "rl-relations", step)).choice(
            len(weights), size=config.prompts_per_step, p=weights)
        taken = set(avoid)
        return [_fresh(writer, id=f"rl-{step}-{i}", n_relations=int(n) + 1, seed=seed, taken=taken)
                for i, n in enumerate(draws)]

    return prompts


def _fresh(writer: Writer, *, id: str, n_relations: int, seed: int, taken: set[str]) -> Prompt:
    return fresh_prompt(writer, id=id, n_relations=n_relations, taken=taken,
                        seeds=functools.partial(seed_of, seed, "prompt", id))
