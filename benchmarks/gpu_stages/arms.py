"""The arms of stage d: methods, drafted tokens, and the acceptance lengths they are given."""

from __future__ import annotations

from dataclasses import dataclass

# The paper's mean tokens per step (arXiv 2511.20340, k from 4 to 8): given to every method alike.
EQUAL_LENGTH = 2.2
BASELINE, BASELINE_V1 = "none", "none-v1"


@dataclass(frozen=True)
class Arm:
    """One engine.

    Attributes:
        head: what `checkpoints.write_head` makes; None serves without speculation.
        length: tokens per step that verification is told to emit on average.
        on_v1: vLLM 0.32 has P-EAGLE on its V1 runner only, so it has a baseline of its own.
        source: of `length`, where it is the method's own.
    """

    name: str
    head: str | None
    num_tokens: int
    length: float = EQUAL_LENGTH
    on_v1: bool = False
    source: str = ""

    @property
    def baseline(self) -> str:
        return BASELINE_V1 if self.on_v1 else BASELINE


# A public repetition of DeepSpec's evaluation; heads of one origin, data and target.
_DEEPSPEC = "Qwen3-8B, MT-bench, DeepSpec's heads"

# What is worth most comes first: a session on a GPU may end before the last.
ARMS = (
    Arm(BASELINE, None, 0, 1.0),
    Arm("specformer-k4", "specformer", 4),
    Arm("eagle3-k4", "eagle3", 4),
    Arm("dflash-k4", "dflash", 4),
    Arm("dspark-k4", "dspark", 4),
    Arm("specformer-32k-k4", "specformer-32k", 4),
    Arm("specformer-k2", "specformer", 2),
    Arm("specformer-k8", "specformer", 8),
    Arm(BASELINE_V1, None, 0, 1.0, on_v1=True),
    Arm("peagle-k4", "peagle", 4, on_v1=True),
)
PUBLISHED = (
    Arm("eagle3-k7", "eagle3", 7, 2.67, source=_DEEPSPEC),
    Arm("dflash-k7", "dflash", 7, 3.11, source=_DEEPSPEC),
    Arm("dspark-k7", "dspark", 7, 3.72, source=_DEEPSPEC),
    Arm("peagle-k7", "peagle", 7, 3.70, on_v1=True, source="gpt-oss-20b, MT-bench, vLLM's blog"),
)
# The paper's own length is `EQUAL_LENGTH`, so SpecFormer's published row is one of `ARMS`.
# The bundled pair with its real drafts, which no synthetic acceptance can stand for in a tree.
PAIR, NODES = "pair", 16
TREES = (Arm(BASELINE, None, 0, 1.0), Arm("tree-n16", "tree", NODES))
PAIR_BATCHES, PAIR_CONTEXT = (1, 4, 16), 24
BATCHES = (1, 4, 16, 64, 128, 256)
CONTEXT = 1024
SHAPES = ("8b", "4b", "14b")


def find(name: str) -> Arm:
    return next(arm for arm in (*ARMS, *PUBLISHED, *TREES) if arm.name == name)
