"""From stored units to ratios, θ and the aims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gpu_stages.report import aims, print_report, throughput_rows
from gpu_stages.store import Store


def unit(*rows: tuple[int, float, float, float]) -> dict[str, Any]:
    """Rows of batch, step and draft in milliseconds, tokens per step."""
    return {
        "weights_gib": 15.5,
        "rows": [
            {
                "batch": batch,
                "step_ms": step,
                "draft_ms": draft,
                "tokens_per_step": tokens,
                "tokens_per_second": 1e3 * batch * tokens / step,
            }
            for batch, step, draft, tokens in rows
        ],
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    store.add("d", "8b specformer-k4", unit((1, 4.2, 0.3, 2.1), (64, 9.0, 1.0, 2.2)))
    store.add("d", "8b eagle3-k4", unit((64, 9.5, 1.5, 2.2)))
    store.add("d", "8b none", unit((1, 4.0, 0.0, 1.0), (64, 6.0, 0.0, 1.0)))
    store.add("d", "8b dflash-k4", {"failure": "exit code 1"})
    store.add("d", "8b peagle-k4", unit((1, 4.2, 0.3, 2.1)))
    return store


def test_ratio_and_theta(store: Store) -> None:
    rows = {(row["arm"], row["batch"]): row for row in throughput_rows(store)}
    ours = rows["specformer-k4", 1]
    assert ours["ratio"] == pytest.approx(2.1 * 4.0 / 4.2)
    assert ours["theta"] == pytest.approx(4.2 / 4.0)
    assert ours["predicted"]["theta"] > 1
    assert rows["none", 64]["theta"] == pytest.approx(1)
    # Its baseline is V1's, which is not there.
    assert "theta" not in rows["peagle-k4", 1]
    assert ("dflash-k4", 1) not in rows


def test_aims(store: Store) -> None:
    assert list(aims(throughput_rows(store))) == [
        "d  batch 1: met: θ - 1 is 5%, to be at most 8%",
        "d  batch 64: missed: θ - 1 is 50%, to be at most 8%",
        "d  batch 64: met: draft of 1.00 ms against 1.50 of eagle3-k4, the cheapest other one",
    ]


def test_the_table(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    none = {"greedy": ["1 2", "3 4"], "greedy in groups": ["1 2", "3 5"], "seeded": ["6", "7"]}
    drawn = none | {"seeded": ["6", "8"]}
    counters = {"drafts": 10, "accepted_tokens": 12}
    store.add("c", "none, graphs", {"answers": none, "counters": {}})
    store.add("c", "coupled, graphs", {"answers": drawn, "counters": counters, "dense": {}})
    for name, answers in (("none", none), ("tree", drawn)):
        unit_c = {"answers": answers, "counters": counters, "dense": {}}
        store.add("c", f"{name}, eager in bfloat16", unit_c)
    store.add("d", "pair none", unit((1, 1.0, 0.0, 1.0)))
    store.add("d", "pair tree-n16", unit((1, 1.2, 0.1, 4.0)))
    dense = {"compared": 90, "wrong": ["position 7, slot 2"], "ties": 3}
    ours = {"answers": none, "counters": counters, "dense": dense, "draft_graphs": [1, 16]}
    store.add("c", "specformer, graphs", ours)
    figures = {"launches": 40, "host_launches": 27, "span": 500, "gaps": 30, "share": 0.11}
    row = {"batch": 64, "bytes_per_second": 2.5e12, "drafts": 6, **figures}
    store.add("e", "8b draft step", {"rows": [row]})
    print_report(store, dry=False)
    out = capsys.readouterr().out
    assert "d, 8b dflash-k4: FAILED: exit code 1" in out
    assert "c  graphs: batching alone: 1 of 2 same" in out
    told = "graphs of [1, 16] requests; of 90 drafts 1 are not the dense head's, 3 ties"
    assert f"c  graphs: {told}" in out
    assert "coupled: greedy 2 of 2 same, seeded 1 of 2 same, 2.20 tokens per step" in out
    assert "c  eager in bfloat16: tree: greedy 2 of 2 same, seeded 1 of 2 same, 2.20" in out
    assert "tree-n16" in out
    assert "40 kernels from 27 calls, 500 us of which 30 us gaps, 11% of the step" in out
    lines = [line.replace("│", " ").split() for line in out.splitlines() if "│" in line]
    assert ["none:", "step", "ms", "4.00", "6.00"] in lines
    measured = lines.index(["specformer-k4", "0.30", "1.05", "2.00", "1.00", "1.50", "1.47"])
    assert lines[measured + 1][0] == "predicted"
    assert len(lines[measured + 1]) == 7
    pair = {r["arm"]: r for r in throughput_rows(store) if r["shape"] == "pair"}
    assert pair["tree-n16"]["theta"] == pytest.approx(1.2)
    assert json.loads((store.folder / "summary.json").read_text()) == throughput_rows(store)
