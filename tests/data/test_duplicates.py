"""Texts that say nearly the same."""

from __future__ import annotations

import itertools

import numpy as np

from spatialt2i.data.duplicates import _jaccard, _shingles, near_duplicates
from spatialt2i.data.prompts import SceneWriter

WRITER = SceneWriter()


def texts() -> list[str]:
    """Prompts, then the same with one to three words replaced, in a random order."""
    rng = np.random.default_rng(0)
    found = [WRITER.write(id=f"d{i}", n_relations=4 + i % 4, seed=i).text for i in range(180)]
    for i, text in enumerate(list(found)):
        words = text.split()
        for at in rng.permutation(len(words))[:1 + i % 3].tolist():
            words[at] = f"other{at}"
        found.append(" ".join(words))
    return [found[i] for i in rng.permutation(len(found)).tolist()]


def test_it_finds_what_comparing_all_with_all_finds() -> None:
    given = texts()
    exact = {j for (i, a), (j, b) in itertools.combinations(enumerate(map(_shingles, given)), 2)
             if _jaccard(a, b) > 0.8}
    found = near_duplicates(given)
    assert found == sorted(found) and set(found) <= exact
    assert 80 < len(exact) < 150 and len(found) >= 0.97 * len(exact)


def test_equal_texts_are_found_once_each_and_short_ones_too() -> None:
    assert near_duplicates(["a cup", "a jar", "A cup!", "", "a cup"]) == [2, 4]
