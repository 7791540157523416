"""Several candidates per position by every rule: results/candidates.json and docs/candidates.md.

Simulated decoding (`vllm_specformer.evaluation.simulate`) of three kinds of prompts at several
temperatures. It goes on where it was stopped; `--render` makes the document anew from the file.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_specformer.data.files import write_atomic
from vllm_specformer.distill.encode import load_encoder
from vllm_specformer.evaluation.questions import from_files
from vllm_specformer.evaluation.simulate import COUPLED, DETERMINISTIC, WITH, WITHOUT, Arm, simulate
from vllm_specformer.evaluation.trees import share_error
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.target.files import end_token_ids
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import load_target

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "examples" / "models"
RESULT = HERE / "results" / "candidates.json"
DOCUMENT = HERE.parent / "docs" / "candidates.md"
PLOT = HERE.parent / "docs" / "figures" / "candidates.png"
BEGIN, END = "<!-- made by benchmarks/candidates.py: begin -->", "<!-- end -->"
CHATS = HERE.parent / "examples" / "server" / "chats.jsonl"
PAIRS = (
    ("bundled", str(MODELS / "python-target"), str(MODELS / "python-specformer")),
    ("smollm2", str(MODELS / "smollm2-target"), str(MODELS / "smollm2-specformer")),
)
LONGEST = 160  # tokens of a prompt

SAMPLING = ((0.0, 1.0), (0.6, 1.0), (1.0, 1.0), (1.5, 1.0), (1.0, 0.95))
FIRST, CHAIN, TREE = "first slot", "chain", "tree"
DRAWN = {FIRST: (8,), CHAIN: (1,) * 8, TREE: (4, 1, 1, 1)}
RULES = {
    DETERMINISTIC: "deterministic",
    WITH: "rejection, with replacement",
    WITHOUT: "rejection, without replacement",
    COUPLED: "coupled",
}
Row = dict[str, Any]


def arms(temperature: float) -> Iterator[tuple[str, Arm]]:
    """Shape and arm. Greedy decoding is one rule; a chain has nothing to replace."""
    for rule in RULES if temperature else (COUPLED,):
        if rule in (WITH, WITHOUT):
            for shape, widths in DRAWN.items():
                if (rule, shape) != (WITH, CHAIN):
                    yield shape, Arm(rule, widths)
        else:
            yield FIRST, Arm(rule, nodes=8, slots=1)
            yield CHAIN, Arm(rule, nodes=8, is_chain=True)
            yield TREE, Arm(rule, nodes=16)


def kind_of(prompt: str) -> str:
    if '"""' in prompt:
        return "after a docstring"
    return "after a signature" if prompt.count("\n") < 2 else "inside a body"


def programs(target: Path) -> dict[str, list[list[int]]]:
    """Prompts that the bundled ranking was not fitted on, by where in a function they end."""
    encoder = load_encoder(target, chats=False)
    found: dict[str, list[list[int]]] = {}
    for line in (HERE / "prompts-load.jsonl").read_text().splitlines()[48:]:
        prompt = json.loads(line)["prompt"]
        found.setdefault(kind_of(prompt), []).append(encoder.text(prompt))
    return found


def chats(target: Path) -> dict[str, list[list[int]]]:
    """Questions to a model that follows instructions, by their kind."""
    questions = from_files(
        [CHATS], partial(load_encoder, target, None, None),
        context=2 * LONGEST, max_tokens=LONGEST, max_prompts=None, max_bad_lines=0, seed=0,
        say=print,
    )  # fmt: skip
    found: dict[str, list[list[int]]] = {}
    for number, ids in questions.prompts.items():
        found.setdefault(questions.kinds[number], []).append(ids)
    return found


def measure(args: argparse.Namespace) -> None:
    done: list[Row] = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    names = ("target", "kind", "temperature", "top_p", "rule", "shape")
    known = {tuple(row[name] for name in names) for row in done}
    for name, place, head_place in [*PAIRS, *map(tuple, args.pair)]:
        model = load_target(Path(place), torch.float32, torch.device("cpu"))
        head = SpecFormerHead.from_pretrained(head_place, dtype=torch.float32).eval()
        target = HookedTarget(model, head.config.aux_hidden_state_layer_ids)
        ends = end_token_ids(Path(place))
        by_kind = programs(Path(place)) if name == PAIRS[0][0] else chats(Path(place))
        # Temperature 1 first: the tables are of use before all is done.
        jobs = [
            (kind, *sampling, *arm)
            for sampling in sorted(SAMPLING, key=lambda each: abs(each[0] - 1) + 1 - each[1])
            for kind in sorted(by_kind)
            for arm in arms(sampling[0])
        ]
        for kind, temperature, top_p, shape, arm in tqdm(jobs, desc=name):
            key = (name, kind, temperature, top_p, arm.rule, shape)
            if key in known:
                continue
            prompts = [ids for ids in by_kind[kind] if len(ids) <= LONGEST][: args.prompts]
            found = simulate(
                target, head, prompts, arm, temperature=temperature, top_p=top_p,
                max_tokens=args.tokens, end_ids=ends, seed=1,
            )  # fmt: skip
            done.append(
                dict(zip(names, key, strict=True))
                | {
                    "nodes": arm.nodes or _nodes(arm.widths),
                    "tokens": found.tokens,
                    "steps": found.steps,
                    "reached": found.reached[0],
                    "accepted_by_rank": found.accepted[0][:8],
                    "rows": found.rows,
                    "distance": round(found.distance, 4),
                    "chance": round(found.chance, 4),
                }
            )
            write_atomic(args.out, (json.dumps({"rows": done}) + "\n").encode())


def _nodes(widths: Sequence[int]) -> int:
    total, level = 0, 1
    for width in widths:
        level *= width
        total += level
    return total


def speed(rows: Sequence[Row]) -> str:
    """Tokens per step of rows together, with their standard error over texts."""
    tokens = [count for row in rows for count in row["tokens"]]
    steps = [count for row in rows for count in row["steps"]]
    return f"{sum(tokens) / sum(steps):.2f}±{share_error(tokens, steps):.2f}" if rows else ""


def acceptance(rows: Sequence[Row], count: int) -> float:
    """Share of first slots at which one of so many candidates was accepted."""
    reached = sum(row["reached"] for row in rows)
    return sum(sum(row["accepted_by_rank"][:count]) for row in rows) / max(1, reached)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)] + [""]


def document(rows: list[Row]) -> str:
    text: list[str] = []
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target]

        def of(own: list[Row] = own, **wanted: Any) -> list[Row]:
            return [row for row in own if all(row[k] == v for k, v in wanted.items())]

        settings = [(t, p) for t, p in SAMPLING if of(temperature=t, top_p=p)]
        titles = [f"T={t:g}" + (f", top-p {p:g}" if p < 1 else "") for t, p in settings]
        text.append(f"### Target: {target}\n")
        body = []
        for shape in (CHAIN, TREE):
            for rule in RULES:
                found = [of(shape=shape, rule=rule, temperature=t, top_p=p) for t, p in settings]
                if any(found):
                    nodes = next(part[0]["nodes"] for part in found if part)
                    body.append([f"{shape} of {nodes}, {RULES[rule]}", *map(speed, found)])
        text += ["Tokens per step:", "", *_table(["", *titles], body)]
        counts, body = (1, 2, 3, 4, 6, 8), []
        for rule in RULES:
            found = of(shape=FIRST, rule=rule, temperature=1.0, top_p=1.0)
            if found:
                reached = sum(row["reached"] for row in found)
                shares = [acceptance(found, c) for c in counts]
                errors = [(share * (1 - share) / reached) ** 0.5 for share in shares]
                cells = [f"{s:.3f}±{e:.3f}" for s, e in zip(shares, errors, strict=True)]
                body.append([RULES[rule], *cells])
        names = [f"c={c}" for c in counts]
        text += ["Acceptance of the first slot by the number of candidates, T=1:", ""]
        text += _table(["", *names], body)
        body = []
        for kind in sorted({row["kind"] for row in own}):
            for rule in (WITHOUT, COUPLED):
                found = [
                    of(shape=TREE, rule=rule, kind=kind, temperature=t, top_p=p)
                    for t, p in settings
                ]
                body.append([f"{kind}, {RULES[rule]}", *map(speed, found)])
        text += ["Trees by kind of prompt:", "", *_table(["", *titles], body)]
        sampled = [row for row in own if row["temperature"]]
        total = sum(row["rows"] for row in sampled)
        if sampled:
            over = max(row["distance"] / row["chance"] for row in sampled)
            mean = sum(row["distance"] / row["chance"] for row in sampled) / len(sampled)
            text.append(
                f"{total:,} rows of sampled text were verified. The total variation between the "
                "ranks of emitted tokens and the target's own probabilities is on average "
                f"{mean:.2f} times what exact draws would show by chance, at most {over:.2f} times "
                f"in {len(sampled)} runs.\n"
            )
    return "\n".join(text)


def plot(rows: list[Row]) -> bytes:
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(row["target"] for row in rows))
    figure = Figure(figsize=(10, 0.6 + 3 * len(targets)), layout="constrained")
    axes = figure.subplots(len(targets), 3, squeeze=False)
    for line, target in zip(axes, targets, strict=True):
        for place, temperature in zip(line, (0.6, 1.0, 1.5), strict=True):
            for rule, title in RULES.items():
                found = [
                    row for row in rows
                    if (row["target"], row["shape"], row["rule"], row["temperature"], row["top_p"])
                    == (target, FIRST, rule, temperature, 1.0)
                ]  # fmt: skip
                if found:
                    values = [acceptance(found, count) for count in range(1, 9)]
                    place.plot(range(1, 9), values, marker="o", markersize=3, label=title)
            title = f"{target}, temperature {temperature:g}"
            place.set(title=title, xlabel="candidates", ylim=(0, 1))
            place.grid(alpha=0.3)
        line[0].set_ylabel("first slot accepted")
    axes[0][0].legend(fontsize=7, loc="lower right")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()


def render(path: Path) -> None:
    rows = json.loads(path.read_text())["rows"]
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    content = f"{before}{BEGIN}\n\n{document(rows)}\n{END}{after}"
    write_atomic(DOCUMENT, content.encode())
    write_atomic(PLOT, plot(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pair", nargs=3, action="append", default=[],
                        metavar=("NAME", "TARGET", "HEAD"), help="another pair, too")  # fmt: skip
    parser.add_argument("--prompts", type=int, default=12, help="of each kind")
    parser.add_argument("--tokens", type=int, default=40, help="of an answer, at most")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--render", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.render:
        measure(args)
    render(args.out)


if __name__ == "__main__":
    main()
