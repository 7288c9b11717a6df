"""The writer and the perturber, and what they guarantee."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from spatialt2i.core.types import Pair, Relation, applied
from spatialt2i.tiny.grammar import MAX_RELATIONS, TinyWriter, alternatives
from spatialt2i.tiny.layout import solve
from spatialt2i.tiny.phrases import OPENERS, PHRASES, render
from spatialt2i.tiny.world import OBJECTS, PREDICATES, SCENES, margin

WRITER = TinyWriter()
_RELATION_WORDS = "|".join(sorted((re.escape(p) for v in PHRASES.values() for p in v), key=len, reverse=True))


@pytest.fixture(scope="module")
def prompts() -> list:
    return [WRITER.write(id=f"g{i}", n_relations=1 + i % 12, seed=i) for i in range(240)]


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    found = []
    for i in range(220):
        prompt = WRITER.write(id=f"q{i}", n_relations=2 + i % 6, seed=1000 + i)
        pair = WRITER.perturb(prompt=prompt, n_edits=1 + i % min(3, len(prompt.relations)), seed=i)
        if pair is not None:
            found.append(pair)
    assert len(found) > 200
    return found


# ---- writer

def test_prompts_have_the_relations_asked_for_and_follow_from_seeds(prompts: list) -> None:
    for i, p in enumerate(prompts):
        assert len(p.relations) == 1 + i % 12
        assert 2 <= len(p.objects) <= 7 and set(p.objects) <= set(OBJECTS) or len(p.relations) == 1
        assert len({name.split()[0] for name in p.objects}) == len(p.objects), "a colour names one object"
    assert prompts[7] == WRITER.write(id="g7", n_relations=8, seed=7) != WRITER.write(id="g7", n_relations=8, seed=8)


def test_every_predicate_has_four_phrasings_and_is_used(prompts: list) -> None:
    assert set(PHRASES) == set(PREDICATES)
    assert all(len(set(v)) == 4 for v in PHRASES.values())
    assert {r.predicate for p in prompts for r in p.relations} == set(PREDICATES)


def test_a_prompt_opens_with_its_place_and_names_every_object(prompts: list) -> None:
    for p in prompts:
        assert p.scene in SCENES and p.scene in p.text.lower()
        assert any(p.text.lower().startswith(o.format(place=p.scene)) for o in OPENERS)
        assert all(name in p.text.lower() for name in p.objects)
        assert p.text.count(".") == len(p.relations) and p.text[0].isupper()
        first = {n: p.text.lower().index(n) for n in p.objects}
        assert all(re.search(rf"\ba {n}", p.text[:at + len(n)].lower()) for n, at in first.items())


def test_written_prompts_can_be_satisfied(prompts: list) -> None:
    easy = [p for p in prompts if len(p.relations) <= 6]
    solved = [solve(p.objects, p.relations, p.scene, np.random.default_rng(0)) is not None for p in easy]
    assert np.mean(solved) > 0.95


def test_only_new_objects_are_introduced(prompts: list, pairs: list[Pair]) -> None:
    texts = [p.text for p in (*prompts, *(q for pair in pairs for q in (pair.perfect, pair.perturbed)))]
    assert not [t for t in texts if "there is the " in t.lower()]
    assert sum("there is a " in t.lower() for t in texts) > 0.1 * len(texts)


def test_an_object_that_was_named_is_not_introduced_again() -> None:
    names = ("red circle", "blue square", "pink cross")
    first, second = (Relation("left of", a, (b,)) for a, b in itertools.pairwise(names))
    at = {text.split(". ")[1] for text in (render("on a lawn", (first, second), style) for style in range(200))}
    assert {"The blue square is left of a pink cross.", "Left of a pink cross is the blue square."} <= at
    assert not any(clause.startswith("There is") for clause in at)


@pytest.mark.parametrize("n", [0, -1, MAX_RELATIONS + 1])
def test_a_number_of_relations_out_of_range_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=rf"n_relations must be 1..12, got {n}"):
        WRITER.write(id="x", n_relations=n, seed=0)


# ---- perturber

def test_only_relation_words_and_the_order_of_objects_change(pairs: list[Pair]) -> None:
    def others(text: str) -> Counter[str]:
        words = re.findall(r"\w+", re.sub(rf"\b(?:{_RELATION_WORDS})\b", " ", text.lower()))
        return Counter(w for w in words if w not in ("a", "the"))

    for pair in pairs:
        assert pair.perfect.text != pair.perturbed.text and pair.perfect.scene == pair.perturbed.scene
        assert others(pair.perfect.text) == others(pair.perturbed.text), pair


def test_edits_say_what_changed(pairs: list[Pair]) -> None:
    for pair in pairs:
        edited = {e.index: e for e in pair.edits}
        assert len(edited) == len(pair.edits) and len(pair.perfect.relations) == len(pair.perturbed.relations)
        for i, (before, after) in enumerate(zip(pair.perfect.relations, pair.perturbed.relations, strict=True)):
            assert (before == after) == (i not in edited)
            if i in edited:
                assert (edited[i].before, edited[i].after) == (before, after)
                assert any(o.after == after and o.kind == edited[i].kind for o in alternatives(i, before))
    assert {e.kind for p in pairs for e in p.edits} == {"flip", "swap", "move", "depth"}
    assert {p.n_perturbations for p in pairs} == {1, 2, 3} and any(e.dependent for p in pairs for e in p.edits)


def test_each_scene_breaks_exactly_the_edited_relations(pairs: list[Pair]) -> None:
    solved = 0
    for i, pair in enumerate(pairs):
        edited = {e.index for e in pair.edits}
        for own, other in ((pair.perturbed, pair.perfect), (pair.perfect, pair.perturbed)):
            scene = solve(own.objects, own.relations, own.scene, np.random.default_rng(i))
            if scene is not None:
                solved += 1
                broken = {k for k, r in enumerate(other.relations) if margin(r, scene.boxes) <= 0}
                assert broken == edited, (own, other)
    assert solved > 0.9 * 2 * len(pairs)


def test_dependent_edits_are_needed() -> None:
    """Few are left without which a search finds a scene; a short first search alone would leave one pair in ten."""
    needless = dependent = 0
    for i in range(100):
        prompt = WRITER.write(id=f"n{i}", n_relations=5 + i % 3, seed=3000 + i)
        pair = WRITER.perturb(prompt=prompt, n_edits=1, seed=i)
        extra = [e for e in pair.edits if e.dependent] if pair is not None else []
        dependent += bool(extra)
        fewer = [applied(prompt.relations, [e for e in pair.edits if e is not one]) for one in extra]
        needless += any(solve(prompt.objects, relations, prompt.scene, np.random.default_rng(77 + i), tries=40)
                        for relations in fewer)
    assert needless <= 2 and dependent >= 10, (needless, dependent)


def test_perturbing_follows_from_seeds_and_refuses_too_many_edits() -> None:
    prompt = WRITER.write(id="x", n_relations=3, seed=5)
    assert WRITER.perturb(prompt=prompt, n_edits=1, seed=3) == WRITER.perturb(prompt=prompt, n_edits=1, seed=3)
    assert WRITER.perturb(prompt=prompt, n_edits=4, seed=3) is None
    many = WRITER.write(id="y", n_relations=7, seed=6)
    assert len({repr(WRITER.perturb(prompt=many, n_edits=2, seed=4)) for _ in range(3)}) == 1


def test_an_edited_clause_keeps_its_phrasing() -> None:
    relations = WRITER.write(id="x", n_relations=4, seed=2).relations
    a, b = (render("on a lawn", r, 11) for r in (relations, (*relations[:3], alternatives(3, relations[3])[0].after)))
    assert a.split(". ")[:3] == b.split(". ")[:3]
