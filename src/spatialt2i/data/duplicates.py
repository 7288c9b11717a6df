"""Finds prompts that say nearly the same: MinHash for candidates (datasketch), the exact Jaccard index to decide."""

from __future__ import annotations

import re
from collections.abc import Sequence

from datasketch import MinHash, MinHashLSH

_WORDS = 3  # of a shingle
_PERMUTATIONS = 128


def near_duplicates(texts: Sequence[str], *, above: float = 0.8) -> list[int]:
    """Positions of the texts that nearly repeat an earlier one.

    Args:
        texts: any. above: the Jaccard index of the sets of runs of three words from which on two are alike, 0 to 1.

    Returns:
        In order. Of a pair far above the limit the later one is always found, of one just above it nearly always.
    """
    index = MinHashLSH(threshold=0.8 * above, num_perm=_PERMUTATIONS)  # rather too many candidates than too few
    found = []
    for i, text in enumerate(texts):
        shingles = _shingles(text)
        sketch = MinHash(_PERMUTATIONS)
        sketch.update_batch([shingle.encode() for shingle in shingles])
        if any(_jaccard(shingles, _shingles(texts[other])) > above for other in index.query(sketch)):
            found.append(i)
        index.insert(i, sketch, check_duplication=False)
    return found


def _shingles(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i:i + _WORDS]) for i in range(max(len(words) - _WORDS + 1, 1))}


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)
