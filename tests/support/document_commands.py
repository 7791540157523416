"""Which of the documents' commands are run, by which suite, how much shorter, and why others not.

Every command of a shell block is in one of three: what a pattern of NOT_RUN is in; what one of
SECONDS is in, which `make test` runs; all others, which `make test-docs` runs.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from support.paths import HEAD, ROOT, TARGET

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Pattern and reason.
NOT_RUN = (
    (r"^pip ", "changes the environment; `make test-install` installs the package"),
    (r"^hf ", "needs an account"),
    (r"^make ", "a suite or a tool of its own; that the target exists is tested"),
    (r"^pytest |-m pytest ", "a test of another suite"),
    (r"serve \S+ .*--speculative-config", "serves until it is stopped; its config is judged"),
    (r"--nproc-per-node 8|--engine-devices", "needs several GPUs"),
    (r"Qwen/|RedHatAI/", "asks a hub for a model"),
    (r"benchmarks/gpu\.py$", "needs a GPU"),
    (r"benchmarks/gpu\.py --dry", "tests/gpu/test_gpu_dry.py runs it"),
    (r"specformer bench ", "servers under load for hours; tests/bench/test_bench_served.py"),
    (r"--bench build/fixed", "reads what such hours made; tests/planning/test_from_bench.py"),
    (r"smollm2", "needs the target of `make target`, and hours"),
    (r"make_prompts\.py", "needs six packages; tests/examples/test_english_prompts.py"),
    (r"bundled_pair/(corpus|prompts)\.py", "eight minutes over Python's own libraries"),
    (r"--target T |^specformer train --target T ", "forms of the commands of training.md"),
)
SECONDS = (r"^specformer doctor", r"^specformer check HEAD", r"^sed -n")
# What a document's reader puts in, as it lies in a clone.
_HEAD, _TARGET = (str(path.relative_to(ROOT)) for path in (HEAD, TARGET))
STAND_INS = {"HEAD": _HEAD, "TARGET": _TARGET, "MODEL": _TARGET}
ENGINE = '{"enforce_eager": true, "kv_cache_memory_bytes": 134217728}'
# What makes a command one of a minute; of an option given twice the last one counts.
SHORTER = {
    "distill": ("--max-prompts", "12", "--max-tokens", "32"),
    "train": ("--max-steps", "4", "--device", "cpu"),
    "eval": ("--max-prompts", "8"),
    "plan": ("--batch", "1", "2"),
}
MEASURED_PLAN = ("--cycles", "1", "--steps", "2", "--seconds", "0.01", "--max-prompts", "8")


def shell_lines(text: str) -> list[str]:
    """Lines of the shell blocks, continued ones joined."""
    blocks = [body for language, body in FENCE.findall(text) if language == "bash"]
    joined = [re.sub(r"\\\n\s*", " ", body) for body in blocks]
    return [line for body in joined for line in split_lines(body)]


def split_lines(body: str) -> list[str]:
    """Lines of a block; a quoted text may go over several."""
    lines: list[str] = []
    for line in body.splitlines():
        if lines and not is_closed(lines[-1]):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line.strip())
    return lines


def is_closed(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return False
    return True


def commands(path: Path) -> Iterator[str]:
    """A document's commands with its own variables put in, without what it sets and comments."""
    variables: dict[str, str] = {}
    for line in shell_lines(path.read_text()):
        words = shlex.split(line, comments=True)
        while words and (setting := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])):
            variables[setting[1]] = setting[2]
            words = words[1:]
        if words and words[0] != "export":
            command = re.sub(r"\s+#[^'\"]*$", "", line) if "#" in line else line
            command = re.sub(r"^(?:[A-Z_]+=\S+\s+)+", "", command)
            yield re.sub(r"\$([A-Z_]+)", lambda name: variables.get(name[1], name[0]), command)


def reason_not_run(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN if re.search(pattern, command)), None)


def takes_seconds(command: str) -> bool:
    return any(re.search(pattern, command) for pattern in SECONDS)


def runnable(command: str) -> str:
    """The command as a shell of a clone with small inputs runs it, in about a minute."""
    words = re.sub(r"\b(HEAD|TARGET|MODEL)\b", lambda name: STAND_INS[name[1]], command)
    name = re.search(r"(?:specformer|cli\.main) (\w+)", words)
    more = [*(shorter(name[1], words) if name else ())]
    program = "python -m vllm_specformer.cli.main"
    return " ".join([re.sub(r"^specformer ", f"{program} ", words), *map(shlex.quote, more)])


def shorter(name: str, command: str) -> Sequence[str]:
    options = list(SHORTER.get(name, ()))
    if name == "eval":
        # Answers of a directory have their length.
        options += [] if "--data" in command else ["--max-tokens", "32"]
    is_measured = name == "plan" and "--chip" not in command
    if is_measured:
        options += MEASURED_PLAN
    starts_engine = name == "distill" or "--serve" in command or is_measured
    if starts_engine and "--engine-args" not in command:
        options += ["--engine-args", ENGINE]
    return options
