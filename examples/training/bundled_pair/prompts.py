"""Cut the corpus's functions into prompts, as files that `specformer distill` and `eval` read.

A prompt is a signature with its docstring or, without one, its first statement.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from corpus import split_prompt
from transformers import AutoTokenizer

MAX_TOKENS = 160
# Files, the split they are cut from, and which of its prompts they get. The last training prompts
# are left to unloop.py; `load` is for benchmarks (load_prompts.py).
FILES = {
    "train": ("train", 0, 40_000),
    "held_out": ("held_out", 0, 384),
    "load": ("held_out", 384, 3_000),
}


def prompts(corpus: Path, split: str, count: int) -> list[str]:
    """The first prompts of a split that are not too long and have a rest to be written."""
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    texts = []
    for line in (corpus / f"{split}.jsonl").read_text().splitlines():
        prompt, rest = split_prompt(json.loads(line)["text"])
        if rest:
            texts.append(prompt)
        if len(texts) == 2 * count:
            break
    lengths = map(len, tokenizer(texts)["input_ids"])
    return [text for text, n in zip(texts, lengths, strict=True) if n <= MAX_TOKENS][:count]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (split, first, end) in FILES.items():
        texts = prompts(args.corpus, split, end)[first:]
        lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
        (args.out / f"{name}.jsonl").write_text("".join(lines))
        print(f"{name}: {len(lines):,} prompts")


if __name__ == "__main__":
    main()
