"""Asking an endpoint that misbehaves: what is retried, what is counted, what is paid."""

from __future__ import annotations

import dataclasses
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_llm import Answer, FakeLLM, fake_llm

from spatialt2i.core.config import EndpointConfig
from spatialt2i.core.store import CorruptData
from spatialt2i.data import endpoint as endpoint_module
from spatialt2i.data.endpoint import AskError, BudgetSpent, Endpoint, EndpointError

QUESTION = [{"role": "user", "content": "where?"}]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_BACK_OFF", lambda state: 0.01)


@pytest.fixture
def server() -> Iterator[FakeLLM]:
    with fake_llm() as found:
        yield found


def settings(server: FakeLLM, **changes: object) -> EndpointConfig:
    fast = EndpointConfig(base_url=server.url, key_env="", retries=2, timeout=0.4, price_in=2.0, price_out=10.0)
    return dataclasses.replace(fast, **changes)


def connect(server: FakeLLM, folder: Path, **changes: object) -> Endpoint:
    return Endpoint(settings(server, **changes), folder / "replies.sqlite")


def test_what_was_answered_once_is_not_asked_again(server: FakeLLM, tmp_path: Path) -> None:
    for _ in range(2):  # as two processes would
        asked = connect(server, tmp_path)
        assert [asked.ask(QUESTION, seed=i % 3) for i in range(6)] == ["fine"] * 6
        bill = asked.bill()
        asked.close()
    assert len(server.requests) == 3 == bill.requests
    assert (bill.tokens_in, bill.tokens_out) == (300, 150) and bill.price == pytest.approx(300 * 2e-6 + 150 * 10e-6)


def test_any_change_of_the_request_is_another_request(server: FakeLLM, tmp_path: Path) -> None:
    schema = {"name": "place", "schema": {"type": "object"}}
    connect(server, tmp_path).ask(QUESTION)
    connect(server, tmp_path).ask(QUESTION, schema=schema)
    connect(server, tmp_path, temperature=0.5).ask(QUESTION)
    connect(server, tmp_path, model="other").ask(QUESTION)
    connect(server, tmp_path).ask([*QUESTION, *QUESTION])
    assert len(server.requests) == 5
    assert server.requests[1]["response_format"] == {"type": "json_schema", "json_schema": {**schema, "strict": True}}


@pytest.mark.parametrize("fault", [
    Answer(status=429, headers={"Retry-After": "0.01"}), Answer(status=429), Answer(status=500), Answer(status=503),
    Answer(fault="hang"), Answer(fault="cut"), Answer(fault="garbage"), Answer(fault="drip")], ids=str)
def test_what_may_pass_is_tried_again(fault: Answer, server: FakeLLM, tmp_path: Path) -> None:
    server.behave = lambda request, times: Answer() if times else fault
    asked = connect(server, tmp_path)
    assert asked.ask(QUESTION) == "fine" and len(server.requests) == 2
    assert asked.bill().requests == len(server.paid) == 1 == sum(asked.bill().faults.values())


@pytest.mark.parametrize(("fault", "kind"), [
    (Answer(status=429), "rate limit"), (Answer(status=500), "server error"), (Answer(fault="hang"), "timeout"),
    (Answer(fault="drip"), "timeout"), (Answer(fault="cut"), "connection"), (Answer(fault="garbage"), "server error")])
def test_what_does_not_pass_stops_the_work_and_is_asked_again_another_day(fault: Answer, kind: str, server: FakeLLM,
                                                                          tmp_path: Path) -> None:
    server.behave = lambda request, times: fault
    asked = connect(server, tmp_path)
    with pytest.raises(EndpointError, match=f"does not answer: {kind} after 3 tries.*run the same command again later"):
        asked.ask(QUESTION)
    assert len(server.requests) == 3 and asked.bill().requests == 0 and asked.bill().faults == {kind: 3}
    server.behave = lambda request, times: Answer()
    assert asked.ask(QUESTION) == "fine"


@pytest.mark.parametrize(("answer", "kind"), [
    (Answer(refusal="I will not."), "refusal"), (Answer(text="", finish="content_filter"), "content filter"),
    (Answer(text="half", finish="length"), "cut off"), (Answer(text=""), "refusal")])
def test_what_was_refused_is_paid_and_remembered(answer: Answer, kind: str, server: FakeLLM, tmp_path: Path) -> None:
    server.behave = lambda request, times: answer
    asked = connect(server, tmp_path)
    for _ in range(2):
        with pytest.raises(AskError) as caught:
            asked.ask(QUESTION)
        assert caught.value.kind == kind
    assert len(server.requests) == 1 == asked.bill().requests


def test_a_request_that_is_filtered_unread_is_remembered_and_free(server: FakeLLM, tmp_path: Path) -> None:
    server.behave = lambda request, times: Answer(status=400, code="content_filter")
    asked = connect(server, tmp_path)
    for _ in range(2):
        with pytest.raises(AskError, match="content filter"):
            asked.ask(QUESTION)
    assert len(server.requests) == 1 and asked.bill().price == 0


@pytest.mark.parametrize("answer", [Answer(status=401), Answer(status=404), Answer(status=400),
                                    Answer(status=429, code="insufficient_quota")], ids=str)
def test_an_endpoint_that_takes_no_requests_stops_at_once(answer: Answer, server: FakeLLM, tmp_path: Path) -> None:
    server.behave = lambda request, times: answer
    with pytest.raises(EndpointError, match=r"check model = 'gpt-5', base_url, and the key|no credit left"):
        connect(server, tmp_path).ask(QUESTION)
    assert len(server.requests) == 1


def test_the_key_comes_from_the_named_variable(server: FakeLLM, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EndpointError, match="the environment variable MY_KEY is not set; set it, name another one"):
        connect(server, tmp_path, key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", "secret")
    assert connect(server, tmp_path, key_env="MY_KEY").ask(QUESTION) == "fine"


def test_it_stops_before_the_budget_is_spent(server: FakeLLM, tmp_path: Path) -> None:
    """A reply costs 0.0007, and at most 0.0013 beforehand: 100 written tokens and 130 read ones."""
    asked = connect(server, tmp_path, budget=0.01, max_tokens=100, timeout=20.0)

    def ask(seed: int) -> str:
        try:
            return asked.ask(QUESTION, seed=seed)
        except BudgetSpent as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(40)))
    done, bill = found.count("fine"), asked.bill()
    assert 0.0085 < bill.price <= 0.01 and bill.requests == done == len(server.paid)
    assert all("Raise the budget to go on" in text for text in found if text != "fine")
    again = connect(server, tmp_path, budget=0.03, max_tokens=100)
    assert [again.ask(QUESTION, seed=i) for i in range(16)] == ["fine"] * 16
    assert len(server.paid) == len({i for i, text in enumerate(found) if text == "fine"} | set(range(16)))


def test_threads_ask_at_the_same_time(server: FakeLLM, tmp_path: Path) -> None:
    together = threading.Barrier(4, timeout=10)  # an answer waits for three other questions
    server.behave = lambda request, times: together.wait() >= 0 and Answer()
    asked = connect(server, tmp_path, retries=0, timeout=20.0)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda seed: asked.ask(QUESTION, seed=seed), range(64))) == {"fine"}
    assert asked.bill().requests == 64


def test_a_damaged_store_is_named(server: FakeLLM, tmp_path: Path) -> None:
    (tmp_path / "replies.sqlite").write_bytes(b"no database " * 500)
    with pytest.raises(CorruptData, match="replies.sqlite: not a whole SQLite file .* delete it"):
        connect(server, tmp_path)


def test_a_full_disk_is_named(server: FakeLLM, tmp_path: Path) -> None:
    asked = connect(server, tmp_path)
    asked.ask(QUESTION)
    asked._store._db.execute("PRAGMA max_page_count = 1")
    server.behave = lambda request, times: Answer(text="long " * 10_000)
    with pytest.raises(OSError, match="replies.sqlite: the disk is full; free some space"):
        asked.ask(QUESTION, seed=1)
    assert sqlite3.connect(tmp_path / "replies.sqlite").execute("SELECT COUNT(*) FROM replies").fetchone() == (1,)
