"""What eval, bench and plan make of prompts: the first question of each, rendered."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.distill.fakes import TEMPLATE, chat, chat_target, write_lines
from vllm_specformer.data.openings import read_prompts
from vllm_specformer.distill.encode import Encoder, load_encoder
from vllm_specformer.evaluation.questions import from_files

TOOLS = {"tools": [{"name": "look"}, {"name": "ask"}]}
RECORDS = [
    {"text": "def function(x): return x"},
    chat("What is the weather?", "Sure?") | TOOLS,
    {"conversations": [{"from": "human", "value": "What time is it now?"}], "system": "be brief"},
]
PLAIN = [
    "def function(x): return x",
    "user: What is the weather?\nassistant: ",
    "system: be brief\nuser: What time is it now?\nassistant: ",
]


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    template = "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}" + TEMPLATE
    return chat_target(tmp_path_factory.mktemp("targets") / "tools", template)


@pytest.mark.parametrize("knows_tools", [False, True])
def test_tools_are_rendered_or_said_to_be_left_out(
    target: Path, with_tools: Path, tmp_path: Path, knows_tools: bool
) -> None:
    place = with_tools if knows_tools else target
    path = write_lines(tmp_path / "prompts.jsonl", [*RECORDS, "no record"])
    expected = [PLAIN[0], "[look][ask]" * knows_tools + PLAIN[1], PLAIN[2]]
    said: list[str] = []
    assert read_prompts([path], place, 16, 512, said.append) == expected
    encoder = load_encoder(place)
    questions = from_files(
        [path],
        lambda chats: encoder,
        context=512,
        max_tokens=16,
        max_prompts=None,
        max_bad_lines=None,
        seed=0,
        say=said.append,
    )
    expected[0] = f"<|endoftext|>{expected[0]}"  # what the tokenizer puts before any text
    assert [encoder.decode(ids) for ids in questions.prompts.values()] == expected
    bad = f"1 malformed records left out:\n  {path}, line 4: expected an object, found str"
    tools = "1 conversations have tools, and the chat template has no place for them: the target "
    assert said == ([bad] if knows_tools else [bad, tools + "is asked without"]) * 2


def test_prompts_that_the_template_refuses(tmp_path: Path, encoder: Encoder) -> None:
    template = "{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + TEMPLATE
    place = chat_target(tmp_path / "strict", template)
    said: list[str] = []
    path = write_lines(tmp_path / "prompts.jsonl", RECORDS)
    assert read_prompts([path], place, 16, 512, said.append) == [PLAIN[0], PLAIN[2]]
    assert said == ["1 prompts left out: refused by the chat template (no tools here)"]
