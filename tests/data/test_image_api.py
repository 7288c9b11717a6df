"""An image endpoint that misbehaves: refusals are told, nothing is paid twice, damaged pictures are asked for again."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_llm import Answer, FakeLLM, fake_llm
from PIL import Image

from spatialt2i.core.config import EndpointConfig
from spatialt2i.core.types import Prompt
from spatialt2i.data import endpoint as endpoint_module
from spatialt2i.data.endpoint import BudgetSpent, Endpoint, EndpointError
from spatialt2i.data.generators import ImageAPIConfig
from spatialt2i.data.image_api import APIGenerator
from spatialt2i.data.images import ImageStore
from spatialt2i.data.replies import reply_file

PROMPTS = [Prompt(str(i), f"a mug left of {i} lamps", "kitchen", ()) for i in range(6)]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_BACK_OFF", lambda state: 0.01)


def drawn(request: dict[str, Any], times: int) -> Answer:
    """A picture that follows from the request."""
    seed = int.from_bytes(hashlib.sha256(repr(sorted(request.items())).encode()).digest()[:4], "big")
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(out, "PNG")
    return Answer(image=out.getvalue(), tokens=(20, 1000))


@pytest.fixture
def server() -> Iterator[FakeLLM]:
    with fake_llm(drawn) as found:
        yield found


def generator(server: FakeLLM, folder: Path, *, seeded: bool = True, **changes: Any) -> APIGenerator:
    settings = EndpointConfig(base_url=server.url, key_env="", model="painter", retries=3, timeout=2.0,
                              price_image=0.04, price_out=10.0, max_tokens=2000)
    config = ImageAPIConfig(seeded=seeded, fields={"size": "16x16"}, endpoint=dataclasses.replace(settings, **changes))
    return APIGenerator(name="api", config=config, endpoint=Endpoint(config.endpoint, folder / "replies.sqlite"),
                        images=ImageStore(folder / "images", format="webp"))


def arrays(images: list[Image.Image | str]) -> list[np.ndarray]:
    return [np.asarray(image) for image in images]


def test_what_was_drawn_once_is_not_paid_again(server: FakeLLM, tmp_path: Path) -> None:
    first = arrays(generator(server, tmp_path).generate(prompts=PROMPTS, seeds=range(6)))
    asked = generator(server, tmp_path)
    again = arrays(asked.generate(prompts=PROMPTS, seeds=range(6)))
    assert np.array_equal(first, again) and len(server.requests) == 6
    assert sorted(r["prompt"] for r in server.requests) == [p.text for p in PROMPTS]
    assert all(r["size"] == "16x16" and r["n"] == 1 for r in server.requests)
    bill = asked._endpoint.bill()
    assert (bill.requests, bill.images, bill.tokens_out) == (6, 6, 6000)
    assert bill.price == pytest.approx(6 * 0.04 + 6000 * 10e-6)


@pytest.mark.parametrize("seeded", [True, False])
def test_seeds_are_sent_where_the_endpoint_takes_them_and_always_tell_pictures_apart(
        seeded: bool, server: FakeLLM, tmp_path: Path) -> None:
    generator(server, tmp_path, seeded=seeded).generate(prompts=PROMPTS[:1] * 2, seeds=[3, 2**40])
    assert sorted(r.get("seed", -1) for r in server.requests) == ([2**40 % 2**31, 3] if seeded else [-1, -1])


def test_refusals_and_filters_are_told_and_kept(server: FakeLLM, tmp_path: Path) -> None:
    blocked = Answer(status=400, code="moderation_blocked")
    server.behave = lambda request, times: blocked if "2 lamps" in request["prompt"] else drawn(request, times)
    for _ in range(2):
        images = generator(server, tmp_path).generate(prompts=PROMPTS[:4], seeds=range(4))
        assert images[2] == "content filter" and all(isinstance(images[i], Image.Image) for i in (0, 1, 3))
    assert len(server.requests) == 4


def test_faults_that_pass_are_tried_again_and_counted(server: FakeLLM, tmp_path: Path) -> None:
    faults = [Answer(status=429, headers={"Retry-After": "0.01"}), Answer(status=500), Answer(fault="cut"),
              Answer(image=b"no picture"), Answer(image=drawn({}, 0).image[:40])]

    def behave(request: dict[str, Any], times: int) -> Answer:
        which = int(request["prompt"].split()[-2])
        return faults[which] if times == 0 and which < len(faults) else drawn(request, times)

    server.behave = behave
    asked = generator(server, tmp_path)
    images = asked.generate(prompts=PROMPTS, seeds=range(6))
    assert all(isinstance(image, Image.Image) for image in images) and len(server.requests) == 11
    assert asked._endpoint.bill().faults == {"rate limit": 1, "server error": 3, "connection": 1}


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:50])])
def test_a_picture_that_is_lost_is_asked_for_again(spoil, server: FakeLLM, tmp_path: Path,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    first = arrays(generator(server, tmp_path).generate(prompts=PROMPTS, seeds=range(6)))
    spoil(sorted(tmp_path.glob("images/*/*.webp"))[0])
    asked = generator(server, tmp_path)
    assert np.array_equal(first, arrays(asked.generate(prompts=PROMPTS, seeds=range(6))))
    assert len(server.requests) == 7 and "asked for, and paid, again" in caplog.text
    assert asked._endpoint.bill().images == 7, "what was paid twice is counted twice"


def test_a_budget_ends_the_work_and_what_is_paid_stays(server: FakeLLM, tmp_path: Path) -> None:
    with pytest.raises(BudgetSpent, match="painter has cost"):
        generator(server, tmp_path, budget=0.2).generate(prompts=PROMPTS, seeds=range(6))
    paid = len(server.requests)
    assert 0 < paid < 6 and paid * 0.05 <= 0.2
    generator(server, tmp_path).generate(prompts=PROMPTS, seeds=range(6))
    assert len(server.requests) == 6


def test_each_endpoint_has_a_bill_of_its_own(server: FakeLLM, tmp_path: Path) -> None:
    one, other = (EndpointConfig(base_url=server.url, model=model) for model in ("a/b", "a b"))
    assert reply_file(tmp_path, one) != reply_file(tmp_path, other)


def test_an_answer_without_a_picture_says_what_to_ask_for(server: FakeLLM, tmp_path: Path) -> None:
    server.behave = lambda request, times: Answer(image=b"")
    with pytest.raises(EndpointError, match="response_format = \"b64_json\""):
        generator(server, tmp_path).generate(prompts=PROMPTS[:1], seeds=[0])
