"""Tokens per step of a trained head, replayed exactly on answers to held-out prompts.

    python -m peers.replayed eagle3 --head DIR --data build/peers --out FILE

Greedy drafts of every kind, so the text alone decides what is accepted (evaluation/replay.py), at
temperatures, too: that is what vLLM accepts of drafts that are not drawn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from peers import answers
from peers.plan import DRAFTED, KINDS, OURS, TARGET, TEMPERATURES
from vllm_specformer.data.files import write_atomic
from vllm_specformer.evaluation.metrics import ALL, HALF
from vllm_specformer.evaluation.replay import (
    HEAD,
    DraftedText,
    draft_texts,
    less_repetitive_half,
    replay,
)
from vllm_specformer.evaluation.trees import share_error
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import load_target
from vllm_specformer.training.packed_head import PackedHead
from vllm_specformer.training.texts import Texts


def by_ours(place: Path, texts: Texts) -> Iterator[DraftedText]:
    """Texts with the drafts of our head."""
    head = PackedHead.from_pretrained(place).float().eval()
    model = load_target(TARGET, torch.float32, torch.device("cpu"))
    target = HookedTarget(model, head.config.aux_hidden_state_layer_ids)
    return draft_texts(head, target, texts, DRAFTED, packed=True)


def by_peer(place: Path, texts: Texts) -> Iterator[DraftedText]:
    """Texts with the drafts of one of the library's heads."""
    from peers.drafts import drafts
    from peers.library import open_peer

    model = open_peer(place)
    target = load_target(TARGET, torch.float32, torch.device("cpu"))
    hooked = HookedTarget(target, range(1, target.config.num_hidden_layers + 1))
    for number, text in enumerate(texts.each()):
        tokens = torch.from_numpy(text.input_ids.astype("int64"))
        states, last = hooked(tokens[None])
        first = text.spans[0][0] - 1
        made = drafts(model, tokens, torch.stack(states, 2)[0], first, max(DRAFTED)).tolist()
        at = {int(anchor): made[anchor - first] for anchor in texts.anchors(number)[0]}
        yield DraftedText(
            id=text.id,
            tokens=tokens.tolist(),
            answers=list(text.spans),
            temperature=text.temperature,
            drafts={k: {place: row[:k] for place, row in at.items()} for k in DRAFTED},
            best=hooked.lm_head(last)[0].argmax(-1).tolist(),
        )


def figures(texts: Sequence[DraftedText]) -> dict[str, Any]:
    """Of all texts and of the less repetitive half, by K."""
    found: dict[str, Any] = {"texts": len(texts)}
    for name, chosen in ((ALL, texts), (HALF, less_repetitive_half(texts))):
        found[name] = {}
        for k in DRAFTED:
            each = [replay([text], HEAD, k) for text in chosen]
            together = replay(chosen, HEAD, k)
            error = share_error([one.tokens for one in each], [one.steps for one in each])
            found[name][f"K={k}"] = {
                "tokens_per_step": round(together.tokens_per_step, 3),
                "stderr": round(error, 3),
                "acceptance_per_position": [round(x, 3) for x in together.per_position],
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    by = by_ours if args.kind == OURS else by_peer
    found = {}
    for temperature in TEMPERATURES:
        texts = answers.read(args.data, answers.held_out(temperature))
        found[f"{temperature:g}"] = figures(list(by(args.head, texts)))
    write_atomic(args.out, (json.dumps(found) + "\n").encode())


if __name__ == "__main__":
    main()
