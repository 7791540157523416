"""Train one of the library's heads for so many cpu-seconds.

python -m peers.train_peer eagle3 --seconds 240 --seed 0 --out DIR --data build/peers
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speculators.models.eagle3.data import shift_batch
from torch import Tensor
from tqdm import tqdm

from peers import answers
from peers.checkpoint import Counts, load, save
from peers.clock import CpuClock
from peers.library import Peer, layers_of, new_peer
from peers.plan import PEERS, TARGET
from peers.target_states import Aside, TargetStates
from vllm_specformer.data.files import write_atomic
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import load_target
from vllm_specformer.training.pace import factor
from vllm_specformer.training.texts import Texts

TEXTS = 12  # in a step
WARMUP = 0.01  # the library's share of the steps; then the rate falls linearly to 0
CLIP = 1.0
SHORTEST = 4  # tokens of an answer
BETWEEN_CHECKPOINTS = 60.0  # cpu-seconds
COUNTED = ("steps", "texts", "tokens", "cpu_seconds", "states_cpu_seconds", "wall_seconds")


def open_target() -> HookedTarget:
    """The target, its states kept behind every layer."""
    model = load_target(TARGET, torch.float32, torch.device("cpu"))
    return HookedTarget(model, range(1, model.config.num_hidden_layers + 1))


def rarest_token(texts: Texts, vocabulary: int) -> int:
    """What stands for a token that is not known; the target's tokenizer has no mask."""
    return int(np.bincount(texts.tokens, minlength=vocabulary).argmin())


def sample(peer: Peer, texts: Texts, states: TargetStates, index: int) -> dict[str, Tensor]:
    """One text as the library's dataset gives it: labels are the answer's tokens only."""
    tokens = torch.from_numpy(texts.input_ids(index).astype(np.int64))
    behind = states.of(index)
    is_answer = torch.zeros(len(tokens), dtype=torch.bool)
    for start, end in texts.answers(index):
        is_answer[start:end] = True
    if peer.block:
        # The library places no anchor in a row's last block; in its rows another text stands there.
        tokens = torch.cat([tokens, tokens.new_full((peer.block,), peer.model.mask_token_id)])
        behind = torch.cat([behind, behind.new_zeros(peer.block, *behind.shape[1:])])
        is_answer = torch.cat([is_answer, is_answer.new_zeros(peer.block)])
    fields = {
        "input_ids": tokens,
        "hidden_states": layers_of(behind, peer.model.target_layer_ids),
        "verifier_last_hidden_states": behind[:, -1],
        "loss_mask": is_answer,
        "lengths": torch.tensor([len(tokens)]),
        "position_ids": torch.arange(len(tokens)),
    }
    if not peer.block:
        is_answer[-1] = False  # nothing was predicted behind it
        fields = shift_batch(fields)
    del fields["lengths"]
    fields = {name: value.unsqueeze(0) for name, value in fields.items()}
    return fields | {"document_ids": torch.zeros_like(fields["input_ids"])}


def options_of(peer: Peer, fields: dict[str, Tensor]) -> dict[str, Any]:
    """The forward pass's options; a block needs room for every anchor that is asked for."""
    if not peer.block:
        return peer.options
    anchors = int(fields["loss_mask"][:, : -peer.block].sum())
    return peer.options | {"max_anchors": min(peer.options["max_anchors"], anchors)}


def order(count: int, seed: int) -> Iterator[int]:
    """Places in the texts, one epoch after another."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=draw).tolist()


class Training:
    """A head, its optimizers and how far it is."""

    def __init__(
        self, peer: Peer, texts: Texts, states: TargetStates, seed: int, rate: float = 1
    ) -> None:
        self.peer, self.texts, self.states, self.seed = peer, texts, states, seed
        self.optimizers, self.parameters = peer.optimizers(), peer.trained()
        self.rates = [rate * float(group["lr"]) for group in self.groups()]
        self.counts: Counts = dict.fromkeys(COUNTED, 0)

    def groups(self) -> list[dict[str, Any]]:
        """Groups of parameters; a checkpoint that is loaded puts others in their place."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def run(self, seconds: float, file: Path) -> None:
        """Train until the cpu-seconds are used up; goes on from `file` if it is there."""
        self.counts = load(file, self.peer.model, self.optimizers) or self.counts
        lengths = [sum(e - s for s, e in self.texts.answers(i)) for i in range(len(self.texts))]
        usable = [i for i, length in enumerate(lengths) if length >= SHORTEST]
        places = islice(order(len(usable), self.seed), int(self.counts["texts"]), None)
        before, saved = dict(self.counts), self.counts["cpu_seconds"]
        clock, wall, aside = CpuClock(seconds, self.states.aside), time.time(), self.states.aside
        clock.start(before["cpu_seconds"], 0.0)
        self.peer.model.train()
        with tqdm(total=round(seconds), unit="cpu-s", desc=self.peer.kind, mininterval=10) as bar:
            while clock.advance() < 1:
                bar.update(round(clock.seconds) - bar.n)
                self.step([usable[next(places)] for _ in range(TEXTS)], clock.reached)
                self.counts["cpu_seconds"] = round(clock.seconds, 1)
                self.counts["wall_seconds"] = round(before["wall_seconds"] + time.time() - wall, 1)
                self.counts["states_cpu_seconds"] = round(
                    before["states_cpu_seconds"] + aside.seconds, 1
                )
                if clock.seconds - saved > BETWEEN_CHECKPOINTS:
                    saved = clock.seconds
                    save(file, self.peer.model, self.optimizers, self.counts)

    def step(self, batch: Sequence[int], progress: float) -> None:
        """One update, at the rate of this progress from 0 to 1."""
        for group, highest in zip(self.groups(), self.rates, strict=True):
            group["lr"] = highest * factor("linear", progress, WARMUP)
        self.states.make(batch)
        # Anchors are drawn from here: a training that goes on draws what one in a piece would.
        torch.manual_seed(1_000_003 * self.seed + int(self.counts["steps"]))
        for index in batch:
            fields = sample(self.peer, self.texts, self.states, index)
            _, loss, _ = self.peer.model(**fields, **options_of(self.peer, fields))
            (loss / len(batch)).backward()
            self.counts["tokens"] += int(self.texts.lengths[index])
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.counts["steps"] += 1
        self.counts["texts"] += len(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=PEERS)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1, help="times the library's rates")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    texts, target = answers.read(args.data, answers.TRAINED), open_target()
    states = TargetStates(args.data / "states", target, texts, Aside())
    vocabulary = target.target.config.vocab_size
    peer = new_peer(args.kind, vocabulary, rarest_token(texts, vocabulary))
    training = Training(peer, texts, states, args.seed, args.rate)
    half = args.out.with_name(f".{args.out.name}.partial")
    training.run(args.seconds, half / "checkpoint.safetensors")
    parameters = sum(p.numel() for p in training.parameters)
    about = training.counts | {"parameters": parameters, "answers": len(texts)}
    shutil.rmtree(args.out, ignore_errors=True)
    peer.model.eval().save_pretrained(args.out)
    write_atomic(args.out / "training.json", (json.dumps(about) + "\n").encode())
    shutil.rmtree(half, ignore_errors=True)


if __name__ == "__main__":
    main()
