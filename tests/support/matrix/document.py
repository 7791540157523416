"""docs/compatibility.md from the table and the recorded outcomes.

cd tests && python -m support.matrix.document      # what `make test-matrix` does at its end
"""

from __future__ import annotations

from support.matrix.features import ENGINES, NOT_TRIED, REFUSED, REPEATS, REQUESTS, SAME, V1, V2
from support.matrix.records import read
from support.paths import ROOT

PATH = ROOT / "docs" / "compatibility.md"
WORDS = {SAME: "same output", REFUSED: "refused", REPEATS: "repeats itself", "": "not run"}
INTRODUCTION = """# Features of vLLM beside speculation

Generated from `tests/engine/matrix` by `make test-matrix`; do not edit. Which versions of vLLM work
is another page: [vllm-compatibility.md](vllm-compatibility.md).

Every row was run with the bundled pair in fp32, K = 4, and compared with an engine without
speculation. Drafts are forced so that every acceptance count occurs.

- **same output**: token ids, text, reason of the end and log-probabilities are those without
  speculation.
- **refused**: one message that names the field, before weights are loaded, or before the request is
  admitted; the engine goes on.
- **repeats itself**: sampled text for a seed is the same each time. That its distribution is the
  target's is tested in `tests/engine/v1/test_distribution.py`.
- **not run**: not tried on this runner by the matrix. V2 runs here in Triton's interpreter, too
  slowly for every row.
"""


def render() -> str:
    """The whole page."""
    found = {runner: read(runner) for runner in (V1, V2)}
    parts = [INTRODUCTION, _versions(found), "## What a request asks for\n"]
    parts.append(_table([(f"`{r.name}`", "requests", r.name, r.note) for r in REQUESTS], found))
    parts.append(_pairs(found))
    parts.append("## What the engine is started with\n")
    parts.append(_table([(e.name, "engines", e.name, e.note) for e in ENGINES], found))
    parts.append("## Not in the matrix\n")
    parts.append("| Feature | Where it stands |\n|---|---|")
    parts.append("\n".join(f"| {name} | {state} |" for name, state in NOT_TRIED.items()) + "\n")
    return "\n".join(parts)


def _versions(found: dict[str, dict]) -> str:
    runs = [f"{runner.upper()} on vLLM {f['vllm']}" for runner, f in found.items() if f]
    return f"Last run: {', '.join(runs)}.\n"


def _pairs(found: dict[str, dict]) -> str:
    tried = [f"{f['pairs']} pairs on {r.upper()}" for r, f in found.items() if f.get("pairs")]
    return f"Two of them in one request: {' and '.join(tried)}, all with the same output.\n"


def _table(rows: list[tuple[str, str, str, str]], found: dict[str, dict]) -> str:
    lines = ["| Feature | V1 runner | V2 runner | |", "|---|---|---|---|"]
    for shown, section, name, note in rows:
        outcomes = [WORDS[found[r].get(section, {}).get(name, "")] for r in (V1, V2)]
        lines.append(f"| {shown} | {' | '.join(outcomes)} | {note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(render())
