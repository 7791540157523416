"""Which of a target's hidden states can be hooked, and which are by default."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_specformer.config import paper_hooks


@dataclass(frozen=True)
class HandedOut:
    """The ends of what vLLM's class for a target hands out; all states between them it does.

    Attributes:
        first: whether state 0, the embedding, is handed out.
        last: whether state L, after the last layer, is.
    """

    first: bool
    last: bool

    def default_hooks(self, num_layers: int) -> tuple[int, ...]:
        """The paper's hooks, moved inwards where an end is not handed out.

        Raises:
            HeadConfigError: for fewer than four layers.
        """
        _, middle, *_ = paper_hooks(num_layers)
        last = num_layers if self.last else num_layers - 1
        return tuple(sorted({0 if self.first else 1, middle, last - 1, last}))

    def lacking(self, hooks: Iterable[int], num_layers: int) -> tuple[int, ...]:
        """Those of `hooks` that are not handed out."""
        present = {0: self.first, num_layers: self.last}
        return tuple(hook for hook in hooks if not present.get(hook, True))

    def refusal(self, hooks: Iterable[int], num_layers: int) -> str:
        """Why `hooks` cannot be had and which can, for a message; empty if they can."""
        lacking = self.lacking(hooks, num_layers)
        if not lacking:
            return ""
        instead = ",".join(map(str, self.default_hooks(num_layers)))
        states = " and ".join(map(str, lacking))
        return f"hands out no hidden state {states}; train a head with --hooks {instead}"
