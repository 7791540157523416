"""A server that answers as `vllm serve` does, with whatever file of states it is told to name."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def answering(model: str, max_model_len: int, named: str | None) -> Iterator[str]:
    """The URL of a server whose answers name this file; None: none, as without a connector."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            card = {"id": "served", "root": model, "max_model_len": max_model_len}
            self._send({"data": [card]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            choice = {"token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}}
            params = {"hidden_states_path": named} if named else None
            self._send({"choices": [choice], "kv_transfer_params": params})

        def _send(self, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
