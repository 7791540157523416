"""Collect Python functions from the interpreter's own sources as a training corpus.

The corpus is what every machine with this project already has: the standard library and the
packages installed beside it. One document is one function or method, dedented, so documents are
short and end by themselves. Nothing is downloaded.

Split: a file is held out by the hash of its path. A held-out function is dropped when its *shape*
(all words replaced by a placeholder) also occurs in the training part, because packages copy
functions from each other and a copied function would measure memory, not competence.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import random
import re
import sys
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 2048
END, PAD = "<|endoftext|>", "<|pad|>"
MIN_CHARS, MAX_CHARS = 80, 1400
HELD_OUT_OF = 40  # one file in this many is held out
SKIPPED_PARTS = {"test", "tests", "testing", "_testing", "idlelib", "lib2to3", "pip", "setuptools"}


def source_files() -> list[tuple[str, Path]]:
    """Every Python file of the standard library and the installed packages, without tests."""
    paths = sysconfig.get_paths()
    found = {}
    for root in (Path(paths["stdlib"]), Path(paths["purelib"])):
        for path in root.rglob("*.py"):
            name = path.relative_to(root).as_posix()
            parts = set(name.split("/"))
            if "site-packages" in parts and root.name != "site-packages":
                continue
            if not parts & SKIPPED_PARTS and not path.name.startswith("test_"):
                found[name] = path
    return sorted(found.items())


def functions_in(path: Path) -> Iterator[str]:
    """Dedented source text of each function in a file; files that do not parse give nothing."""
    try:
        text = path.read_text(encoding="ascii")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            body = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            if MIN_CHARS <= len(body) <= MAX_CHARS and body.startswith("def "):
                yield body + "\n"


def split_prompt(function: str) -> tuple[str, str]:
    """Cut a function into a prompt (signature and docstring or first statement) and the rest.

    The cut is before the line break: the tokenizer joins a line break with the indentation that
    follows it, so a prompt that ended in one would look like the end of a function. The rest is
    empty when nothing is left after the docstring.
    """
    node = ast.parse(function).body[0]
    assert isinstance(node, ast.FunctionDef)
    last_line = node.body[0].end_lineno or 1
    lines = function.splitlines(keepends=True)
    prompt = "".join(lines[:last_line]).rstrip("\n")
    return prompt, function[len(prompt) :].rstrip("\n")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def _shape(function: str) -> bytes:
    return _digest(re.sub(r"\s+", "", re.sub(r"\w+", "w", function)))


def collect(seed: int) -> tuple[list[str], list[str], Counter[str]]:
    """Return (training functions, held-out functions, characters per top-level package)."""
    train: list[str] = []
    held: list[str] = []
    seen: set[bytes] = set()
    origin: Counter[str] = Counter()
    for name, path in tqdm(source_files(), desc="reading sources", unit="file"):
        is_held = int.from_bytes(_digest(name)[:4], "little") % HELD_OUT_OF == 0
        for function in functions_in(path):
            key = _digest(re.sub(r"\s+", "", function))
            if key in seen:
                continue
            seen.add(key)
            (held if is_held else train).append(function)
            origin[name.split("/")[0]] += len(function)
    known = {_shape(f) for f in train}
    held = [f for f in held if _shape(f) not in known]
    rng = random.Random(seed)
    rng.shuffle(train)
    rng.shuffle(held)
    return train, held, origin


def train_tokenizer(functions: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every text is encoded with the end token in front, as the model sees it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(functions, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, core.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=1024
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the corpus")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    train, held, origin = collect(args.seed)
    tokenizer = train_tokenizer(train[:60_000])
    tokenizer.save_pretrained(args.out / "tokenizer")
    counts = {}
    for name, functions in (("train", train), ("held_out", held)):
        stream = np.concatenate(
            [np.asarray(ids, dtype=np.uint16) for ids in tokenizer(functions)["input_ids"]]
        )
        np.save(args.out / f"{name}.npy", stream)
        (args.out / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f}) + "\n" for f in functions)
        )
        counts[name] = {"functions": len(functions), "tokens": len(stream)}
    manifest = {
        "python": sys.version.split()[0],
        "seed": args.seed,
        "counts": counts,
        "sha256": hashlib.sha256((args.out / "train.npy").read_bytes()).hexdigest(),
        "largest_origins_chars": dict(origin.most_common(12)),
    }
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(json.dumps(manifest, indent=2))


if __name__ == "__main__":
    main()
