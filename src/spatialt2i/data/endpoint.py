"""An OpenAI-compatible endpoint: asked politely, paid once, never beyond a budget.

Every reply is stored, with the tokens that it cost, before anybody sees it; the same request is answered from there, in
this process or in any later one. So what a conversation comes to is settled once: answers and refusals are kept, and
faults that may pass are tried again until they do, or end the work, which can then be gone on with.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import openai
import tenacity

from spatialt2i.core.config import EndpointConfig
from spatialt2i.core.run import disk_errors
from spatialt2i.core.store import CorruptData

LONGEST_WAIT = 60.0  # seconds between two tries, whatever a server asks for
_BACK_OFF = tenacity.wait_random_exponential(multiplier=0.5, max=30)
_MILLION = 1e6
# what may pass, and what it counts as; the first that fits
_KINDS: dict[type[Exception], str] = {
    TimeoutError: "timeout", openai.APITimeoutError: "timeout", openai.RateLimitError: "rate limit",
    openai.InternalServerError: "server error", openai.APIResponseValidationError: "server error",
    json.JSONDecodeError: "server error", openai.APIConnectionError: "connection"}
_PASSING = tuple(_KINDS)
_FILTERED = ("content_filter", "content_policy_violation")  # codes of requests that are refused unread


class AskError(RuntimeError):
    """A request that got no usable answer, now and ever.

    Attributes:
        kind: what to count it as: ``"refusal"``, ``"content filter"`` or ``"cut off"``.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class BudgetSpent(RuntimeError):
    """The next request might cost more than is left."""


class EndpointError(RuntimeError):
    """The endpoint does not answer, or takes no such requests: wrong key, model, address or settings."""


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered.

    Attributes:
        text: the answer.
        tokens_in, tokens_out: what it cost.
        kind: "" for an answer, else why there is none, see `AskError`.
    """

    text: str
    tokens_in: int
    tokens_out: int
    kind: str = ""


@dataclass(frozen=True)
class Bill:
    """What was asked of an endpoint so far, in all processes that share its store.

    Attributes:
        requests: answered ones. tokens_in, tokens_out: of all of them. price: in the preset's currency.
        faults: tries of this process that had to be made again, by kind.
    """

    requests: int
    tokens_in: int
    tokens_out: int
    price: float
    faults: dict[str, int]


class Endpoint:
    """Asks a chat model, from any number of threads.

    Args:
        config: where it is, and how much it may cost.
        store: SQLite file of the replies; made where there is none.

    Raises:
        EndpointError: the key's environment variable is not set.
        CorruptData: the store is damaged.
    """

    def __init__(self, config: EndpointConfig, store: Path) -> None:
        key = os.environ.get(config.key_env) if config.key_env else "none"
        if not key:
            raise EndpointError(f"no key for {config.base_url}: the environment variable {config.key_env} is not set; "
                                "set it, name another one (key_env), or none where no key is needed (key_env = \"\")")
        self._config = config
        self._store = _Store(store)
        self._under_way, self._reserved = 0, 0.0  # requests, and what they may cost
        self._changed = threading.Condition()
        self._faults: Counter[str] = Counter()
        self._client = openai.AsyncOpenAI(base_url=config.base_url, api_key=key, max_retries=0)
        self._loop = asyncio.new_event_loop()  # in a thread of its own, where a time-out ends even a reply that drips
        threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True).start()

    def ask(self, messages: Sequence[dict[str, Any]], *, schema: dict[str, Any] | None = None, seed: int = 0) -> str:
        """The answer to a conversation; one that was answered before costs nothing.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            schema: ``{"name": ..., "schema": ...}``, the JSON schema that the answer must have.
            seed: is sent along, and tells apart requests of the same words.

        Raises:
            AskError: no usable answer.
            BudgetSpent: it might cost more than is left.
            EndpointError: no answer, or wrong key, model, address or settings.
            DiskFull: no space left for the reply.
        """
        request: dict[str, Any] = {"model": self._config.model, "messages": list(messages), "seed": seed,
                                   "temperature": self._config.temperature,
                                   "max_completion_tokens": self._config.max_tokens}
        if schema is not None:
            request["response_format"] = {"type": "json_schema", "json_schema": {**schema, "strict": True}}
        text = json.dumps(request, sort_keys=True)
        key = hashlib.sha256(f"{self._config.base_url} {text}".encode()).hexdigest()
        reply = self._store.find(key)
        if reply is None:
            with self._reserve(self._price(len(text), self._config.max_tokens)):
                reply = asyncio.run_coroutine_threadsafe(self._fetch(request), self._loop).result()
                self._store.keep(key, reply)
        if reply.kind:
            raise AskError(reply.kind, f"{self._config.model}: {reply.kind}: {reply.text[:200]}")
        return reply.text

    def bill(self) -> Bill:
        """What was asked so far, by all that share the store."""
        requests, tokens_in, tokens_out = self._store.totals()
        return Bill(requests, tokens_in, tokens_out, self._price(tokens_in, tokens_out), dict(self._faults))

    def close(self) -> None:
        """Let go of the connections and of the store."""
        asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._store.close()

    def _price(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self._config.price_in + tokens_out * self._config.price_out) / _MILLION

    @contextmanager
    def _reserve(self, most: float) -> Iterator[None]:
        """Inside the block a request that costs at most that is under way; waits for others, which may cost less."""
        with self._changed:
            while self._config.budget and (spent := self.bill().price) + self._reserved + most > self._config.budget:
                if not self._under_way:
                    raise BudgetSpent(f"{self._config.model} has cost {spent:.2f} of a budget of "
                                      f"{self._config.budget:.2f}, and the next request may cost {most:.4f}; what is "
                                      "done is kept. Raise the budget to go on")
                self._changed.wait()
            self._reserved += most
            self._under_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= most
                self._under_way -= 1
                self._changed.notify_all()

    async def _fetch(self, request: dict[str, Any]) -> Reply:
        """The endpoint's reply, after as many tries as the settings allow."""
        tries = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._config.retries + 1), wait=_wait, reraise=True, after=self._count,
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, _PASSING) and not _is_broke(error)))
        try:
            answer = await tries(self._once, request)
        except _PASSING as error:
            if _is_broke(error):
                raise EndpointError(f"{self._config.base_url}: {error}; the account has no credit left") from error
            raise EndpointError(f"{self._config.base_url} does not answer: {_kind(error)} after "
                                f"{self._config.retries + 1} tries ({str(error).rstrip('.') or 'no reply'}). What is "
                                "done is kept; run the same command again later, or raise retries or timeout"
                                ) from error
        except openai.APIStatusError as error:
            if error.code in _FILTERED:
                return Reply(str(error), 0, 0, "content filter")
            raise EndpointError(f"{self._config.base_url} takes no such request: {error}; check model = "
                                f"{self._config.model!r}, base_url, and the key in {self._config.key_env!r}") from error
        return _read(answer)

    def _count(self, state: tenacity.RetryCallState) -> None:
        self._faults[_kind(state.outcome.exception())] += 1

    async def _once(self, request: dict[str, Any]) -> Any:
        return await asyncio.wait_for(self._client.chat.completions.create(**request), self._config.timeout)


def _read(answer: Any) -> Reply:
    """What a completion says, and why it says nothing."""
    choice = answer.choices[0]
    text = choice.message.content or ""
    if answer.usage is None:
        raise EndpointError("the endpoint does not say how many tokens a reply has (usage), so nobody can say what it "
                            "costs; use one that does")
    tokens = answer.usage.prompt_tokens, answer.usage.completion_tokens
    if choice.message.refusal:
        return Reply(choice.message.refusal, *tokens, "refusal")
    kinds = {"content_filter": "content filter", "length": "cut off"}
    return Reply(text, *tokens, kinds.get(choice.finish_reason, "" if text else "refusal"))


def _kind(error: BaseException) -> str:
    return next(kind for cls, kind in _KINDS.items() if isinstance(error, cls))


def _is_broke(error: BaseException) -> bool:
    return isinstance(error, openai.RateLimitError) and error.code == "insufficient_quota"


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds to the next try: what the server asks for, else at random, longer each time."""
    response = getattr(state.outcome.exception(), "response", None)
    try:
        return min(float(response.headers["retry-after"]), LONGEST_WAIT)
    except (AttributeError, KeyError, ValueError):  # no response, no such header, or a date
        return _BACK_OFF(state)


class _Store:
    """Replies by the hash of their request, in an SQLite file; whole or not there, whatever is killed when."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT NOT NULL, tokens_in "
                             "INTEGER NOT NULL, tokens_out INTEGER NOT NULL, kind TEXT NOT NULL)")
            # totals are read before each request, from this index and not from the texts
            self._db.execute("CREATE INDEX IF NOT EXISTS cost ON replies (tokens_in, tokens_out)")

    def find(self, key: str) -> Reply | None:
        with self._errors():
            row = self._db.execute("SELECT text, tokens_in, tokens_out, kind FROM replies WHERE key = ?",
                                   (key,)).fetchone()
        return Reply(*row) if row else None

    def keep(self, key: str, reply: Reply) -> None:
        with self._errors():
            self._db.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?)", (key, *astuple(reply)))

    def totals(self) -> tuple[int, int, int]:
        with self._errors():
            return self._db.execute("SELECT COUNT(*), COALESCE(SUM(tokens_in), 0), COALESCE(SUM(tokens_out), 0) "
                                    "FROM replies").fetchone()

    def close(self) -> None:
        with self._errors():
            self._db.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with self._lock, disk_errors(self._path):
            try:
                yield
            except sqlite3.OperationalError as error:
                raise OSError(f"{self._path}: {error}") from error
            except sqlite3.DatabaseError as error:
                raise CorruptData(f"{self._path}: not a whole SQLite file ({error}); delete it, and its replies are "
                                  "asked for again") from error
