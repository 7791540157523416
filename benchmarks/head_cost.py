"""What a head costs, from shapes alone; nothing is measured.

python benchmarks/head_cost.py training  # parameters, memory, FLOPs, hours: docs/training-cost.md
python benchmarks/head_cost.py sharding  # replicated or sharded: docs/tensor-parallel.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from vllm_specformer.shapes import MARKOV_RANK, HeadShape, TargetShape

# Published configurations: layers, hidden, heads, K/V heads, head size, inner width, vocabulary.
TARGETS = {
    "Qwen3-4B": TargetShape(36, 2560, 32, 8, 128, 9728, 151_936),
    "Qwen3-8B": TargetShape(36, 4096, 32, 8, 128, 12288, 151_936),
    "Qwen3-14B": TargetShape(40, 5120, 40, 8, 128, 17408, 151_936),
    "Qwen3-32B": TargetShape(64, 5120, 64, 8, 128, 25600, 151_936),
    "Llama-3.3-70B": TargetShape(80, 8192, 64, 8, 128, 28672, 128_256),
}
TIED = ("Qwen3-4B",)  # embedding and output matrix are one
HALF, SINGLE = 2, 4  # bytes
SLOTS, ANCHORS = 8, 32
MEAN_SLOTS = 4.5  # run per anchor: 2, 4, 4 or 8
MEMORY_GIB = 2  # --memory


def training(args: argparse.Namespace) -> Iterator[Sequence[str]]:
    """A row per target.

    FLOPs are two per weight and token of a matrix product, four more for a backward pass through it
    (two more through frozen weights). The divergence asks the target for its own logits too.
    """
    yield (
        "target", "head, M parameters", "memory, GiB", "training, PFLOP", "training, GPU hours",
        "answers, GPU hours", "answers, GB",
    )  # fmt: skip
    for name, target in TARGETS.items():
        if name.startswith("Llama"):
            continue
        head = HeadShape.default_for(target, SLOTS)
        size, vocabulary = target.hidden, target.vocab
        all_weights = target.parameters + (0 if name in TIED else vocabulary * size)
        context = 2 * size * (target.heads + target.kv_heads) * target.head_dim
        per_token = head.hooks * size**2 + context  # the downsampler, the context attention
        own = head.shared_parameters - per_token
        markov = MARKOV_RANK * vocabulary  # of each of its two matrices; one is looked up
        parameters = head.shared_parameters + SLOTS * head.slot_parameters + 2 * markov
        rows = ANCHORS * MEAN_SLOTS
        flops = args.text_tokens * (2 * all_weights + 6 * per_token)
        flops += 6 * rows * (own + head.slot_parameters + markov + size * vocabulary)
        flops *= args.texts * args.epochs
        # fp32 weights, gradients and one moment (Muon), beside the target.
        memory = (3 * SINGLE * parameters + HALF * all_weights) / 2**30 + MEMORY_GIB
        step = HALF * all_weights / (args.terabytes * 1e12 * args.utilisation)
        yield (
            name,
            f"{parameters / 1e6:,.0f}",
            f"{memory:,.0f}",
            f"{flops / 1e15:,.0f}",
            f"{flops / (args.tflops * 1e12 * args.utilisation) / 3600:.1f}",
            f"{args.texts * args.answer_tokens / args.batch * step / 3600:.1f}",
            f"{args.texts * args.text_tokens * args.bytes_per_token / 1e9:.1f}",
        )


def sharding(args: argparse.Namespace) -> Iterator[Sequence[str]]:
    """A row per target and number of ranks.

    At few requests a step is the time to read its weights. A sharded head reads its share of them
    and pays for putting the parts together, `--collective` microseconds a time.
    """
    yield "target", "ranks", "target's step, ms", "whole head, ms", "sharded, ms"
    for name, target in TARGETS.items():
        head = HeadShape.default_for(target)
        milliseconds = HALF / (args.terabytes * 1e12) * 1e3
        weights = head.shared_parameters + args.slots * head.slot_parameters
        kept = head.bonus * head.hidden**2  # the bonus token's projection, whole on every rank
        # Downsampler, context attention, slots; attention and SwiGLU of every slot layer.
        together = (3 + 2 * head.slot_layers) * args.collective / 1e3
        for ranks in args.ranks:
            step = target.parameters / ranks * milliseconds
            whole = weights * milliseconds
            shared = ((weights - kept) / ranks + kept) * milliseconds + together
            cells = (f"{ms:.2f} ({ms / step:.0%})" for ms in (whole, shared))
            yield name, str(ranks), f"{step:.2f}", *cells


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("training", "sharding"))
    parser.add_argument("--terabytes", type=float, default=4.3, help="per second, copied (H200)")
    for name, default, text in (
        ("--texts", 50_000, "answers of the target"),
        ("--text-tokens", 900, "prompt and answer"),
        ("--answer-tokens", 600, ""),
        ("--epochs", 3, ""),
        ("--batch", 256, "answers decoded at a time"),
        ("--slots", 4, "tokens drafted, by a sharded head"),
    ):
        parser.add_argument(name, type=int, default=default, help=text)
    parser.add_argument("--tflops", type=float, default=780, help="measured bf16 ceiling (H200)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="of both, in training")
    parser.add_argument("--bytes-per-token", type=float, default=2.2, help="on disk")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--collective", type=float, default=10, help="microseconds each")
    args = parser.parse_args(arguments)
    head, *rows = {"training": training, "sharding": sharding}[args.what](args)
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
