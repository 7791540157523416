"""A server that somebody has started writes the hidden states of texts to files we can read."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safetensors import safe_open

from vllm_specformer.errors import SpecFormerError
from vllm_specformer.serving.hidden_states import Extracted, engine_arguments
from vllm_specformer.state_files import LAYER_IDS, joined

UNDER_WAY = 32  # requests at a time
REQUEST_TIMEOUT_S = 600.0
FILE_TIMEOUT_S = 60.0  # from the answer until the file is there
_POLL_S = 0.002
_ALIVE_S = 2.0
# vLLM fills these from the model's generation_config.json where a request leaves them open.
_FIELDS = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class StatesServerError(SpecFormerError):
    """The server does not do what a training needs of it."""


def is_url(states: str) -> bool:
    """Whether `--states` names a server."""
    return urlsplit(states).scheme in ("http", "https")


def serve_line(
    target: str, ids: Sequence[int], dtype: str, max_model_len: int, directory: Path
) -> str:
    """The command that starts such a server; arguments as of `engine_arguments`."""
    arguments = engine_arguments(Path(target), ids, dtype, max_model_len, directory)
    words = ["vllm", "serve", target]
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if name == "model":
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return shlex.join(words)


class StatesServer:
    """A `vllm serve` with the options of `serve_line`, here or on a machine that shares its files.

    Args:
        url: with or without the closing `/v1`.
        target: as it was given to us, for messages.
        names: what the server may call it.
        ids, dtype, max_model_len: what is wanted, see `engine_arguments`.
        directory: where the server is to be told to write, for messages.
    """

    def __init__(
        self,
        url: str,
        target: str,
        names: Collection[str],
        ids: Sequence[int],
        *,
        dtype: str,
        max_model_len: int,
        directory: Path,
    ) -> None:
        self._where = f"--states {url}"
        self._url = url.rstrip("/").removesuffix("/v1")
        self._names, self._ids = set(names), list(ids)
        self._dtype, self._longest = dtype, max_model_len
        self._line = serve_line(target, ids, dtype, max_model_len, directory)
        self._served = target
        self._stopped = False

    def connect(self, text: Sequence[int], hidden_size: int) -> Path:
        """Hold what the server says of itself and writes for a text against what is wanted.

        Args:
            text: token ids of any text.

        Returns:
            The directory of its files.

        Raises:
            StatesServerError: see its message.
        """
        self._check_model(self._ask("/v1/models")["data"])
        (found,) = self.extract([text])
        try:
            with safe_open(found.file, "pt") as content:
                about = content.metadata() or {}
                tensor = content.get_slice("hidden_states")
                shape, dtype = tensor.get_shape(), tensor.get_dtype()
        finally:
            found.file.unlink()
        has = about.get(LAYER_IDS)
        if has is None:
            raise self._error(
                f"{found.file.name} does not say which hidden states it holds, so another "
                "connector has written it"
            )
        if has != joined(self._ids):
            raise self._error(
                f"the server writes the hidden states {has}, the head needs {joined(self._ids)}"
            )
        if shape[-1] != hidden_size:
            raise self._error(
                f"the server's hidden_size is {shape[-1]}, that of --target {hidden_size}"
            )
        wanted = {"float32": "F32", "bfloat16": "BF16"}[self._dtype]
        if dtype != wanted:
            raise self._error(
                f"the server's states are {dtype}, the training's {wanted} (--dtype {self._dtype})"
            )
        return found.file.parent

    def extract(self, texts: Sequence[Sequence[int]]) -> list[Extracted]:
        """Have the server run over token ids; one file per text, whole when this returns.

        Raises:
            StatesServerError: the server did not answer, or its files are not here. Files that
                have arrived are removed.
        """
        with ThreadPoolExecutor(UNDER_WAY) as threads:
            futures = [threads.submit(self._extract, text) for text in texts]
        errors = [error for future in futures if (error := future.exception())]
        if not errors:
            return [future.result() for future in futures]
        for future in futures:
            if future.exception() is None:
                future.result().file.unlink(missing_ok=True)
        raise errors[0]

    def kill(self) -> None:
        """Send nothing more; an `extract` under way in another thread raises StatesServerError."""
        self._stopped = True

    def _extract(self, text: Sequence[int]) -> Extracted:
        if self._stopped:
            raise StatesServerError(f"{self._where}: the training has ended")
        body = {
            "model": self._served,
            "prompt": list(text),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 0,
            "return_token_ids": True,
            **_FIELDS,
        }
        answer = self._ask("/v1/completions", body)
        file = (answer.get("kv_transfer_params") or {}).get("hidden_states_path")
        if file is None:
            raise self._error("the server writes no hidden states")
        (choice,) = answer["choices"]
        return Extracted(
            self._arrived(Path(file)),
            choice["token_ids"][0],
            choice["logprobs"]["token_logprobs"][0],
        )

    def _arrived(self, file: Path) -> Path:
        started = asked = time.monotonic()
        while not file.exists():
            now = time.monotonic()
            if now > asked + _ALIVE_S:  # a server that cannot write ends
                self._ask("/v1/models")
                asked = now
            if now > started + FILE_TIMEOUT_S:
                raise StatesServerError(
                    f"{self._where}: the server names {file}, which is not on this machine",
                    "set shared_storage_path in its --kv-transfer-config to a directory that "
                    "both machines see under the same path, and that the server can write to",
                )
            time.sleep(_POLL_S)
        return file

    def _check_model(self, cards: list[dict[str, Any]]) -> None:
        """Find the name the server knows the target by.

        Raises:
            StatesServerError: it serves another model, or shorter texts.
        """
        match = [card for card in cards if {card["id"], card.get("root")} & self._names]
        if not match:
            served = ", ".join(repr(card.get("root") or card["id"]) for card in cards)
            wanted = " or ".join(map(repr, sorted(self._names)))
            raise StatesServerError(
                f"{self._where}: the server serves {served or 'nothing'}, not {wanted}",
                "if that is --target, name it with --served-model; else start a server for it: "
                f"{self._line}",
            )
        self._served = match[0]["id"]
        limit = match[0].get("max_model_len")
        if limit is not None and limit < self._longest:
            raise self._error(
                f"the server's max_model_len is {limit}, the longest text needs {self._longest} "
                "(--max-length)"
            )

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")
            with suppress(ValueError, KeyError, TypeError):
                told = json.loads(told)["error"]["message"]
            raise StatesServerError(
                f"{self._where}: error {error.code} for {path} ({told.strip()[:300]})",
                "its log says why; set OPENAI_API_KEY if it wants a key",
            ) from None
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            raise self._error(f"no answer ({why})") from None
        except ValueError:
            raise self._error(f"the answer for {path} is not vLLM's") from None

    def _error(self, problem: str) -> StatesServerError:
        return StatesServerError(f"{self._where}: {problem}", f"start it with: {self._line}")
