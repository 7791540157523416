"""Answers from a running server that speaks OpenAI's API."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from vllm_specformer.distill.backend import EngineError, Progress
from vllm_specformer.distill.dialogue import Answer, Dialogue, Request
from vllm_specformer.distill.encode import Encoder

REFUSED = "refused by the server"
NOT_SAME = "answer's text does not give its tokens again"
RETRIES = 8  # with waits that double up to 8 s: about 40 s
REQUEST_TIMEOUT_S = 3600.0  # a long answer behind many others; a dead connection ends earlier
NO_KEY = "none"
# vLLM fills these from the model's generation_config.json where a request leaves them open, and
# returns token ids only when asked.
_VLLM_FIELDS = {
    "return_token_ids": True,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


class ServerEngine:
    """A server by its URL, with a bounded number of requests under way.

    Prompts are sent as token ids. Answers come back as token ids from vLLM; other servers return
    text, which is encoded again and used only where text and number of tokens come out the same:
    strong evidence that they are the generated ones, but no proof.

    Args:
        url: with or without the closing `/v1`.
        model: the name the server knows the target by.
        concurrency: conversations under way at the same time.
        max_model_len: shorter context than the server's, or what a silent server's is.
    """

    def __init__(
        self,
        url: str,
        model: str,
        encoder: Encoder,
        concurrency: int,
        max_model_len: int | None = None,
        default_context: int | None = None,
        retries: int | None = None,
    ) -> None:
        self.url = base_url(url)
        self.model = model
        self.encoder = encoder
        self.concurrency = concurrency
        self.retries = RETRIES if retries is None else retries
        self.versions: dict[str, str] = {}
        self.fields: dict[str, Any] = {}
        self.returns_ids = False
        served = asyncio.run(self._connect())
        limits = [n for n in (served, max_model_len) if n] or [default_context or 0]
        self.context = min(limits)
        if not self.context:
            raise EngineError(
                f"--engine {url}: the server does not say how long its context is",
                "give --max-model-len",
            )

    def answer(self, dialogues: Sequence[Dialogue], progress: Progress) -> None:
        """Carry every dialogue to its end, each at its own pace."""
        asyncio.run(self._answer_all(dialogues, progress))

    # -- connecting ---------------------------------------------------------------------------

    async def _connect(self) -> int | None:
        """Check that the server serves the model and takes token ids; its context length."""
        import openai

        async with self._client(retries=2) as client:
            try:
                cards = [card async for card in client.models.list()]
                names = [card.id for card in cards]
            except openai.OpenAIError as error:
                raise self._explain(error) from None
            except (AttributeError, TypeError, ValueError) as error:
                raise self._no_api(error) from None
            if self.model not in names:
                raise EngineError(
                    f"--engine {self.url}: the server does not serve {self.model!r} but "
                    f"{', '.join(map(repr, names)) or 'nothing'}",
                    "if that is the target, name it with --served-model",
                )
            card = cards[names.index(self.model)]
            vllm = getattr(card, "owned_by", "") == "vllm"
            self.versions = {"server": "vLLM" if vllm else str(getattr(card, "owned_by", "?"))}
            await self._probe(client)
            length = getattr(card, "max_model_len", None)
            return length if isinstance(length, int) else None

    async def _probe(self, client: Any) -> None:
        """Find out with a short request what the server takes and returns."""
        import openai

        ids = self.encoder.text("Hello, world")
        request = Request(ids, temperature=0.0, top_p=1.0, max_tokens=1, seed=None)
        self.fields = dict(_VLLM_FIELDS)
        try:
            try:
                completion = await self._send(client, request)
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                self.fields = {}
                completion = await self._send(client, request)
            seen = completion.usage.prompt_tokens if completion.usage else len(ids)
            self.returns_ids = _token_ids(completion.choices[0]) is not None
        except openai.BadRequestError as error:
            raise EngineError(
                f"--engine {self.url}: the server refuses a prompt of token ids ({_reason(error)})",
                "use vLLM, or --engine offline",
            ) from None
        except openai.OpenAIError as error:
            raise self._explain(error) from None
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise self._no_api(error) from None
        if seen != len(ids):
            raise EngineError(
                f"--engine {self.url}: the server made {seen} tokens of {len(ids)} that were sent; "
                "it serves another tokenizer, or changes prompts",
                "use vLLM, or --engine offline",
            )

    def _client(self, retries: int) -> Any:
        import openai

        return openai.AsyncOpenAI(
            base_url=self.url,
            api_key=os.environ.get("OPENAI_API_KEY") or NO_KEY,
            max_retries=retries,
            timeout=REQUEST_TIMEOUT_S,
        )

    # -- answering ----------------------------------------------------------------------------

    async def _answer_all(self, dialogues: Sequence[Dialogue], progress: Progress) -> None:
        gate = asyncio.Semaphore(self.concurrency)
        async with self._client(self.retries) as client:

            async def carry(dialogue: Dialogue) -> None:
                async with gate:
                    await self._carry(client, dialogue, progress)

            tasks = [asyncio.create_task(carry(d)) for d in dialogues if d.is_open]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry(self, client: Any, dialogue: Dialogue, progress: Progress) -> None:
        import openai

        while dialogue.is_open:
            request = dialogue.request()
            try:
                completion = await self._send(client, request)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                dialogue.refuse(REFUSED, _reason(error))
                return
            except openai.OpenAIError as error:
                raise self._explain(error) from None
            answer = self._read(completion, request)
            if isinstance(answer, str):
                dialogue.refuse(answer)
            else:
                dialogue.accept(answer)
                progress.answered(1, len(answer.token_ids))

    async def _send(self, client: Any, request: Request) -> Any:
        return await client.completions.create(
            model=self.model,
            prompt=request.prompt_ids,
            temperature=request.temperature,
            top_p=request.top_p,
            max_tokens=request.max_tokens,
            frequency_penalty=0.0,
            presence_penalty=0.0,
            extra_body=self.fields,
            **({} if request.seed is None else {"seed": request.seed}),
        )

    def _read(self, completion: Any, request: Request) -> Answer | str:
        """The answer, or why it cannot be used."""
        choice = completion.choices[0]
        finish: Literal["stop", "length"]
        if choice.finish_reason == "stop":
            finish = "stop"
        elif choice.finish_reason == "length":
            finish = "length"
        else:
            return f"finish_reason {choice.finish_reason!r}"
        ids = _token_ids(choice)
        if ids is None:
            counted = completion.usage.completion_tokens if completion.usage else None
            ids = self._encoded_again(request.prompt_ids, choice.text, finish, counted)
        return NOT_SAME if ids is None else Answer(ids, finish)

    def _encoded_again(
        self, prompt: list[int], text: str, finish: str, counted: int | None
    ) -> list[int] | None:
        """Token ids of an answer that came as text; None where they are not what was generated.

        They must give the text again behind the prompt, and be as many as the server counted; a
        replacement character stands for bytes that the text has lost.
        """
        if "\ufffd" in text:
            return None
        ids = list(self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.encoder.decode([*prompt, *ids]) != self.encoder.decode(prompt) + text:
            return None
        eos = self.encoder.tokenizer.eos_token_id
        ended = [eos] if finish == "stop" and eos is not None else []
        # The end token, which the text lacks, is counted by vLLM and servers like it.
        if counted is not None and counted != len(ids) + len(ended):
            return None
        return ids + ended

    # -- explaining ---------------------------------------------------------------------------

    def _explain(self, error: Exception) -> EngineError:
        import openai

        where = f"--engine {self.url}:"
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            return EngineError(f"{where} the key was refused", "set OPENAI_API_KEY")
        if isinstance(error, openai.NotFoundError):
            return EngineError(
                f"{where} not found ({_reason(error)})", "check the URL and the model"
            )
        if isinstance(error, openai.APIConnectionError):
            return EngineError(
                f"{where} no answer ({error.__cause__ or error})",
                "is the server up, and is the URL right?",
            )
        if isinstance(error, openai.APIStatusError):
            return EngineError(f"{where} error {error.status_code} ({_reason(error)})")
        return self._no_api(error)

    def _no_api(self, error: Exception) -> EngineError:
        return EngineError(
            f"--engine {self.url}: the answer is not one of OpenAI's API ({error})",
            "the URL must be that of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1",
        )


def base_url(url: str) -> str:
    """The URL with the path `/v1` where it has no path.

    Raises:
        EngineError: it is no URL of a server.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise EngineError(
            f"--engine {url!r}: expected 'offline' or the URL of a server such as "
            "http://127.0.0.1:8000/v1"
        )
    return url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"


def _token_ids(choice: Any) -> list[int] | None:
    ids = getattr(choice, "token_ids", None)
    return list(ids) if isinstance(ids, list) else None


def _reason(error: Any) -> str:
    return str(getattr(error, "message", error)).strip()[:300]
