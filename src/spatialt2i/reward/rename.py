"""Prompts with one object renamed: the rejected side of some pairs, so that a score reads what things are, too.

The prompts of a preference pair name the same objects, so pairs alone teach a score nothing about what these are, and a
generator that is tuned on such a score may draw squares for triangles. A prompt that names another object is a worse
match for the chosen image (hard negatives as in NegCLIP, arXiv 2210.01936).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from spatialt2i.core.types import Prompt


def rename(prompt: Prompt, names: Sequence[str], rng: np.random.Generator) -> str | None:
    """The prompt's text with one of its objects called otherwise, by a name that shares a word where there is one.

    Args:
        prompt: its ``objects`` are looked for in its text.
        names: the other names there are.
        rng: decides which object, and its name.

    Returns:
        The text, or None where it does not contain the object by its name, there is no other name, or no object.
    """
    if not prompt.objects:
        return None
    old = prompt.objects[int(rng.integers(len(prompt.objects)))]
    others = [name for name in names if name not in prompt.objects]
    near = [name for name in others if set(name.split()) & set(old.split())] or others
    if not near:
        return None
    new = near[int(rng.integers(len(near)))]
    text, found = re.subn(rf"\b{re.escape(old)}\b", lambda _: new, prompt.text)
    return text if found else None
