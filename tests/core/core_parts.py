"""A preference to test with."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from spatialt2i.core.types import Drawn, Edit, Pair, Preference, Prompt, Relation, Verdict

LEFT = Relation("left of", "red circle", ("blue square",))
RIGHT = Relation("right of", "red circle", ("blue square",))
CORNER = Relation("in the top left corner", "green cross")


def picture(seed: int, size: int = 16, kind: str = "PNG") -> bytes:
    """An encoded picture of noise."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, kind, lossless=True) if kind == "WEBP" else Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def preference(i: int = 0, kind: str = "PNG") -> Preference:
    """The i-th of endlessly many different preferences."""
    perfect = Prompt(f"p{i}", "On a lawn, a red circle is to the left of a blue square. A green cross is in the top "
                     "left corner, right in the middle of nothing.", "on a lawn", (LEFT, CORNER))
    perturbed = Prompt(f"p{i}*", perfect.text.replace("left of", "right of"), "on a lawn", (RIGHT, CORNER))
    pair = Pair(perfect, perturbed, (Edit("flip", 0, LEFT, RIGHT),))
    verdict = Verdict(True, (True, None), (True, True, None), True, "judge 1", {"boxes": {"red circle": [1.5, 2, 3, 4]}})
    other = Verdict(None, (None, True), (True, True, True), None, "judge 1", {"reason": "ünclear"})
    return Preference(pair, picture(2 * i, kind=kind), picture(2 * i + 1, kind=kind), 
                      (Drawn("painter", 2**62 + i, {"steps": 4}), Drawn("other", i)), (verdict, other))
