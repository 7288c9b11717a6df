"""The writer of prompts about real places, its vocabulary, and edits by rule."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest

from spatialt2i.core.config import DataConfig
from spatialt2i.core.types import Pair, Prompt, Relation, applied
from spatialt2i.data import prompts as prompts_module
from spatialt2i.data.consistency import PREDICATES, contradiction
from spatialt2i.data.perturb import alternatives
from spatialt2i.data.prompts import MAX_RELATIONS, SceneWriter
from spatialt2i.data.stages import perturb_prompts, write_prompts
from spatialt2i.data.vocabulary import scenes, thing_of, things
from spatialt2i.data.wording import (
    EDGES, LONGEST, PHRASES, PRONOUNS, SHORTEST, manners_of, render, stage_of,
)

WRITER = SceneWriter()
_WORDS = sorted({*(p for v in PHRASES.values() for p in v), *PRONOUNS.values()}, key=len, reverse=True)
_RELATION_WORDS = re.compile(rf"\b(?:{'|'.join(map(re.escape, _WORDS))})\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [WRITER.write(id=f"s{i}", n_relations=1 + i % 12, seed=i) for i in range(600)]


@pytest.fixture(scope="module")
def pairs(prompts: list[Prompt]) -> list[Pair]:
    found = [WRITER.perturb(prompt=p, n_edits=1 + i % min(3, max(len(p.relations) - 2, 1)),
                            seed=i) for i, p in enumerate(prompts)]
    kept = [pair for pair in found if pair is not None]
    assert len(kept) > 0.95 * len(prompts)
    return kept


# ---- vocabulary

def test_the_world_is_as_large_as_promised() -> None:
    assert len(scenes()) == 25 and len(things()) >= 300
    for scene in scenes().values():
        assert len(scene.top) >= 20 and scene.places and scene.surfaces and scene.share > 0
        for names in (scene.top, scene.floor, scene.wall):
            assert len(set(names)) == len(names) and set(names) <= set(things()), scene.name
        assert all(things()[name].verb == "hangs" for name in scene.wall), scene.name
        assert not any(things()[name].verb == "hangs" for name in (*scene.top, *scene.floor)), scene.name


def test_every_thing_is_somewhere_and_has_a_look() -> None:
    used = {name for s in scenes().values() for name in (*s.top, *s.floor, *s.wall)}
    assert used == set(things())
    assert all(t.finishes and t.verb in ("stands", "sits", "lies", "rests", "hangs") for t in things().values())


def test_a_name_tells_the_thing() -> None:
    assert thing_of("blue enamel kettle").name == "kettle"
    assert thing_of("brown pair of slippers").name == "pair of slippers"
    with pytest.raises(ValueError, match="no object of objects.toml"):
        thing_of("blue unicorn")


# ---- writer

def test_prompts_have_the_relations_asked_for_and_follow_from_seeds(prompts: list[Prompt]) -> None:
    for i, p in enumerate(prompts):
        assert len(p.relations) == 1 + i % 12 and contradiction(p.relations) is None
    assert prompts[7] == WRITER.write(id="s7", n_relations=8, seed=7) != WRITER.write(id="s7", n_relations=8, seed=8)
    assert {r.predicate for p in prompts for r in p.relations} >= set(PREDICATES) - {
        "below", "aligned in front with", "aligned at the back with"}


def test_texts_have_the_papers_lengths_and_name_everything_with_its_looks(prompts: list[Prompt]) -> None:
    for p in prompts:
        assert SHORTEST <= len(p.text.split()) <= LONGEST
        for name in p.objects:
            assert re.search(rf"\b{re.escape(name)}\b", p.text), (name, p.text)
        kinds = [thing_of(name).name for name in p.objects]
        assert len(set(kinds)) == len(kinds), "two of a kind could not be told apart"
        assert stage_of(scenes()[p.scene], p.id).place in p.text[0].lower() + p.text[1:]


def test_things_are_introduced_before_they_are_known(prompts: list[Prompt]) -> None:
    for p in prompts:
        kinds = [thing_of(name).name for name in p.objects]
        for name, kind in zip(p.objects, kinds, strict=True):
            if any(other.startswith(f"{kind} ") for other in kinds):  # the umbrella, and the umbrella stand
                continue
            article = "an" if name[0] in "aeiou" else "a"
            first = re.search(rf"\b{article} {re.escape(name)}\b", p.text, re.IGNORECASE)
            known = re.search(rf"\bthe {re.escape(kind)}\b", p.text, re.IGNORECASE)
            assert first and (known is None or first.start() < known.start()), (name, p.text)


def test_sentences_are_whole(prompts: list[Prompt]) -> None:
    for p in prompts:
        assert p.text[0].isupper() and p.text.endswith(".") and "  " not in p.text and ".." not in p.text
        assert all(s[0].isupper() for s in p.text.split(". "))


@pytest.mark.parametrize("n", [0, -1, MAX_RELATIONS + 1])
def test_a_number_of_relations_out_of_range_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=rf"n_relations must be 1..12, got {n}"):
        WRITER.write(id="x", n_relations=n, seed=0)


def test_a_place_whose_things_are_all_named_still_gets_its_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    pantry = scenes()["pantry"]
    bare = dataclasses.replace(pantry, floor=pantry.floor[:7], wall=pantry.wall[:1])
    monkeypatch.setattr(prompts_module, "scenes", lambda: {"pantry": bare})
    for seed in range(60):
        assert len(WRITER.write(id=f"bare{seed}", n_relations=9, seed=seed).relations) == 9


def test_it_is_what_the_clause_before_was_about() -> None:
    first = Relation("in the centre", "kettle")
    second, third = Relation("left of", "mug", ("kettle",)), Relation("behind", "mug", ("jar",))
    assert manners_of((first, second, third)) == ("", "it", "also")
    assert manners_of((first, Relation("in the back left corner", "jar"), second)) == ("", "", "")
    texts = {render(scenes()["kitchen"], (first, second), str(i)) for i in range(50)}
    assert all(re.search(r"To its left (stands|sits|is) a mug\.", t) for t in texts)


def test_the_statistics_are_the_papers() -> None:
    """Relations per prompt within 0.05 total variation; scenes by their shares; most prompts of 56 to 62 words."""
    config = DataConfig()
    found = write_prompts(WRITER, indices=range(3000), config=config, seed=0)[0]
    wanted = np.array(config.relations) / sum(config.relations)
    counts = np.bincount([len(p.relations) for p in found], minlength=13)[1:] / len(found)
    assert np.abs(counts - wanted).sum() / 2 < 0.05
    shares = {s.name: s.share / sum(o.share for o in scenes().values()) for s in scenes().values()}
    scene_counts = Counter(p.scene for p in found)
    assert sum(abs(scene_counts[name] / len(found) - share) for name, share in shares.items()) / 2 < 0.05
    words = np.bincount([len(p.text.split()) for p in found], minlength=130)
    assert 53 <= int(np.convolve(words, np.ones(7), "same").argmax()) <= 65
    assert len({p.text for p in found}) == len(found)


# ---- perturber

def test_only_relation_words_articles_and_the_order_of_objects_change(pairs: list[Pair]) -> None:
    def others(text: str) -> Counter[str]:
        text = re.sub(rf"\b({'|'.join(EDGES.values())}) edges\b", " edges", text)
        return Counter(w for w in re.findall(r"[\w-]+", _RELATION_WORDS.sub(" ", text).lower())
                       if w not in ("a", "an", "the"))

    for pair in pairs:
        assert pair.perfect.text != pair.perturbed.text and pair.perfect.scene == pair.perturbed.scene
        difference = others(pair.perfect.text) - others(pair.perturbed.text)
        # a thing that another one was exchanged with is named first, with its looks, or stands where the other one sat
        looks = {word for name in pair.perfect.objects for word in name.split()} | {
            "is", "stands", "sits", "lies", "rests", "hangs", "of"}
        assert set(difference) <= looks, (pair.perfect.text, pair.perturbed.text, difference)


def test_edits_say_what_changed(pairs: list[Pair]) -> None:
    for pair in pairs:
        edited = {e.index: e for e in pair.edits}
        assert len(edited) == len(pair.edits) and contradiction(pair.perturbed.relations) is None
        assert applied(pair.perfect.relations, pair.edits) == pair.perturbed.relations
        for i, (before, after) in enumerate(zip(pair.perfect.relations, pair.perturbed.relations, strict=True)):
            assert (before == after) == (i not in edited)
            if i in edited:
                assert any(o.after == after and o.kind == edited[i].kind for o in alternatives(i, before))
    assert {e.kind for p in pairs for e in p.edits} == {"flip", "swap", "move", "depth"}
    assert {p.n_perturbations for p in pairs} == {1, 2, 3} and any(e.dependent for p in pairs for e in p.edits)


def test_flips_are_carried_through() -> None:
    """The bin and the armrest: what was said of the same side follows."""
    relations = (Relation("left of", "basket", ("armchair",)), Relation("left of", "floor lamp", ("basket",)),
                 Relation("left of", "floor lamp", ("armchair",)))
    prompt = Prompt("p", render(scenes()["living room"], relations, "p"), "living room", relations)
    seen = [WRITER.perturb(prompt=prompt, n_edits=1, seed=seed) for seed in range(60)]
    assert None not in seen and all(contradiction(p.perturbed.relations) is None for p in seen)
    assert any(e.dependent for p in seen for e in p.edits)


def test_too_few_relations_give_no_pair() -> None:
    relations = (Relation("in the centre", "kettle"),)
    prompt = Prompt("p", render(scenes()["kitchen"], relations, "p"), "kitchen", relations)
    assert WRITER.perturb(prompt=prompt, n_edits=2, seed=0) is None
    moved = WRITER.perturb(prompt=prompt, n_edits=1, seed=0)
    assert moved is None, "whatever is no longer in the centre might be anywhere"


def test_things_that_hang_are_not_put_on_the_floor() -> None:
    edits = alternatives(0, Relation("above", "mirror", ("sofa",)))
    assert edits and {e.after.predicate for e in edits} <= {"left of", "right of"}
    assert not [e for e in alternatives(0, Relation("left of", "mirror", ("sofa",))) if e.kind == "swap"]


def test_pairs_follow_the_share_of_single_edits() -> None:
    config = DataConfig()
    found = write_prompts(WRITER, indices=range(400), config=config, seed=3)[0]
    made = [p for p in perturb_prompts(WRITER, found, config=config, seed=3) if isinstance(p, Pair)]
    assert len(made) > 0.98 * len(found)
    assert abs(np.mean([p.n_perturbations == 1 for p in made]) - config.one_perturbation) < 0.08
