"""Trees drafted by a head: a beam over its slots, each node's children biased by its token.

A chain's slot is biased by the one token drafted before it. In a tree every node of a slot has its
own, so a slot is scored once for each of the BEAM nodes that may have children, which are the best
so far; of every one the LIST best children are kept, and of all nodes the best n. Requests with a
temperature meet the noise that the target will sample with (see `tree_candidates`), so that the
target's own choice is among a node's children as often as can be. Everything is of fixed shape and
stays on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from specformer_kernels.select_tree import Tree, extend_beam, select_tree
from specformer_kernels.tree_candidates import tree_candidates
from torch import Tensor

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.head import SpecFormerHead

BEAM = 4  # nodes of a slot that may have children; twice as many change nothing that is measurable
LIST = 8  # children that are looked at, of every one


class Ranking(NamedTuple):
    """Temperature per slot at which scores of a tree's nodes rank: `config.tree_ranking`."""

    greedy: tuple[float, ...]
    sampled: tuple[float, ...]

    @classmethod
    def of(cls, config: SpecFormerConfig) -> Ranking:
        """A head's, in full."""
        greedy = tuple(config.tree_ranking) or (1.0,) * config.num_draft_slots
        return cls(greedy, tuple(config.tree_ranking_sampled) or greedy)


class Lists(NamedTuple):
    """A beam over n slots, as `select_tree` takes it."""

    log_probs: Tensor  # [R, n, BEAM, LIST] float32
    tokens: Tensor  # [R, n, BEAM, LIST] int64
    origins: Tensor  # [R, n, BEAM] int64


@torch.no_grad()
def draft_tree(
    head: SpecFormerHead,
    logits: Tensor,
    bonus_tokens: Tensor,
    num_nodes: int,
    *,
    gates: Tensor | None = None,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    chains: Tensor | None = None,
) -> Tree:
    """The best `num_nodes` drafts of every request as a tree, from the logits of n <= K slots.

    Args:
        logits: slot logits before the Markov term, [R, n, V or N].
        bonus_tokens: the token after the anchor, int64 [R]: the tree's root.
        num_nodes: drafted nodes per request, 1 to 63.
        gates: of the slots, [R, n, rank], of a head with gates (`SpecFormerHead.markov_gates`).
        temperature: float32 [R]; at most 0 is greedy. None: all are.
        seeds: the requests' seeds, int64 [R], required with `temperature`.
        positions: of the anchors, int64 [R], required with `temperature`. Slot i is decided at the
            root's position plus i, which is the anchor's plus 1 + i.
        chains: bool [R], requests that get a plain chain, each node the best child of the one
            before, as far as nodes and slots reach; all other rows are inert. None: no request.

    Returns:
        Tree, every field [R, num_nodes + 1]; tokens are target ids. The main chain comes first.

    Raises:
        ValueError: a shape, dtype or number breaks the contract; the message names the argument.
    """
    lists = draft_lists(
        head,
        logits,
        bonus_tokens,
        gates=gates,
        temperature=temperature,
        seeds=seeds,
        positions=positions,
        chains=chains,
    )
    return select_tree(lists.log_probs, lists.tokens, lists.origins, num_nodes)


@torch.no_grad()
def draft_lists(
    head: SpecFormerHead,
    logits: Tensor,
    bonus_tokens: Tensor,
    *,
    gates: Tensor | None = None,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    chains: Tensor | None = None,
    ranking: Ranking | None = None,
) -> Lists:
    """The beam that `draft_tree` selects from; arguments as there, `ranking` instead of the head's.

    Lists of a request with few possible tokens end in token -1, rows without a node have origin -1.
    """
    scored = head.scored(logits)
    requests, slots = scored.shape[:2]
    ranking = ranking or Ranking.of(head.config)
    decided: tuple[Tensor | None, ...] = (None,) * slots
    if positions is not None:
        ahead = torch.arange(1, slots + 1, device=positions.device)
        decided = (ahead[:, None] + positions).unbind(0)
    log_probs, tokens, origins = [], [], [bonus_tokens.new_zeros((requests, BEAM))]
    previous, paths = bonus_tokens[:, None], None
    gates = None if gates is None else gates.unsqueeze(-2)  # the same for all nodes of a slot
    for slot in range(slots):
        markov = None
        if head.config.markov_rank:
            gate = None if gates is None else gates[:, slot]
            markov = head.markov_logits(previous, gate)
        found = tree_candidates(
            scored[:, slot],
            markov,
            LIST,
            temperature=temperature,
            seeds=seeds,
            positions=decided[slot],
            ranking=ranking.greedy[slot],
            drawn_ranking=ranking.sampled[slot],
            token_ids=head.draft_token_ids,
            chains=chains,
        )
        # The root is one row; without a Markov term all rows have the same children.
        tokens.append(found.tokens.expand(-1, BEAM, -1))
        log_probs.append(found.log_probs.expand(-1, BEAM, -1))
        if slot + 1 < slots:
            beam = extend_beam(log_probs[-1], tokens[-1], paths, BEAM)
            previous, paths = beam.tokens, beam.paths
            origins.append(beam.origins)
    return Lists(torch.stack(log_probs, 1), torch.stack(tokens, 1), torch.stack(origins, 1))
