"""An OpenAI-compatible endpoint: asked politely, paid once, never beyond a budget.

Every reply is stored, with the tokens that it cost, before anybody sees it; the same request is answered from there, in
this process or in any later one. So what a conversation comes to is settled once: answers and refusals are kept, and
faults that may pass are tried again until they do, or end the work, which can then be gone on with.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import json
import logging
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import tenacity
from PIL import Image

from spatialt2i.core.config import EndpointConfig
from spatialt2i.core.store import CorruptData, decode
from spatialt2i.data.images import ImageStore
from spatialt2i.data.replies import Reply, ReplyStore

log = logging.getLogger(__name__)
LONGEST_WAIT = 60.0  # seconds between two tries, whatever a server asks for
_BACK_OFF = tenacity.wait_random_exponential(multiplier=0.5, max=30)
_MILLION = 1e6
_PICTURE_TOKENS = 3000  # what a picture costs to be looked at, at most
_TOP = 5  # most probable tokens that are asked for


class _NoPicture(ValueError):
    """What should be a picture cannot be decoded."""


# what may pass, and what it counts as; the first that fits
_KINDS: dict[type[Exception], str] = {
    TimeoutError: "timeout", openai.APITimeoutError: "timeout", openai.RateLimitError: "rate limit",
    openai.InternalServerError: "server error", openai.APIResponseValidationError: "server error",
    json.JSONDecodeError: "server error", _NoPicture: "server error", openai.APIConnectionError: "connection"}
_PASSING = tuple(_KINDS)
# codes of requests that are refused unread: of chats, of GPT-Image, and of Seedream
_FILTERED = re.compile("content_filter|content_policy_violation|moderation_blocked|SensitiveContent")


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
class Bill:
    """What was asked of an endpoint so far, in all processes that share its store.

    Attributes:
        requests: answered ones. tokens_in, tokens_out, images: of all of them. price: in the preset's currency.
        faults: tries of this process that had to be made again, by kind.
    """

    requests: int
    tokens_in: int
    tokens_out: int
    images: int
    price: float
    faults: dict[str, int]


class Endpoint:
    """Asks a chat or an image model, from any number of threads.

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
        self._store = ReplyStore(store)
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
        return self._chat(request, _read)

    def draw(self, *, prompt: str, settings: Mapping[str, Any], seed: int, images: ImageStore) -> Image.Image:
        """The picture of a text; one that was drawn before, and is still whole in its store, costs nothing.

        Args:
            prompt: the text. settings: further fields of the request. images: keeps the picture.
            seed: tells apart requests of the same words; it is not sent, because not every endpoint takes one.

        Raises:
            AskError: no picture.
            BudgetSpent, EndpointError, DiskFull: see `ask`.
        """
        request = {"model": self._config.model, "prompt": prompt, "n": 1, "extra_body": dict(settings)}
        key, most = self._identified({**request, "seed": seed}, images=1)
        reply = self._store.find(key)
        if reply is not None and not reply.kind:
            try:
                return decode(images.read(reply.text))
            except CorruptData as error:
                log.warning("%s; it is asked for, and paid, again", error)
                reply = None
        if reply is None:
            reply = self._paid(key, most, request, self._client.images.generate, functools.partial(_picture, images))
        return decode(images.read(self._given(reply)))

    def choose(self, question: str, image: bytes, *, options: Sequence[str], probable: bool) -> dict[str, float]:
        """How probable each of the answers is to a question about a picture; an answer of other words is none of them.

        Args:
            question: must ask for one of the options. image: JPEG. options: single words.
            probable: ask for probabilities; not every endpoint gives them. Else the answer's is 1.

        Raises:
            AskError, BudgetSpent, EndpointError, DiskFull: see `ask`.
        """
        url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        request: dict[str, Any] = {
            "model": self._config.model, "messages": [{"role": "user", "content": content}],
            "temperature": self._config.temperature, "max_completion_tokens": self._config.max_tokens,
            **({"logprobs": True, "top_logprobs": _TOP} if probable else {})}
        read = functools.partial(_read, text_of=functools.partial(_probabilities, options))
        return json.loads(self._chat(request, read, tokens_in=len(question) + _PICTURE_TOKENS))

    def bill(self) -> Bill:
        """What was asked so far, by all that share the store."""
        requests, *cost = self._store.totals()
        return Bill(requests, *cost, self._price(*cost), dict(self._faults))

    def close(self) -> None:
        """Let go of the connections and of the store."""
        asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._store.close()

    def _price(self, tokens_in: float, tokens_out: float, images: float) -> float:
        tokens = (tokens_in * self._config.price_in + tokens_out * self._config.price_out) / _MILLION
        return tokens + images * self._config.price_image

    def _identified(self, request: dict[str, Any], *, tokens_in: int = 0, images: int = 0) -> tuple[str, float]:
        """What tells a request from others, and the most that it may cost; a token has a character at least."""
        text = json.dumps(request, sort_keys=True)
        return (hashlib.sha256(f"{self._config.base_url} {text}".encode()).hexdigest(),
                self._price(tokens_in or len(text), self._config.max_tokens, images))

    def _chat(self, request: dict[str, Any], read: Callable[[Any], Reply], *, tokens_in: int = 0) -> str:
        key, most = self._identified(request, tokens_in=tokens_in)
        create = self._client.chat.completions.create
        return self._given(self._store.find(key) or self._paid(key, most, request, create, read))

    def _paid(self, key: str, most: float, request: dict[str, Any], create: Callable[..., Any],
              read: Callable[[Any], Reply]) -> Reply:
        """What the endpoint answers, now in the store."""
        with self._reserve(most):
            reply = asyncio.run_coroutine_threadsafe(self._fetch(request, create, read), self._loop).result()
            self._store.keep(key, reply)
        return reply

    def _given(self, reply: Reply) -> str:
        if reply.kind:
            raise AskError(reply.kind, f"{self._config.model}: {reply.kind}: {reply.text[:200]}")
        return reply.text

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

    async def _fetch(self, request: dict[str, Any], create: Callable[..., Any],
                     read: Callable[[Any], Reply]) -> Reply:
        """The endpoint's reply, after as many tries as the settings allow."""
        tries = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._config.retries + 1), wait=_wait, reraise=True, after=self._count,
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, _PASSING) and not _is_broke(error)))
        try:
            return await tries(self._once, request, create, read)
        except _PASSING as error:
            if _is_broke(error):
                raise EndpointError(f"{self._config.base_url}: {error}; the account has no credit left") from error
            raise EndpointError(f"{self._config.base_url} does not answer: {_kind(error)} after "
                                f"{self._config.retries + 1} tries ({str(error).rstrip('.') or 'no reply'}). What is "
                                "done is kept; run the same command again later, or raise retries or timeout"
                                ) from error
        except openai.APIStatusError as error:
            if error.code and _FILTERED.search(error.code):
                return Reply(str(error), 0, 0, kind="content filter")
            raise EndpointError(f"{self._config.base_url} takes no such request: {error}; check model = "
                                f"{self._config.model!r}, base_url, and the key in {self._config.key_env!r}") from error

    def _count(self, state: tenacity.RetryCallState) -> None:
        self._faults[_kind(state.outcome.exception())] += 1

    async def _once(self, request: dict[str, Any], create: Callable[..., Any], read: Callable[[Any], Reply]) -> Reply:
        answer = await asyncio.wait_for(create(**request), self._config.timeout)
        return await asyncio.to_thread(read, answer)


def _read(answer: Any, *, text_of: Callable[[Any], str] = lambda choice: choice.message.content or "") -> Reply:
    """What a completion says, and why it says nothing."""
    choice = answer.choices[0]
    text = text_of(choice)
    if answer.usage is None:
        raise EndpointError("the endpoint does not say how many tokens a reply has (usage), so nobody can say what it "
                            "costs; use one that does")
    tokens = answer.usage.prompt_tokens, answer.usage.completion_tokens
    if choice.message.refusal:
        return Reply(choice.message.refusal, *tokens, kind="refusal")
    kinds = {"content_filter": "content filter", "length": "cut off"}
    return Reply(text, *tokens, kind=kinds.get(choice.finish_reason, "" if text else "refusal"))


def _probabilities(options: Sequence[str], choice: Any) -> str:
    """The probability of each option, as JSON: of first tokens that are it or begin it alone, where that is told."""
    def word(text: str) -> str:
        return text.strip().strip(".,!\"'").lower()

    told = choice.logprobs.content if choice.logprobs else None
    if not told:
        answer = word(choice.message.content or "")
        return json.dumps({answer: 1.0} if answer in options else {})
    found = dict.fromkeys(options, 0.0)
    for token in told[0].top_logprobs:
        begun = [option for option in options if word(token.token) and option.startswith(word(token.token))]
        if len(begun) == 1:
            found[begun[0]] += math.exp(token.logprob)
    return json.dumps(found if any(found.values()) else {})


def _picture(images: ImageStore, answer: Any) -> Reply:
    """The picture that an answer holds, now in the store."""
    data = answer.data[0].b64_json if answer.data else None
    if not data:
        raise EndpointError("the endpoint sends no picture in its answer; ask for one with response_format = "
                            "\"b64_json\" among the preset's fields")
    usage = answer.usage
    tokens = (getattr(usage, "input_tokens", None) or 0, getattr(usage, "output_tokens", None) or 0)
    try:
        image = decode(base64.b64decode(data))
    except ValueError as error:
        raise _NoPicture(str(error)) from error
    return Reply(images.keep(image), *tokens, images=1)


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
