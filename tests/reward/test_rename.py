import numpy as np
import pytest

from spatialt2i.core.types import Prompt, Relation
from spatialt2i.reward.rename import rename


def prompt(text, *objects):
    return Prompt("p", text, "shelf", (Relation("left of", objects[0], objects[1:]),))


def renamed(p, names, seeds=range(40)):
    return {rename(p, names, np.random.default_rng(seed)) for seed in seeds}


def test_every_mention_of_one_object_gets_a_name_that_shares_a_word():
    p = prompt("A red mug is left of a lamp; the red mug is tall.", "red mug", "lamp")
    assert renamed(p, ["blue mug", "chair", "lamp", "red mug", "red pan"]) == {
        "A blue mug is left of a lamp; the blue mug is tall.", "A red pan is left of a lamp; the red pan is tall.",
        "A red mug is left of a blue mug; the red mug is tall.", "A red mug is left of a chair; the red mug is tall.",
        "A red mug is left of a red pan; the red mug is tall."}


def test_only_whole_names_are_replaced():
    assert renamed(prompt("A cat is left of a cattle pen.", "cat"), ["dog"]) == {"A dog is left of a cattle pen."}


@pytest.mark.parametrize(("text", "names"), [("A kitten sleeps.", ["dog"]), ("A cat sleeps.", ["cat"]),
                                             ("A cat sleeps.", [])])
def test_what_cannot_be_renamed_is_none(text, names):
    assert renamed(prompt(text, "cat"), names) == {None}
