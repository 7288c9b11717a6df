"""A language model that writes prompts and edits: what is asked of it, and what is believed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_llm import Answer, FakeLLM, fake_llm

from spatialt2i.core.config import DataConfig, EndpointConfig
from spatialt2i.core.store import read_jsonl
from spatialt2i.core.types import Edit, Pair, Prompt, Relation, applied
from spatialt2i.data import endpoint as endpoint_module
from spatialt2i.data.endpoint import Endpoint
from spatialt2i.data.files import write_pair_file, write_prompt_file
from spatialt2i.data.llm import LLMWriter, faults_of_pair, faults_of_prompt, kind_of
from spatialt2i.data.prompts import SceneWriter
from spatialt2i.data.stages import Dropped, WriterError
from spatialt2i.data.vocabulary import scenes

BRAIN = SceneWriter()
CONFIG = DataConfig(pairs=60)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What a diligent model answers; it has the scene grammar in its head."""
    ask, seed = request["messages"][1]["content"], request["seed"]
    if wanted := re.match(r"Scene: (.+)\. Relations: exactly (\d+)\.", ask):
        for attempt in range(10_000):
            prompt = BRAIN.write(id=f"{seed}", n_relations=int(wanted[2]), seed=seed + attempt)
            if prompt.scene == wanted[1]:
                return {"scene": prompt.scene, "objects": list(prompt.objects), "text": prompt.text,
                        "relations": [r.to_json() for r in prompt.relations]}
    n = int(re.match(r"Change exactly (\d+)", ask)[1])
    relations = tuple(Relation.from_json(json.loads(line)) for line in re.findall(r"^\d+: (.+)$", ask, re.MULTILINE))
    text = ask.split("The text:\n")[1]
    # which prompt it was is told by its text alone
    prompt = next(p for p in KNOWN if p.text == text)
    assert prompt.relations == relations
    pair = next(p for s in range(100) if (p := BRAIN.perturb(prompt=prompt, n_edits=n, seed=seed + s)))
    return {"text": pair.perturbed.text, "edits": [
        {"index": e.index, "relation": e.after.to_json(), "dependent": e.dependent} for e in pair.edits]}


KNOWN: list[Prompt] = []


def diligent(request: dict[str, Any], times: int) -> Answer:
    return Answer(json.dumps(answer(request)))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLLM]:
    monkeypatch.setattr(endpoint_module, "_BACK_OFF", lambda state: 0.01)
    with fake_llm(diligent) as found:
        yield found


def connect(server: FakeLLM, folder: Path) -> Endpoint:
    config = EndpointConfig(base_url=server.url, key_env="", timeout=5.0, price_in=2.0, price_out=10.0)
    return Endpoint(config, folder / "replies.sqlite")


def writer(server: FakeLLM, folder: Path) -> LLMWriter:
    return LLMWriter(connect(server, folder), threads=8)


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Eight relations, two of them edited."""
    prompt = BRAIN.write(id="p", n_relations=8, seed=4)
    return next(p for s in range(50) if (p := BRAIN.perturb(prompt=prompt, n_edits=2, seed=s)) and len(p.edits) == 2)


def test_prompts_are_what_was_asked_for(server: FakeLLM, tmp_path: Path) -> None:
    model = writer(server, tmp_path)
    found = [model.write(id=f"x{i}", n_relations=3 + i % 6, seed=i) for i in range(40)]
    assert [len(p.relations) for p in found] == [3 + i % 6 for i in range(40)]
    assert [p.id for p in found] == [f"x{i}" for i in range(40)] and {p.scene for p in found} <= set(scenes())
    assert len({p.scene for p in found}) > 8 and not any(faults_of_prompt(p, len(p.relations)) for p in found)
    assert all(r["response_format"]["json_schema"]["strict"] for r in server.requests) and len(server.requests) == 40
    assert found[3] == writer(server, tmp_path).write(id="x3", n_relations=6, seed=3) and len(server.requests) == 40


def test_an_invalid_reply_is_sent_back_once_with_what_is_wrong(server: FakeLLM, tmp_path: Path) -> None:
    def careless(request: dict[str, Any], times: int) -> Answer:
        found = answer(request)
        if len(request["messages"]) == 2:
            found["relations"] = found["relations"][1:]
        return Answer(json.dumps(found))

    server.behave = careless
    prompt = writer(server, tmp_path).write(id="x", n_relations=5, seed=1)
    assert len(prompt.relations) == 5 and len(server.requests) == 2
    told = server.requests[1]["messages"]
    assert [m["role"] for m in told] == ["system", "user", "assistant", "user"]
    assert "number of relations: 4 are listed, 5 were asked for" in told[3]["content"]


@pytest.mark.parametrize(("reply", "kind"), [
    (Answer("no JSON"), "not JSON"), (Answer("[]"), "not of the schema"),
    (Answer('{"text": "a"}'), "not of the schema"),
    (Answer(refusal="no"), "refusal"), (Answer("", finish="content_filter"), "content filter"),
    (Answer("{", finish="length"), "cut off")])
def test_what_stays_invalid_is_dropped_by_its_kind(reply: Answer, kind: str, server: FakeLLM, tmp_path: Path) -> None:
    server.behave = lambda request, times: reply
    with pytest.raises(Dropped) as caught:
        writer(server, tmp_path).write(id="x", n_relations=5, seed=1)
    assert caught.value.kind == kind


@pytest.mark.parametrize(("spoil", "fault"), [
    (lambda p: replace(p, relations=p.relations[:-1]), "number of relations: 7 are listed, 8 were asked for"),
    (lambda p: replace(p, text="A short one."), "length: 3 words, 35 to 125 were asked for"),
    (lambda p: replace(p, relations=(*p.relations[:-1], Relation("left of", "unicorn", (p.objects[0],)))),
     "objects: the text does not name unicorn"),
    (lambda p: replace(p, relations=(*p.relations[:-1], p.relations[0])), "relations: .* is listed twice"),
    (lambda p: replace(p, relations=(*p.relations[:-2], Relation("left of", *p.objects[:1], (p.objects[1],)),
                                    Relation("right of", *p.objects[:1], (p.objects[1],)))), "contradiction: "),
    (lambda p: replace(p, relations=(*p.relations[:-1], Relation("near", p.objects[0], (p.objects[1],)))),
     "contradiction: .* not a relation of different objects")])
def test_a_prompt_that_does_not_fit_is_told_why(spoil: Callable[[Prompt], Prompt], fault: str, pair: Pair) -> None:
    assert faults_of_prompt(pair.perfect, 8) == []
    found = faults_of_prompt(spoil(pair.perfect), 8)
    assert any(re.search(fault, text) for text in found), found


def with_text(pair: Pair, text: str) -> Pair:
    return replace(pair, perturbed=replace(pair.perturbed, text=text))


def with_edits(pair: Pair, *edits: Edit) -> Pair:
    perturbed = replace(pair.perturbed, relations=applied(pair.perfect.relations, edits))
    return replace(pair, edits=edits, perturbed=perturbed)


@pytest.mark.parametrize(("spoil", "fault"), [
    (lambda p: with_edits(p, p.edits[0]), "number of edits: 1, 2 were asked for"),
    (lambda p: with_edits(p, p.edits[0], p.edits[0]), "edits: a relation is changed twice"),
    (lambda p: with_edits(p, p.edits[0], replace(p.edits[1], after=p.edits[1].before)), "edits: one changes nothing"),
    (lambda p: with_edits(p, p.edits[0], replace(p.edits[1], after=Relation("left of", "unicorn", ("kettle",)))),
     "objects: the things are others"),
    (lambda p: with_text(p, p.perfect.text), "words: the text is the same"),
    (lambda p: with_text(p, p.perturbed.text + " A dragon flies by."), "words: others than those .* dragon"),
    (lambda p: with_text(p, " ".join(sorted(p.perturbed.text.split()))), "words: .* changed for 2 relations")])
def test_edits_that_do_not_fit_are_told_why(spoil: Callable[[Pair], Pair], fault: str, pair: Pair) -> None:
    assert faults_of_pair(pair, 2) == []
    found = faults_of_pair(spoil(pair), 2)
    assert any(re.search(fault, text) for text in found), found


def test_what_the_grammar_perturbs_is_accepted() -> None:
    for seed in range(150):
        prompt = BRAIN.write(id=f"g{seed}", n_relations=3 + seed % 8, seed=seed)
        for n in (1, 2, 3):
            if found := BRAIN.perturb(prompt=prompt, n_edits=n, seed=seed):
                assert faults_of_pair(found, n) == [], (found.perfect.text, found.perturbed.text)
                assert all(kind_of(e.before, e.after) == e.kind for e in found.edits), found.edits


def some_of_each(request: dict[str, Any], times: int) -> Answer:
    """Every fifth answer has a fault, which depends on the request and on how often it came."""
    roll = np.random.default_rng([request["seed"], times, len(request["messages"])])
    faults = (Answer(status=429, headers={"Retry-After": "0.01"}), Answer(status=500), Answer(fault="cut"),
              Answer(fault="garbage"), Answer("no JSON"), Answer('{"text": 1}'), Answer(refusal="no"))
    return faults[int(roll.integers(len(faults)))] if roll.random() < 0.2 else diligent(request, times)


def build(server: FakeLLM, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    prompts, pairs = folder / "prompts.jsonl", folder / "pairs.jsonl"
    one, other = connect(server, folder), connect(server, folder)
    written = write_prompt_file(LLMWriter(one, threads=8), config=CONFIG, seed=0, path=prompts)
    KNOWN[:] = [Prompt.from_json(row) for row in read_jsonl(prompts)]
    return written, write_pair_file(LLMWriter(other, threads=8), prompts, config=CONFIG, seed=0, path=pairs)


def test_with_faults_in_every_fifth_answer_it_ends_complete_and_counts_them(server: FakeLLM, tmp_path: Path) -> None:
    server.behave = some_of_each
    written, perturbed = build(server, tmp_path)
    rows = list(read_jsonl(tmp_path / "pairs.jsonl"))
    assert written["prompts"] == 60 == len(rows) and written["dropped"]
    faults = Counter(written["bill"]["faults"]) + Counter(perturbed["bill"]["faults"])
    assert set(faults) == {"rate limit", "server error", "connection"}
    assert len(server.requests) == perturbed["bill"]["requests"] + faults.total()
    assert perturbed["bill"]["tokens_in"] == sum(read for read, _ in server.paid)
    assert set(written["dropped"]) <= {"refusal", "not JSON", "not of the schema"}
    why = Counter(row["why"] for row in rows if row["edits"] is None)
    assert why and all(perturbed[kind] == n for kind, n in why.items()) and perturbed["pairs"] == 60 - why.total()
    assert all(not faults_of_pair(p, p.n_perturbations) for p in (Pair.from_json(r) for r in rows if r["edits"]))
    # a second run pays nothing, and comes to the same
    files = [(tmp_path / name).read_bytes() for name in ("prompts.jsonl", "pairs.jsonl")]
    for name in ("prompts.jsonl", "pairs.jsonl"):
        (tmp_path / name).unlink()
    paid = len(server.paid)
    again = build(server, tmp_path)
    assert [{k: v for k, v in f.items() if k not in ("bill", "estimate")} for f in again] == [
        {k: v for k, v in f.items() if k not in ("bill", "estimate")} for f in (written, perturbed)]
    assert [(tmp_path / name).read_bytes() for name in ("prompts.jsonl", "pairs.jsonl")] == files
    assert len(server.paid) == paid


def test_a_model_that_never_has_an_answer_stops_the_work(server: FakeLLM, tmp_path: Path) -> None:
    server.behave = lambda request, times: Answer(refusal="I would rather not.")
    with pytest.raises(WriterError, match="has dropped the prompt 0-0 10 times, at last because: .*rather not"):
        write_prompt_file(writer(server, tmp_path), config=replace(CONFIG, pairs=1), seed=0, path=tmp_path / "p.jsonl")
