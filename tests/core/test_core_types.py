"""Records: there and back through JSON, and the two symmetries of a preference."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core_parts import CORNER, LEFT, RIGHT, preference
from spatialt2i.core.types import Edit, Pair, Preference, Prompt, Relation, Verdict, mirror_text


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("record", [
    LEFT, CORNER, preference().prompt, preference().pair, *preference().pair.edits, *preference().verdicts,
], ids=lambda r: type(r).__name__)
def test_json_there_and_back(record: Relation | Prompt | Pair | Edit | Verdict) -> None:
    back: Any = type(record).from_json(json.loads(json.dumps(record.to_json())))
    assert back == record


def test_swap_is_its_own_inverse_and_exchanges_the_sides() -> None:
    row = preference()
    swapped = row.swap()
    assert swapped.swap() == row
    assert (swapped.chosen, swapped.rejected) == (row.rejected, row.chosen)
    assert swapped.prompt == row.pair.perturbed
    assert (swapped.pair.edits[0].before, swapped.pair.edits[0].after) == (RIGHT, LEFT)
    assert swapped.verdicts == (row.verdicts[1], row.verdicts[0])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_mirror_flips_pictures_and_words(kind: str) -> None:
    row = preference(3, kind)
    mirrored = row.mirror()
    assert np.array_equal(pixels(mirrored.chosen), pixels(row.chosen)[:, ::-1])
    assert np.array_equal(pixels(mirrored.rejected), pixels(row.rejected)[:, ::-1])
    assert mirrored.prompt.relations == (RIGHT, Relation("in the top right corner", "green cross"))
    assert mirrored.pair.edits[0] == Edit("flip", 0, RIGHT, LEFT)
    assert mirrored.prompt.text == ("On a lawn, a red circle is to the right of a blue square. A green cross is in the "
                                    "top right corner, right in the middle of nothing.")
    assert (mirrored.prompt.id, mirrored.drawn) == (row.prompt.id, row.drawn)


def without_evidence(row: Preference) -> Preference:
    return dataclasses.replace(row, verdicts=tuple(dataclasses.replace(v, evidence={}) for v in row.verdicts))


def test_mirror_is_its_own_inverse_and_commutes_with_swap() -> None:
    row = preference()
    twice = row.mirror().mirror()
    assert np.array_equal(pixels(twice.chosen), pixels(row.chosen))
    unchanged = without_evidence(row)
    assert dataclasses.replace(twice, chosen=row.chosen, rejected=row.rejected) == unchanged
    assert row.mirror().swap() == row.swap().mirror()


@pytest.mark.parametrize(("text", "mirrored"), [
    ("Left of it", "Right of it"), ("the LEFT side", "the RIGHT side"), ("leftmost, rightward", "rightmost, leftward"),
    ("the bin stands left, by the left armrest", "the bin stands right, by the right armrest"),
    ("left-hand drawer", "right-hand drawer"), ("on the right in front of it", "on the left in front of it"),
    ("further left than", "further right than"), ("in the bottom right corner", "in the bottom left corner"),
    ("bright leftovers, copyright, uprightness", "bright leftovers, copyright, uprightness"),
    ("right in the middle", "right in the middle"), ("right next to the vase", "right next to the vase"),
    ("right above the left cup", "right above the right cup"), ("a cup left on the table", "a cup left on the table"),
])
def test_mirrored_text(text: str, mirrored: str) -> None:
    assert mirror_text(text) == mirrored
    assert mirror_text(mirrored) == text
