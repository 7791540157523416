"""A target with a chat template, prompt files, and an engine that answers without a model."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.paths import TARGET
from vllm_specformer.data.manifest import Sampling
from vllm_specformer.data.prompts import derive
from vllm_specformer.data.shards import Conversation, read_manifest, read_rows
from vllm_specformer.distill.backend import Progress
from vllm_specformer.distill.dialogue import Answer, Dialogue, Request
from vllm_specformer.distill.encode import Encoder
from vllm_specformer.distill.settings import DistillSettings

END = 0  # <|endoftext|>
CONTEXT = 96
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}<|endoftext|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
GREEDY = Sampling(
    temperature=0, sampled_share=0, sampled_temperature=1, top_p=1, max_tokens=16, seed=0
)


def chat_target(directory: Path, template: str | None = TEMPLATE) -> Path:
    """A copy of the bundled target whose tokenizer has a chat template."""
    shutil.copytree(TARGET, directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | ({"chat_template": template} if template else {})))
    return directory


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def chat(*contents: str, system: str | None = None) -> dict[str, Any]:
    """A conversation of user messages with answers that must not be used."""
    messages = [{"role": "system", "content": system}] if system else []
    for content in contents:
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": "somebody else's answer"})
    return {"messages": messages}


def mixed_records(count: int) -> list[dict[str, Any]]:
    """Texts and conversations of one to three turns."""
    records: list[dict[str, Any]] = []
    for number in range(count):
        if number % 3 == 0:
            records.append({"text": f"def function_{number}(x):"})
        else:
            questions = [f"question {number} {turn}" for turn in range(number % 3 + number % 2)]
            records.append(chat(*questions, system="be brief" if number % 4 == 0 else None))
    return records


class FakeEngine:
    """Answers that depend on the request alone; some end, some reach the maximum length."""

    def __init__(
        self, context: int = CONTEXT, on_answer: Callable[[], None] = lambda: None
    ) -> None:
        self.context = context
        self.versions = {"engine": "fake"}
        self.on_answer = on_answer
        self.requests: list[Request] = []

    def answer(self, dialogues: Sequence[Dialogue], progress: Progress) -> None:
        for dialogue in dialogues:
            while dialogue.is_open:
                self.on_answer()
                request = dialogue.request()
                self.requests.append(request)
                answer = made_up(request)
                dialogue.accept(answer)
                progress.answered(1, len(answer.token_ids))


def made_up(request: Request) -> Answer:
    rng = random.Random(derive(0, request.prompt_ids, request.seed, request.temperature))
    ids = [rng.randrange(300, 2000) for _ in range(rng.randrange(1, 12))]
    if len(ids) >= request.max_tokens:
        return Answer(ids[: request.max_tokens], "length")
    return Answer([*ids, END], "stop")


def options(target: Path, prompts: Path, out: Path, **changes: Any) -> DistillSettings:
    defaults: dict[str, Any] = {"max_tokens": 16, "shard_size": 4}
    return DistillSettings(target=str(target), prompts=(prompts,), out=out, **(defaults | changes))


def open_fake(_: DistillSettings, __: Path, ___: Encoder) -> FakeEngine:
    return FakeEngine()


def rows_of(directory: Path) -> list[Conversation]:
    return list(read_rows(directory, read_manifest(directory)))
