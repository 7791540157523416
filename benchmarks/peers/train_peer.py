"""Train one of the library's heads for so many cpu-seconds.

python -m peers.train_peer eagle3 --seconds 240 --seed 0 --out DIR --data build/peers
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speculators.models.eagle3.data import shift_batch
from torch import Tensor
from tqdm import tqdm

from peers import answers
from peers.library import Peer, layers_of, new_peer
from peers.plan import PEERS, TARGET
from peers.target_states import Aside, TargetStates
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import load_target
from vllm_specformer.training.pace import factor
from vllm_specformer.training.texts import Texts

TEXTS = 12  # in a step
WARMUP = 0.01  # the library's share of the steps; then the rate falls linearly to 0
CLIP = 1.0
SHORTEST = 4  # tokens of an answer


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


def train(peer: Peer, texts: Texts, states: TargetStates, seconds: float, seed: int) -> dict:
    """Train until the cpu-seconds are used up; returns counts."""
    lengths = [sum(end - start for start, end in texts.answers(i)) for i in range(len(texts))]
    usable = [i for i, length in enumerate(lengths) if length >= SHORTEST]
    optimizers, parameters = peer.optimizers(), peer.trained()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    highest = [group["lr"] for group in groups]
    draw = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    counts = {"steps": 0, "texts": 0, "tokens": 0}
    started, wall, before = time.process_time(), time.time(), states.aside.seconds
    bar = tqdm(total=round(seconds), unit="cpu-s", desc=peer.kind, mininterval=10)
    peer.model.train()
    while True:
        spent = time.process_time() - started - (states.aside.seconds - before)
        if spent >= seconds:
            break
        bar.update(round(spent) - bar.n)
        for group, rate in zip(groups, highest, strict=True):
            group["lr"] = rate * factor("linear", spent / seconds, WARMUP)
        while len(waiting) < TEXTS:
            order = torch.randperm(len(usable), generator=draw).tolist()
            waiting += [usable[i] for i in order]
        batch, waiting = waiting[:TEXTS], waiting[TEXTS:]
        states.make(batch)
        for index in batch:
            fields = sample(peer, texts, states, index)
            _, loss, _ = peer.model(**fields, **options_of(peer, fields))
            (loss / len(batch)).backward()
            counts["tokens"] += int(texts.lengths[index])
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        counts["steps"] += 1
        counts["texts"] += len(batch)
    bar.close()
    return counts | {
        "cpu_seconds": round(spent, 1),
        "states_cpu_seconds": round(states.aside.seconds - before, 1),
        "wall_seconds": round(time.time() - wall, 1),
        "last_loss": round(float(loss), 4),
        "rates": highest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=PEERS)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    texts, target = answers.read(args.data, answers.TRAINED), open_target()
    states = TargetStates(args.data / "states", target, texts, Aside())
    vocabulary = target.target.config.vocab_size
    peer = new_peer(args.kind, vocabulary, rarest_token(texts, vocabulary))
    counts = train(peer, texts, states, args.seconds, args.seed)
    about = counts | {"parameters": sum(p.numel() for p in peer.trained()), "answers": len(texts)}
    half = args.out.with_name(f".{args.out.name}.partial")
    shutil.rmtree(half, ignore_errors=True)
    peer.model.eval().save_pretrained(half)
    (half / "training.json").write_text(json.dumps(about) + "\n")
    shutil.rmtree(args.out, ignore_errors=True)
    os.replace(half, args.out)


if __name__ == "__main__":
    main()
