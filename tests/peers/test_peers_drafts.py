"""Drafts as serving makes them, against the library's own forward passes of training.

A head's drafts at an anchor are written behind it; the library, which is then taught just these
tokens, must predict them. Runs where the library is installed (docs/peers.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("speculators", reason="only the environment of `make peers` has it")

from peers.drafts import drafts
from peers.library import Peer, new_peer
from peers.plan import PEERS, TARGET
from peers.target_states import Aside, TargetStates
from peers.train_peer import options_of, sample
from speculators.models.dflash import core as dflash
from speculators.models.dspark import core as dspark
from speculators.models.peagle import core as peagle

from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import load_target
from vllm_specformer.training.texts import Text, Texts

LENGTH, START, ANCHOR, COUNT, VOCABULARY = 60, 20, 30, 8, 2048


@pytest.fixture(scope="module")
def target() -> HookedTarget:
    model = load_target(TARGET, torch.float32, torch.device("cpu"))
    return HookedTarget(model, range(1, 7))


def states_of(target: HookedTarget, tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack(target(tokens[None])[0], 2)[0]


def head(kind: str) -> Peer:
    """Random weights; DSpark's sequential term, which begins at almost nothing, made to count."""
    torch.manual_seed(0)
    peer = new_peer(kind, VOCABULARY, mask_token=1)
    if kind == "dspark":
        torch.nn.init.normal_(peer.model.markov_head.markov_w1.weight)
        torch.nn.init.normal_(peer.model.markov_head.markov_w2.weight)
    peer.model.eval()
    return peer


@pytest.mark.parametrize("kind", PEERS)
def test_taught_its_own_drafts_the_library_predicts_them(
    kind: str, target: HookedTarget, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = head(kind)
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, VOCABULARY, LENGTH))
    first = START - 1
    made = drafts(peer.model, ids, states_of(target, ids), first, COUNT)[ANCHOR - first]
    ids[ANCHOR + 2 : ANCHOR + 2 + COUNT] = made
    text = Text(0, ids.numpy().astype(np.int32), ((START, LENGTH),), 0.0)
    texts = Texts.collect([text], LENGTH)
    states = TargetStates(tmp_path, target, texts, Aside())
    states.make([0])
    fields = sample(peer, texts, states, 0)
    predicted = {"eagle3": eagle3, "peagle": at_depths}.get(kind, in_block)
    assert predicted(peer, fields, monkeypatch) == made.tolist()


@pytest.mark.parametrize("kind", PEERS)
def test_fewer_drafts_are_the_first_ones_of_more(kind: str, target: HookedTarget) -> None:
    model = head(kind).model
    ids = torch.from_numpy(np.random.default_rng(2).integers(3, VOCABULARY, LENGTH))
    states = states_of(target, ids)
    more = drafts(model, ids, states, START - 1, COUNT)
    assert more.shape == (LENGTH - START, COUNT)
    for count in (2, 4):
        assert torch.equal(drafts(model, ids, states, START - 1, count), more[:, :count])


@torch.no_grad()
def eagle3(peer: Peer, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found, _, _ = peer.model(**fields, **peer.options | {"ttt_steps": COUNT})
    return [int(step[0, ANCHOR]) for step in found]


@torch.no_grad()
def at_depths(peer: Peer, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen = watched(peagle, monkeypatch)
    all_of_them = {"down_sample_ratio": 1.0, "down_sample_ratio_min": 1.0, "max_anchors": None}
    peer.model(**fields, **peer.options | all_of_them)
    call = seen()
    best = call["logits"][0].argmax(-1)
    own = (call["anchor_pos"] == ANCHOR).nonzero().flatten()
    return best[own[call["depth"][own].argsort()]].tolist()


@torch.no_grad()
def in_block(peer: Peer, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen = watched(dspark if peer.kind == "dspark" else dflash, monkeypatch)
    # Every token of the answer is an anchor, in order; the bonus token is the library's anchor.
    every = peer.options | {"max_anchors": LENGTH}
    peer.model(**fields, **options_of(Peer(peer.kind, peer.model, peer.config, every), fields))
    best = seen()["logits"][0].argmax(-1).view(-1, peer.block)
    return best[ANCHOR + 1 - START, peer.block - COUNT :].tolist()


def watched(core: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """What the library hands to its loss."""
    calls: list[dict[str, Any]] = []
    loss = core.compute_metrics

    def keep(*values: Any, **named: Any) -> Any:
        calls.append(named | ({"logits": values[0]} if values else {}))
        return loss(*values, **named)

    monkeypatch.setattr(core, "compute_metrics", keep)
    return lambda: calls[-1]
