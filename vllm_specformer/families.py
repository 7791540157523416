"""Which families of models a head can be trained for and served with, as a recorded list.

`specformer families --record` makes the list from the installed vLLM and Transformers: it belongs
to their versions, which it names. An architecture that is not in it may be newer than both, so only
what is known not to work is refused; training and serving check the rest on the model itself.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from vllm_specformer.hooks import HandedOut

RECORD = Path(__file__).parent / "families.json"


@dataclass(frozen=True)
class Family:
    """One architecture of vLLM's registry.

    Attributes:
        served_by: vLLM's class, "module:Class" below `vllm.model_executor.models`.
        hands_out_states: whether that class can return auxiliary hidden states.
        wraps_transformers: whether it runs the Transformers code.
        first_state, last_state: whether it hands out states 0 and L on every platform, see
            `hooks.HandedOut`.
        model_type: of the language model Transformers has by this name, or None.
        obstacle: why its states cannot be hooked in training; empty if they can.
    """

    architecture: str
    served_by: str
    hands_out_states: bool
    wraps_transformers: bool
    first_state: bool
    last_state: bool
    model_type: str | None
    obstacle: str

    @property
    def handed_out(self) -> HandedOut:
        return HandedOut(self.first_state, self.last_state)

    @property
    def default_hooks(self) -> str:
        """The hooks that `specformer train` chooses, in terms of the number of layers L."""
        last = ("L-1", "L") if self.last_state else ("L-2", "L-1")
        return ", ".join(("0" if self.first_state else "1", "L/2", *last))

    @property
    def refusal(self) -> str:
        """Why there can be no head for it, or an empty string."""
        if not self.hands_out_states:
            return "vLLM's class cannot return hidden states (it lacks SupportsEagle3)"
        if self.model_type is None:
            return "Transformers has no language model of this name"
        return self.obstacle


@dataclass(frozen=True)
class Families:
    """The list, and the versions it was made from."""

    vllm: str
    transformers: str
    families: tuple[Family, ...]

    def find(self, architecture: str) -> Family | None:
        return next((f for f in self.families if f.architecture == architecture), None)

    def to_json(self) -> str:
        content = {
            "vllm": self.vllm,
            "transformers": self.transformers,
            "families": [asdict(family) for family in self.families],
        }
        return json.dumps(content, indent=1) + "\n"


@cache
def read_families(path: Path = RECORD) -> Families:
    """The recorded list."""
    content = json.loads(path.read_text(encoding="utf-8"))
    families = tuple(Family(**row) for row in content["families"])
    return Families(content["vllm"], content["transformers"], families)
