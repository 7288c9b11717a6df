"""A model that is asked about pictures: what it says becomes verdicts, what it does not say is not judged."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_llm import Answer, FakeLLM, fake_llm
from PIL import Image

from spatialt2i.core.config import ConfigError, EndpointConfig, preset_names
from spatialt2i.core.types import Prompt, Relation
from spatialt2i.data.endpoint import Endpoint
from spatialt2i.data.verifiers import JUDGES, VLMConfig, open_verifier
from spatialt2i.data.vlm import VLMVerifier, question
from spatialt2i.tiny.grammar import TinyWriter
from spatialt2i.tiny.oracle import TinyOracle
from spatialt2i.tiny.painter import TinyPainter

PROMPTS = [TinyWriter().write(id=f"p{i}", n_relations=2 + i % 2, seed=i) for i in range(12)]
IMAGES = TinyPainter(wrong_layout=0.5).generate(prompts=PROMPTS, seeds=range(12))
RELATIONS = {question(r): r for p in PROMPTS for r in p.relations}


def seen(request: dict[str, Any]) -> tuple[Image.Image, Relation]:
    picture, text = request["messages"][0]["content"]
    data = base64.b64decode(picture["image_url"]["url"].split(",")[1])
    return Image.open(io.BytesIO(data)).convert("RGB"), RELATIONS[text["text"]]


def honest(request: dict[str, Any], times: int) -> Answer:
    """Answers as the oracle would of the picture that it was sent."""
    image, relation = seen(request)
    holds = TinyOracle().verify(images=[image], prompts=[Prompt("q", "", "on a lawn", (relation,))])[0].relations[0]
    return Answer("Yes." if holds else "no")


@pytest.fixture
def server() -> Iterator[FakeLLM]:
    with fake_llm(honest) as found:
        yield found


def verifier(server: FakeLLM, folder: Path, **changes: Any) -> VLMVerifier:
    endpoint = EndpointConfig(base_url=server.url, key_env="", model="eyes", retries=2, timeout=5.0, price_in=1.0,
                              max_tokens=16)
    config = dataclasses.replace(VLMConfig(endpoint=endpoint), **changes)
    return VLMVerifier(config=config, endpoint=Endpoint(endpoint, folder / "verdicts.sqlite"))


def test_each_relation_is_asked_about_once_and_for_good(server: FakeLLM, tmp_path: Path) -> None:
    for _ in range(2):
        verdicts = verifier(server, tmp_path).verify(images=IMAGES * 2, prompts=PROMPTS * 2)
        truth = TinyOracle().verify(images=IMAGES, prompts=PROMPTS)
        agree = [a == b for v, t in zip(verdicts, truth, strict=False) for a, b in zip(v.relations, t.relations,
                                                                                       strict=True)]
        assert len(verdicts) == 24 and sum(agree) >= 0.9 * len(agree)
    assert len(server.requests) == sum(len(p.relations) for p in PROMPTS)
    for prompt, verdict in zip(PROMPTS, verdicts, strict=False):
        assert verdict.overall == (False not in verdict.relations) and verdict.clean is None
        assert verdict.present == (None,) * len(prompt.objects)
    assert {v.overall for v in verdicts} == {True, False}


@pytest.mark.parametrize(("answer", "holds", "why"), [
    (Answer("yes"), True, "yes (1.00)"), (Answer(" No.\n"), False, "no (1.00)"), (Answer("unclear"), None, "unclear"),
    (Answer("Perhaps, who knows"), None, "no such answer"), (Answer(refusal="I will not"), None, "refusal"),
    (Answer("ye", finish="length"), None, "cut off")])
def test_what_is_not_said_is_not_judged(answer: Answer, holds: bool | None, why: str, server: FakeLLM,
                                        tmp_path: Path) -> None:
    server.behave = lambda request, times: answer
    verdict = verifier(server, tmp_path).verify(images=IMAGES[:1], prompts=PROMPTS[:1])[0]
    assert set(verdict.relations) == {holds} and verdict.overall is holds
    assert all(text.startswith(why) for text in verdict.evidence["answers"])


@pytest.mark.parametrize(("tops", "sure", "holds"), [
    ({"Yes": 0.5, "yes": 0.3, "no": 0.1, "The": 0.1}, 0.8, True), ({"no": 0.55, "yes": 0.4}, 0.5, False),
    ({"no": 0.55, "yes": 0.45}, 0.8, None), ({"unclear": 0.9, "yes": 0.1}, 0.5, None), ({"The": 1.0}, 0.5, None),
    ({"un": 0.93, "yes": 0.04}, 0.5, None), ({"The": 0.9, "yes": 0.1}, 0.5, None), ({"y": 0.6, "Yes": 0.2}, 0.8, True)])
def test_probabilities_of_the_first_token_decide(tops: dict[str, float], sure: float, holds: bool | None,
                                                 server: FakeLLM, tmp_path: Path) -> None:
    server.behave = lambda request, times: Answer("no matter", tops=tops)
    found = verifier(server, tmp_path, sure=sure, probable=True).verify(images=IMAGES[:1], prompts=PROMPTS[:1])[0]
    assert set(found.relations) == {holds} and all(r["logprobs"] for r in server.requests)


def test_one_relation_that_does_not_hold_decides_even_where_others_are_not_judged(
        server: FakeLLM, tmp_path: Path) -> None:
    prompt = next(p for p in PROMPTS if len(p.relations) == 2)
    for second, overall in (("no", False), ("yes", None)):
        server.behave = lambda request, times, second=second: Answer(
            "unclear" if seen(request)[1] == prompt.relations[0] else second)
        verdict = verifier(server, tmp_path / second).verify(images=IMAGES[:1], prompts=[prompt])[0]
        assert verdict.overall is overall and verdict.relations[0] is None


def test_large_pictures_are_sent_smaller(server: FakeLLM, tmp_path: Path) -> None:
    sizes = []

    def behave(request: dict[str, Any], times: int) -> Answer:
        sizes.append(seen(request)[0].size)
        return Answer("yes", tokens=(900, 1))

    server.behave = behave
    large = IMAGES[0].resize((640, 320))
    judge = verifier(server, tmp_path, max_side=128)
    judge.verify(images=[large], prompts=PROMPTS[:1])
    assert set(sizes) == {(128, 64)} and large.size == (640, 320)


@pytest.mark.parametrize("name", preset_names(JUDGES))
def test_shipped_judges_load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    assert name.split("-")[0].lower() in open_verifier(name, folder=tmp_path).name.lower()


def test_an_unknown_judge_is_told_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a TOML file or one of gpt-5"):
        open_verifier("gpt5", folder=tmp_path)
