"""How many nodes a tree gets at each batch size, from costs on paper and from measured ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.configs import asking, configured
from support.paths import HEAD
from vllm_specformer.candidates import BEAM
from vllm_specformer.engine.speculative_config import SCHEDULE, split_own_fields
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.planning.acceptance import trees_of_evaluation
from vllm_specformer.planning.chips import CHIPS
from vllm_specformer.planning.choose import PlanRow, combine
from vllm_specformer.planning.paper import rows_on_paper
from vllm_specformer.planning.plan_file import Plan, read_plan
from vllm_specformer.planning.report import print_plan
from vllm_specformer.planning.trees import Trees, costs_by_rows, trees_of
from vllm_specformer.shapes import HeadShape, TargetShape

QWEN3_8B = TargetShape(36, 4096, 32, 8, 128, 12288, 151936)
CHAINS = {0: 1.0, 2: 2.5, 4: 3.2, 8: 3.6}
NODES = {8: 4.0, 16: 4.6, 63: 5.3}
BATCHES = (1, 4, 16, 64)


def verified(rows: int) -> float:
    """Seconds of a machine on which 128 rows are free, and every further one costs."""
    return 10.0 + 0.1 * max(0, rows - 128)


def chains(batches: tuple[int, ...] = BATCHES, draft: float = 1.0) -> list[PlanRow]:
    plain = {batch: verified(batch) for batch in batches}
    drafts = {(b, k): draft if k else 0.25 for b in batches for k in CHAINS}
    steps = {(b, k): verified(b * (k + 1)) + cost for (b, k), cost in drafts.items()}
    return combine(plain, steps, drafts, CHAINS)


def trees() -> Trees:
    return Trees(0.0, chains(), costs_by_rows(chains(), CHAINS | NODES))


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    def group(temperature: float, lower: float) -> dict[str, Any]:
        counts = {
            f"K={k}": {"tokens_per_step": gain - lower, "acceptance_per_position": []}
            for k, gain in CHAINS.items()
            if k
        }
        nodes = {f"n={n}": {"tokens_per_step": gain - lower} for n, gain in NODES.items()}
        return {
            "temperature": temperature,
            "all": {"head": counts},
            "trees": {"chain K=8": {"tokens_per_step": 3.0}} | nodes,
        }

    path = tmp_path / "eval.json"
    offline = {"greedy": group(0.0, 0.0), "temperature_1": group(1.0, 1.4)}
    path.write_text(json.dumps({"offline": offline}))
    return path


def test_nodes_of_an_evaluation(evaluation: Path) -> None:
    found = trees_of_evaluation(evaluation)
    assert found[0.0] == NODES
    assert found[1.0] == {n: pytest.approx(gain - 1.4) for n, gain in NODES.items()}
    content = json.loads(evaluation.read_bytes())
    for group in content["offline"].values():
        del group["trees"]
    evaluation.write_text(json.dumps(content))
    assert trees_of_evaluation(evaluation) == {}
    evaluation.write_text("{}")
    with pytest.raises(SpecFormerError, match="not what `specformer eval --json` writes"):
        trees_of_evaluation(evaluation)


def test_a_measured_step_costs_by_the_rows_it_verifies() -> None:
    found = {(row.batch, row.count): row for row in costs_by_rows(chains(), CHAINS | NODES)}
    own = {(row.batch, row.count): row for row in chains()}
    # Measured as they are.
    assert found[4, 4] == own[4, 4]
    assert found[4, 8] == replace(own[4, 8], tokens_per_step=4.0)
    # 4 x 17 rows are free, as the 64 and 80 of 16 requests that were measured are.
    assert found[4, 16].step == pytest.approx(10.0 + 1.0)
    assert (found[4, 16].draft, found[4, 16].plain) == (1.0, 10.0)
    # 16 x 17 rows lie between the measured 192 and 320.
    assert found[16, 16].step == pytest.approx(verified(272) + 1.0)
    # 64 x 64 rows are beyond the 576 of 64 requests with 8 drafts: as from 320 to 576.
    assert found[64, 63].step == pytest.approx(verified(4096) + 1.0)
    assert {count for _, count in found} == set(CHAINS | NODES)


def test_trees_shrink_to_chains_as_batches_grow() -> None:
    found = trees()
    best = {batch: [row.count for row in found.best(batch, 0.02)] for batch in BATCHES}
    assert best[1] == [8, 63]
    assert best[16][1] == 8
    assert best[64][1] <= 4
    nodes = [tree for _, tree in best.values()]
    assert nodes == sorted(nodes, reverse=True)
    # Budget as in "n = rows nearly free / batch - 1": 128 rows and some.
    assert all(1 <= batch * (n + 1) <= 2 * 128 for batch, n in zip((1, 4, 16), nodes, strict=False))
    assert found.pays_at(1, 0.02)
    assert not found.pays_at(64, 0.02)
    assert found.pays(0.02)


def test_a_ready_config() -> None:
    plan = Plan.of(chains(), {}, 0.02, [trees()])
    config = plan.tree_config("HEAD")
    assert config is not None
    ranges = config["tree_nodes_per_batch_size"]
    assert config["tree_nodes"] == max(nodes for _, _, nodes in ranges) == 63
    assert (ranges[0][0], ranges[-1][1]) == (1, 64)
    assert split_own_fields(config)[1].tree_schedule == tuple(map(tuple, ranges))
    # vLLM's own config takes it.
    fields = {name: config[name] for name in config if name.startswith("tree")}
    engine = configured(asking(HEAD, None) | fields).speculative_config
    assert [list(entry) for entry in getattr(engine, SCHEDULE)] == ranges


def test_trees_that_bring_no_more_than_chains(capsys: pytest.CaptureFixture[str]) -> None:
    same = Trees(0.0, chains(), costs_by_rows(chains(), CHAINS | {16: 3.6}))
    plan = Plan.of(chains(), {}, 0.02, [same])
    assert plan.tree_config("HEAD") is None
    assert plan.to_json("HEAD")["tree_config"] is None
    print_plan(plan, "HEAD")
    assert "Trees gain no more than chains at any of these" in capsys.readouterr().out
    assert Plan.of(chains(), {}, 0.02).tree_config("HEAD") is None


def test_a_plan_with_trees_survives_its_file(tmp_path: Path) -> None:
    plan = Plan.of(chains(), {"costs": "made up"}, 0.03, [trees(), replace(trees(), temperature=1)])
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json("HEAD")))
    assert read_plan(path) == plan
    assert json.loads(path.read_bytes())["tree_config"] == plan.tree_config("HEAD")


def test_chains_stand_beside_trees(evaluation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = trees_of(evaluation, 1.0, chains(), lambda gains: costs_by_rows(chains(), gains))
    assert [each.temperature for each in found] == [1.0, 0.0]  # that of the plan first
    sampled, greedy = found
    assert {row.count: row.tokens_per_step for row in sampled.chains}[8] == pytest.approx(2.2)
    # As many nodes as a chain has drafts count as the chain, unless they were evaluated.
    by_nodes = {row.count: row.tokens_per_step for row in greedy.rows}
    assert by_nodes == CHAINS | NODES
    print_plan(Plan.of(chains(), {}, 0.02, found), "HEAD")
    printed = capsys.readouterr().out
    assert "tree, temperature 1" in printed
    line = printed.partition("on the V2 runner\n--speculative-config '")[2].partition("'")[0]
    assert json.loads(line) == sampled.config("HEAD", 0.02)


def test_on_paper_trees_pay_where_rows_are_free() -> None:
    """TREES.md, section 4: an H200 verifies about 180 rows in the time it reads the weights."""
    head = replace(HeadShape.default_for(QWEN3_8B), markov_rank=64)
    costs: dict[str, Any] = {"context": 1024}
    batches = (1, 4, 16, 64, 256)
    chip = CHIPS["h200"].derated(0.9, 0.8)
    beside = rows_on_paper(chip, QWEN3_8B, head, batches, CHAINS, **costs)
    rows = rows_on_paper(chip, QWEN3_8B, head, batches, CHAINS | NODES, beam=BEAM, **costs)
    found = Trees(0.0, beside, rows)
    nodes = [found.best(batch, 0.02)[1].count for batch in batches]
    assert nodes[0] == 63
    assert nodes == sorted(nodes, reverse=True)
    assert nodes[2] in (8, 16)
    assert nodes[3] <= 4
    assert not found.pays_at(64, 0.02)
    chain, tree = found.best(1, 0.02)
    assert 1.3 < tree.ratio / chain.ratio < NODES[63] / CHAINS[8]
    # Depth is bounded by the slots, verified rows are not.
    at = {row.count: row for row in rows if row.batch == 16}
    assert at[63].step - at[63].draft > 2 * (at[8].step - at[8].draft)
    assert at[8].draft < at[16].draft < 1.5 * at[8].draft
    chain_of_8 = next(row for row in beside if (row.batch, row.count) == (16, 8))
    assert at[8].draft > chain_of_8.draft  # a beam's logits instead of one row's
