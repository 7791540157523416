"""Replicated or sharded: what reading the head's weights costs under tensor parallelism.

    python benchmarks/sharding_cost.py        # the table of docs/one-step.md

Arithmetic, nothing measured: at few requests a step is the time to read its weights. A sharded head
reads its share of them and pays for putting the parts together, `--collective` microseconds a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vllm_specformer.shapes import HeadShape, TargetShape

# Published configurations: layers, hidden, heads, K/V heads, head size, inner width, vocabulary.
TARGETS = {
    "Qwen3-8B": TargetShape(36, 4096, 32, 8, 128, 12288, 151_936),
    "Qwen3-32B": TargetShape(64, 5120, 64, 8, 128, 25600, 151_936),
    "Llama-3.3-70B": TargetShape(80, 8192, 64, 8, 128, 28672, 128_256),
}
HALF = 2  # bytes


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--slots", type=int, default=4, help="tokens drafted")
    parser.add_argument("--terabytes", type=float, default=4.3, help="per second and rank")
    parser.add_argument("--collective", type=float, default=10, help="microseconds each")
    args = parser.parse_args(arguments)
    print("| target | ranks | target's step, ms | whole head, ms | sharded, ms |")
    print("|---|---|---|---|---|")
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
            cells = [f"{step:.2f}"]
            cells += [f"{ms:.2f} ({ms / step:.0%})" for ms in (whole, shared)]
            print(f"| {name} | {ranks} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
