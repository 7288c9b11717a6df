"""A real HTTP server that speaks the OpenAI protocol, and misbehaves on cue."""

from __future__ import annotations

import base64
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What the server does with one request.

    Attributes:
        text: the message's content. finish: its finish reason. refusal: what the model says instead.
        status: of HTTP. headers: further ones. code: of an error.
        fault: "", "hang" (says nothing for long), "cut" (closes in the middle), "garbage" (no JSON), "drip" (a byte a
            while).
        tokens: read and written, as the server counts them.
        image: the file of a picture, for a request of one. tops: probabilities of first tokens, where asked for.
    """

    text: str = "fine"
    finish: str = "stop"
    refusal: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None
    fault: str = ""
    tokens: tuple[int, int] = (100, 50)
    image: bytes = b""
    tops: dict[str, float] = field(default_factory=dict)


@dataclass
class FakeLLM:
    """What it was asked, and how it answers: ``behave`` gets a request and how often it came before."""

    url: str
    behave: Callable[[dict[str, Any], int], Answer]
    requests: list[dict[str, Any]] = field(default_factory=list)
    paid: list[tuple[int, int]] = field(default_factory=list)


@contextmanager
def fake_llm(behave: Callable[[dict[str, Any], int], Answer] = lambda request, times: Answer()) -> Iterator[FakeLLM]:
    """Serve on a free port of this machine inside the block."""
    lock, over = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:  # the name that http.server looks for
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                times = server.requests.count(request)
                server.requests.append(request)
            try:
                self.reply(server.behave(request, times))
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client gave up, as it should

        def reply(self, answer: Answer) -> None:
            if answer.fault == "hang":
                over.wait(20)
                self.close_connection = True
                return
            if answer.status == 200:
                message = {"role": "assistant", "content": None if answer.refusal else answer.text,
                           "refusal": answer.refusal}
                body: Any = {
                    "id": "x", "object": "chat.completion", "created": 0, "model": "fake",
                    "choices": [{"index": 0, "message": message, "finish_reason": answer.finish,
                                 "logprobs": self.logprobs(answer)}],
                    "usage": {"prompt_tokens": answer.tokens[0], "completion_tokens": answer.tokens[1],
                              "total_tokens": sum(answer.tokens)}}
                if self.path.endswith("/images/generations"):
                    body = {"created": 0, "data": [{"b64_json": base64.b64encode(answer.image).decode()}],
                            "usage": {"input_tokens": answer.tokens[0], "output_tokens": answer.tokens[1],
                                      "total_tokens": sum(answer.tokens)}}
                if not answer.fault:
                    server.paid.append(answer.tokens)
            else:
                body = {"error": {"message": "no", "type": "error", "code": answer.code}}
            data = b"<html>" if answer.fault == "garbage" else json.dumps(body).encode()
            self.send_response(answer.status)
            for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))}
                                | answer.headers).items():
                self.send_header(name, value)
            self.end_headers()
            if answer.fault == "cut":
                self.wfile.write(data[:20])
                self.close_connection = True
            elif answer.fault == "drip":
                for i in range(len(data)):
                    self.wfile.write(data[i:i + 1])
                    self.wfile.flush()
                    time.sleep(0.2)
                    if over.is_set():
                        break
            else:
                self.wfile.write(data)

        def logprobs(self, answer: Answer) -> dict[str, Any] | None:
            if not answer.tops:
                return None
            tops = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in answer.tops.items()]
            return {"content": [{**tops[0], "top_logprobs": tops}], "refusal": None}

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = FakeLLM(f"http://127.0.0.1:{http.server_address[1]}/v1", behave)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        over.set()
        http.shutdown()
        thread.join()
        http.server_close()
