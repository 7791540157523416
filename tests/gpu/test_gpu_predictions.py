"""The predictions: sizes, arithmetic by hand, and that the documentation has these very tables."""

from __future__ import annotations

import math

import pytest
from gpu_stages import predict
from gpu_stages.arms import ARMS, BATCHES, CONTEXT, find
from gpu_stages.prediction_tables import tables, tree_tables
from gpu_stages.shapes import OTHERS, TARGETS, TOY

from support.paths import ROOT
from vllm_specformer.planning.choose import MARGIN
from vllm_specformer.shapes import TargetShape

PAGE = ROOT / "docs" / "gpu-predictions.md"
QWEN3_8B = TargetShape.from_config(TARGETS["8b"].config())


@pytest.mark.parametrize(("name", "billions"), [("4b", 4.0), ("8b", 8.2), ("14b", 14.8)])
def test_targets_have_the_published_sizes(name: str, billions: float) -> None:
    shape = TARGETS[name]
    sizes = TargetShape.from_config(shape.config())
    embedding = 0 if shape.tied else shape.vocab_size * shape.hidden_size
    assert (sizes.parameters + embedding) / 1e9 == pytest.approx(billions, abs=0.06)


# DSpark's published file of 2.37e9 also holds the target's embedding and lm_head, 1.24e9.
@pytest.mark.parametrize(
    ("head", "billions"), [("eagle3", 0.40), ("peagle", 0.98), ("dflash", 1.05), ("dspark", 1.13)]
)
def test_heads_have_the_sizes_of_published_ones(head: str, billions: float) -> None:
    tensors = OTHERS[head](TARGETS["8b"]).tensors
    assert sum(map(math.prod, tensors.values())) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("shape", [*TARGETS.values(), TOY], ids=lambda shape: shape.name)
def test_hooks_are_different_layers_of_the_target(shape: object) -> None:
    for number in (3, 5):
        hooks = shape.hooks(number)  # type: ignore[attr-defined]
        assert len(set(hooks)) == number
        assert 0 < min(hooks) < max(hooks) < shape.num_layers  # type: ignore[attr-defined]


def test_a_step_of_the_target_by_hand() -> None:
    """At batch 1 everything is moving bytes: the weights, one context, little else."""
    weights = 2 * QWEN3_8B.parameters
    context = 36 * 2 * CONTEXT * 8 * 128 * 2
    launches = (36 * 10 + 8) * 2e-6
    by_hand = 1e3 * ((weights + context) / 4.3e12 + launches)
    assert predict.predict("8b", ARMS[0], 1).plain == pytest.approx(by_hand, rel=0.005)


def test_verification_of_many_rows_by_hand() -> None:
    """At 128 requests of five rows the products are arithmetic, the attention is bytes."""
    rows = 128 * 5
    products = 2 * QWEN3_8B.parameters * rows / 770e12
    attention = 128 * 36 * 2 * CONTEXT * 8 * 128 * 2 / 4.3e12
    sampling = rows * 151_936 * 10 / 4.3e12
    by_hand = 1e3 * (products + attention + sampling + (36 * 10 + 8) * 2e-6)
    found = predict.predict("8b", find("specformer-k4"), 128)
    assert found.verify == pytest.approx(by_hand, rel=0.01)
    # So no draft, however cheap, keeps θ below 1.08 there.
    assert found.verify / found.plain > 1.9


def test_a_draft_by_hand() -> None:
    """SpecFormer at batch 1 with four drafts: its own weights, half the slots, the lm_head.

    And the Markov term of three slots: a table of rank 64, and the gates.
    """
    size, inner = 4096, 12_288
    attention = 2 * size * 4096 + 2 * size * 1024
    head = 4 * size * size + 2 * attention + (1 + 4) * size * size + 3 * size * inner
    markov = 3 * 64 * 151_936 + 64 * size
    moved = 2 * (head + markov + size * 151_936) + 2 * 2 * CONTEXT * 2 * 1024
    launches = predict.STAGE_LAUNCHES + predict.DRAFT_LAUNCHES
    launches += predict.GATE_LAUNCHES + 3 * predict.SLOT_LAUNCHES
    by_hand = 1e3 * (moved / 4.3e12 + launches * 2e-6)
    assert predict.predict("8b", find("specformer-k4"), 1).draft == pytest.approx(by_hand, rel=0.01)


def test_every_row_of_stage_d_is_predicted() -> None:
    found = predict.rows()
    assert len({(r["shape"], r["arm"], r["batch"]) for r in found}) == len(found)
    assert len(found) == (3 * len(ARMS) + 4) * len(BATCHES)
    assert all(row["ratio"] == 1 for row in found if row["arm"].startswith("none"))
    assert all(row["theta"] > 1 for row in found if not row["arm"].startswith("none"))


def test_trees_shrink_to_chains_as_batches_grow() -> None:
    for chip in predict.TREE_CHIPS:
        for temperature in predict.TREE_GAINS:
            found = [predict.predict_trees(chip, temperature, batch) for batch in BATCHES]
            pairs = [t.best(b, MARGIN) for t, b in zip(found, BATCHES, strict=True)]
            nodes = [tree.count for _, tree in pairs]
            assert nodes[0] == 63
            assert nodes == sorted(nodes, reverse=True)
            gains = [tree.ratio / chain.ratio for chain, tree in pairs]
            assert gains[0] > 1.3
            assert max(gains[3:]) < 1.1


def test_the_documentation_has_these_tables() -> None:
    text = PAGE.read_text()
    for part in (tables(), tree_tables()):
        assert part in text, (
            "docs/gpu-predictions.md differs from `python benchmarks/gpu.py --predictions`; "
            "copy its output"
        )
