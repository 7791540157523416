"""Tokens per step under any verification rule, simulated: drafts, the target's rows, the rule.

A replay on known texts needs drafts that are deterministic, or that share the target's noise.
Rules that draw candidates decide with randomness of their own, so here the target writes anew, a
row at a time, and `specformer_kernels.verify.rules`, the kernels' oracle, decides on every row. A
walk down a tree reads the rows of the nodes that it visits and no others, so those are all that is
computed: the text is that of verifying the whole tree in one forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from specformer_kernels.sample_candidates import sample_candidates
from specformer_kernels.verify import rules
from specformer_kernels.verify.reference import KeyedNoise
from torch import Tensor
from transformers import DynamicCache

from vllm_specformer.candidates import draft_tree
from vllm_specformer.head import SpecFormerHead, slot_by_slot
from vllm_specformer.target.hidden_states import HookedTarget

DETERMINISTIC, COUPLED = "deterministic", "coupled"
WITHOUT, WITH = "rejection", "rejection_with_replacement"
RANKS = 32  # ranks of emitted tokens that are told apart


@dataclass(frozen=True)
class Arm:
    """What is drafted, and how it is verified.

    Attributes:
        rule: `DETERMINISTIC` and `COUPLED` draft the best tree, the former without noise;
            `WITHOUT` and `WITH` replacement draw the candidates of a fixed tree.
        widths: children of every node, by depth; of a rule that draws.
        nodes: drafted nodes; of the others.
        slots: depth of their trees at most.
        is_chain: whether they draft a chain.
    """

    rule: str
    widths: tuple[int, ...] = ()
    nodes: int = 0
    slots: int = 8
    is_chain: bool = False


@dataclass
class Outcome:
    """Counts over a simulation; `tokens` and `steps` per text.

    `accepted[depth][rank]` of `reached[depth]` visits to a node of that depth went on to its child
    of that rank. `observed` and `expected` count emitted tokens by their rank in the target's
    distribution (the last: all others), as they came and as it has them.
    """

    tokens: list[int]
    steps: list[int]
    reached: list[int] = field(default_factory=lambda: [0] * 64)
    accepted: list[list[int]] = field(default_factory=lambda: [[0] * 64 for _ in range(64)])
    rows: int = 0
    observed: Tensor = field(default_factory=lambda: torch.zeros(RANKS + 1, dtype=torch.float64))
    expected: Tensor = field(default_factory=lambda: torch.zeros(RANKS + 1, dtype=torch.float64))
    variance: Tensor = field(default_factory=lambda: torch.zeros(RANKS + 1, dtype=torch.float64))

    @property
    def distance(self) -> float:
        """Total variation between ranks as they came and as the target has them."""
        return float((self.observed - self.expected).abs().sum() / 2 / max(1, self.rows))

    @property
    def chance(self) -> float:
        """What that distance is on average for exact draws: E|N(0, v)| = sqrt(2 v / pi)."""
        return float((2 / math.pi * self.variance).sqrt().sum() / 2 / max(1, self.rows))

    def count(self, p: Tensor, token: int) -> None:
        """One emitted token and the distribution [V] it should have."""
        ranked = p.sort(descending=True).values
        known = torch.cat([ranked[:RANKS], ranked[RANKS:].sum()[None]])
        rank = min(int((p > p[token]).sum()), RANKS)
        self.rows += 1
        self.observed[rank] += 1
        self.expected += known
        self.variance += known * (1 - known)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """-inf outside the smallest set of tokens [..., V] whose mass reaches `top_p`, as vLLM does."""
    if top_p >= 1:
        return logits
    ordered, places = logits.sort(-1)
    is_out = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    is_out[..., -1] = False
    return torch.empty_like(logits).scatter_(-1, places, ordered.masked_fill(is_out, -math.inf))


class _Writer:
    """The target and the head's context over a batch of texts, padded on the left."""

    def __init__(
        self, target: HookedTarget, head: SpecFormerHead, prompts: Sequence[list[int]], more: int
    ) -> None:
        self.target, self.head = target, head
        self.batch, self.width = len(prompts), max(map(len, prompts))
        self.lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.mask = torch.zeros(self.batch, self.width + more, dtype=torch.int64)
        ids = torch.zeros(self.batch, self.width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, self.width - len(prompt) :] = torch.tensor(prompt)
            self.mask[row, self.width - len(prompt) : self.width] = 1
        config = head.config
        shape = (self.batch, self.width + more, config.num_key_value_heads, config.head_dim)
        self.key, self.value = torch.zeros(2, *shape)
        self.cache, self.end = DynamicCache(), 0
        self._append(ids, (self.mask[:, : self.width].cumsum(-1) - 1).clamp(min=0))

    def _append(self, ids: Tensor, positions: Tensor) -> None:
        start, self.end = self.end, self.end + ids.shape[1]
        states, last = self.target.extend(ids, self.mask[:, : self.end], positions, self.cache)
        context = self.head.combine(states)
        query, key, value = self.head.context_qkv(context, positions)
        self.key[:, start : self.end], self.value[:, start : self.end] = key, value
        self.context, self.query = context[:, -1], query[:, -1]
        self.logits = self.target.lm_head(last[:, -1]).float()
        self.positions, self.previous = positions[:, -1], ids[:, -1]

    def append(self, tokens: Tensor) -> None:
        """One token for every text, int64 [B]."""
        self.mask[:, self.end] = 1
        self._append(tokens[:, None], self.positions[:, None] + 1)

    def draft(self, rows: Tensor, bonus: Tensor, slots: int) -> tuple[Tensor, Tensor | None]:
        """At the last position of some texts.

        Returns:
            Slot logits [rows, slots, N], and gates of the Markov term [rows, slots, rank].
        """
        head, end = self.head, self.end
        key, value = self.key[rows, :end], self.value[rows, :end]
        mask = self.mask[rows, :end]
        seen = head.seen(mask.cumsum(-1) - 1, self.positions[rows][:, None])
        visible = mask.bool()[:, None] & seen
        query = self.query[rows][:, None, None]
        attended = head._attend(query, key, value, visible).squeeze(2)
        embedded = self.target.embed(bonus)[:, None]
        running = head.slots_to_run(slots)
        opened = head.expand(self.context[rows][:, None], attended, embedded, running)
        attend = head._attend_slots(key, value, visible)
        states = head.run_slots(opened, self.positions[rows][:, None], attend)
        normed = self.target.norm(states[:, 0, :slots])
        return head.scored(self.target.lm_head(normed)).float(), head.markov_gates(normed)


@torch.inference_mode()
def simulate(
    target: HookedTarget,
    head: SpecFormerHead,
    prompts: Sequence[list[int]],
    arm: Arm,
    *,
    temperature: float,
    top_p: float = 1.0,
    max_tokens: int,
    end_ids: frozenset[int],
    seed: int,
) -> Outcome:
    """Continue every prompt (token ids) by speculative decoding, in float64 from the logits on.

    A step is counted at the token that it begins with, as by `replay`.
    """
    writer = _Writer(target, head, prompts, max_tokens + 1)
    drafter = _Drafter(head, writer, arm, temperature, torch.arange(len(prompts)) + 1000 * seed)
    result = Outcome([0] * len(prompts), [0] * len(prompts))
    live = list(range(len(prompts)))
    for _ in range(max_tokens):
        emitted, ended = torch.zeros(len(prompts), dtype=torch.int64), []
        logits = writer.logits.double()
        if temperature > 0:
            logits = nucleus(logits / temperature, top_p) * temperature
        for row in live:
            walk = drafter.walks[row]
            candidates, q = drafter.candidates(row)
            path = _verified(arm.rule, logits[row], candidates, q, temperature, drafter.noise(row))
            child = path.nodes[1] - 1 if len(path.nodes) > 1 else None
            emitted[row] = path.token if child is None else candidates[child]
            if temperature > 0:
                result.count(torch.softmax(logits[row] / temperature, -1), int(emitted[row]))
            result.tokens[row] += 1
            result.reached[walk.depth] += bool(candidates)
            if child is None:
                result.steps[row] += 1
                ended.append(row)
            else:
                result.accepted[walk.depth][child] += 1
                walk.down(child)
        live = [row for row in live if int(emitted[row]) not in end_ids]
        if not live:
            break
        drafter.draft([row for row in ended if row in live], emitted)
        writer.append(emitted)
    return result


def _verified(
    rule: str,
    logits: Tensor,
    candidates: list[int],
    q: Tensor | None,
    temperature: float,
    noise: KeyedNoise,
) -> rules.Path:
    """One row's decision about its candidates: a tree of one level, whose leaves have no row."""
    leaves = len(candidates)
    request = rules.Request(
        logits=logits.expand(1 + leaves, -1),
        tokens=[-1, *candidates],
        children=[list(range(1, 1 + leaves)), *([[]] * leaves)],
        positions=[noise.root_position] * (1 + leaves),
        temperature=temperature,
        draft_logits=None if q is None else lambda node: q,
    )
    path = rules.walk(request, WITHOUT if rule == DETERMINISTIC else rule, noise)
    assert path is not None, "the target's logits are not finite"
    return path


@dataclass
class _Walk:
    """Where a text's step is: at which node, at which depth, of what was drafted."""

    # Logits and gates of each slot, of a tree whose candidates are drawn as it is walked.
    slots: list[tuple[Tensor, Tensor | None]] | None = None
    tokens: list[int] = field(default_factory=list)  # of a tree's rows, and the rows below each
    children: list[list[int]] = field(default_factory=lambda: [[]])
    node: int = 0
    depth: int = 0

    def down(self, child: int) -> None:
        if self.slots is None:
            self.node = self.children[self.node][child]
        self.depth += 1


class _Drafter:
    """What every text's step has drafted; before the first there is nothing."""

    def __init__(
        self, head: SpecFormerHead, writer: _Writer, arm: Arm, temperature: float, seeds: Tensor
    ) -> None:
        self.head, self.writer, self.arm = head, writer, arm
        self.temperature, self.seeds = temperature, seeds
        self.walks = [_Walk() for _ in seeds]
        self.generator = torch.Generator().manual_seed(int(seeds[0]))

    def noise(self, row: int) -> KeyedNoise:
        """Keyed by the row's own position: no rule in use looks past what it emits."""
        return KeyedNoise(self.seeds[row], int(self.writer.positions[row]))

    def draft(self, texts: Sequence[int], emitted: Tensor) -> None:
        """A new step for some texts, anchored at the token before the one just emitted."""
        if not texts:
            return
        arm, writer, rows = self.arm, self.writer, torch.tensor(texts)
        slots = len(arm.widths) or min(arm.slots, arm.nodes)
        logits, gates = writer.draft(rows, emitted[rows], slots)
        if arm.widths:
            for place, row in enumerate(texts):
                gate = None if gates is None else gates[place]
                self.walks[row] = _Walk(list(slot_by_slot(logits[place], gate)))
            return
        heat = self.temperature if arm.rule == COUPLED else 0.0
        tree = draft_tree(
            self.head,
            logits,
            emitted[rows],
            arm.nodes,
            gates=gates,
            temperature=torch.full((len(rows),), heat),
            seeds=self.seeds[rows],
            positions=writer.positions[rows],
            chains=torch.full((len(rows),), arm.is_chain),
        )
        trees = zip(texts, tree.tokens.tolist(), tree.parents.tolist(), strict=True)
        for row, tokens, parents in trees:
            children: list[list[int]] = [[] for _ in tokens]
            for node in range(1, len(tokens)):
                if tokens[node] >= 0:
                    children[parents[node]].append(node)
            self.walks[row] = _Walk(None, tokens, children)

    def candidates(self, row: int) -> tuple[list[int], Tensor | None]:
        """The children of the node that a text is at; the logits [V] they were drawn from."""
        walk, widths = self.walks[row], self.arm.widths
        if walk.slots is None:
            return [walk.tokens[node] for node in walk.children[walk.node]], None
        if walk.depth == len(widths):
            return [], None
        own, gate = walk.slots[walk.depth]
        logits = own[None]
        if self.head.config.markov_rank:
            logits = logits + self.head.markov_logits(self.writer.previous[row : row + 1], gate)
        logits = self.head.over_vocabulary(logits, -math.inf)
        q, width = logits[0].double(), widths[walk.depth]
        if self.arm.rule == WITH:
            shares = torch.softmax(q / self.temperature, -1)
            drawn = torch.multinomial(shares, width, replacement=True, generator=self.generator)
            return drawn.tolist(), q
        found = sample_candidates(
            logits,
            width,
            temperature=torch.tensor([self.temperature]),
            seeds=self.seeds[row : row + 1],
            positions=self.writer.positions[row : row + 1],
        )
        return found.tokens[0].tolist(), q
