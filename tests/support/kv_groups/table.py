"""How many KV-cache groups vLLM makes of a target's layers, alone and with a head's beside them.

    make kv-groups        # (in tests/) python -m support.kv_groups.table

Writes benchmarks/results/kv-groups.csv and the table of docs/kv-groups.md. vLLM's own functions
make the specs, choose the layout, group the layers and lay their pages out; given are the shapes
that the models were published with, and a head of the shape that `specformer train` gives it. No
weights, no GPU.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm.v1.core import kv_cache_utils

from support.kv_groups.settings import BACKENDS, BFLOAT16, Setting
from support.kv_groups.targets import TARGETS, Target
from vllm_specformer.engine.head_pages import HeadShape
from vllm_specformer.engine.patches import ledger
from vllm_specformer.errors import SpecFormerError

ROOT = Path(__file__).resolve().parents[3]
RESULT = ROOT / "benchmarks" / "results" / "kv-groups.csv"
DOCUMENT = ROOT / "docs" / "kv-groups.md"
COLUMNS = ["target", "kv_dtype", "backend", "tp", "groups_alone", "groups_with_head", "refused"]
BEGIN, END = "<!-- table: make kv-groups -->", "<!-- end of the table -->"
NUM_DRAFTS = 4


def row(target: Target, kv_dtype: str, backend: str, tp: int) -> dict[str, Any]:
    """One row of the table."""
    alone = Setting(target, kv_dtype, backend, tp, drafts=0)
    found: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    found |= {"target": target.name, "kv_dtype": kv_dtype, "backend": backend, "tp": tp}
    found["groups_alone"] = len(alone.groups({}))
    drafting = Setting(target, kv_dtype, backend, tp, NUM_DRAFTS)
    kv_heads, head_size = target.head
    shape = HeadShape(max(1, kv_heads // tp), head_size, BFLOAT16)
    try:
        specs = drafting.head_specs(shape)
        groups = drafting.groups(specs)
        drafting.check_pages(groups, list(specs), shape)
    except (SpecFormerError, ValueError) as error:
        return found | {"refused": str(error)}
    return found | {"groups_with_head": len(groups)}


def rows(targets: tuple[Target, ...] = TARGETS) -> Iterator[dict[str, Any]]:
    ledger.apply(["kv_groups"])
    kv_cache_utils.logger.setLevel(logging.ERROR)  # its remarks on padding
    for target in targets:
        for kv_dtype in ("bf16", "fp8"):
            for backend in BACKENDS:
                for tp in (1, 8):
                    yield row(target, kv_dtype, backend, tp)


def as_csv(table: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def as_document(table: list[dict[str, Any]]) -> str:
    """A line for all backends and ranks of a target where they agree."""
    lines = ["| target | KV cache | where | alone | with the head |", "|---|---|---|---|---|"]
    by_result: dict[tuple[Any, ...], list[str]] = {}
    for found in table:
        result = found["groups_alone"], found["groups_with_head"] or "refused"
        where = f"{found['backend']} on {found['tp']}"
        by_result.setdefault((found["target"], found["kv_dtype"], *result), []).append(where)
    for (target, kv_dtype, alone, together), places in by_result.items():
        where = "everywhere" if len(places) == 2 * len(BACKENDS) else ", ".join(places)
        if together != "refused" and len(places) == 2 * len(BACKENDS) - 1:
            where = "everywhere else"
        lines.append(f"| {target} | {kv_dtype} | {where} | {alone} | {together} |")
    return "\n".join(lines)


def main() -> None:
    table = list(rows())
    RESULT.write_text(as_csv(table))
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{as_document(table)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
