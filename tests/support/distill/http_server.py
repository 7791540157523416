"""A server with as much of OpenAI's API as a distillation needs, which misbehaves on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from support.distill.fakes import made_up
from vllm_specformer.distill.dialogue import Request
from vllm_specformer.distill.encode import Encoder


@dataclass
class Behaviour:
    """What the server does; all its defaults are vLLM's."""

    encoder: Encoder
    model: str = "served"
    max_model_len: int | None = 96
    token_ids: bool = True
    known_fields_only: bool = False
    takes_token_ids: bool = True
    extra_prompt_tokens: int = 0
    finish_reason: str | None = None
    refuse_after: int | None = None
    errors: list[int] = field(default_factory=list)
    html: bool = False
    seen: list[dict[str, Any]] = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """The URL of a server in this process."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            card: dict[str, Any] = {"id": behaviour.model, "object": "model", "owned_by": "vllm"}
            if behaviour.max_model_len:
                card["max_model_len"] = behaviour.max_model_len
            self._send(200, {"object": "list", "data": [card]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                behaviour.seen.append(body)
                behaviour.busy += 1
                behaviour.most_busy = max(behaviour.busy, behaviour.most_busy)
                status = behaviour.errors.pop(0) if behaviour.errors else 200
                number = len(behaviour.seen)
            if not behaviour.takes_token_ids or (
                behaviour.known_fields_only and "return_token_ids" in body
            ):
                status = 400
            if behaviour.refuse_after is not None and number > behaviour.refuse_after:
                status = 400
            if status == 200:
                self._send(200, completion(behaviour, body))
            else:
                self._send(status, {"error": {"message": "not today"}})
            with lock:
                behaviour.busy -= 1

        def _send(self, status: int, content: dict[str, Any]) -> None:
            data = b"<html></html>" if behaviour.html else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if behaviour.html else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(behaviour: Behaviour, body: dict[str, Any]) -> dict[str, Any]:
    request = Request(
        body["prompt"], body["temperature"], body["top_p"], body["max_tokens"], body.get("seed")
    )
    answer = made_up(request)
    text = behaviour.encoder.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)
    choice: dict[str, Any] = {
        "index": 0,
        "text": text,
        "logprobs": None,
        "finish_reason": behaviour.finish_reason or answer.finish_reason,
    }
    if behaviour.token_ids:
        choice["token_ids"] = answer.token_ids
    generated = len(answer.token_ids)
    prompt_tokens = len(request.prompt_ids) + behaviour.extra_prompt_tokens
    return {
        "id": "1",
        "object": "text_completion",
        "created": 0,
        "model": behaviour.model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": prompt_tokens + generated,
        },
    }
