"""Two ranks draft what one drafts: the target sharded, over CPU processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.engines import drafting
from support.heads import make_head
from support.paths import HEAD, PROMPTS, ROOT, TARGET

pytestmark = pytest.mark.slow

# Spawned workers import the script anew, hence the guard.
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    options, prompts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    llm = LLM(dtype="float32", kv_cache_memory_bytes=64 << 20, max_model_len=256, max_num_seqs=8,
              enforce_eager=True, worker_extension_cls="support.rank_drafts.RankDrafts", **options)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    print("RESULT", json.dumps([tokens, llm.collective_rpc("drafted")]))

if __name__ == "__main__":
    main()
"""


def run(
    tmp_path: Path, head: Path, ranks: int, **speculative: Any
) -> tuple[list[list[int]], list[Any]]:
    """Answers, and what each rank drafted."""
    script = tmp_path / "engine.py"
    script.write_text(SCRIPT)
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[:8]]
    options = {
        "model": str(TARGET),
        "tensor_parallel_size": ranks,
        "speculative_config": drafting(4, head, **speculative),
    }
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(options), json.dumps(prompts)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    answers, drafted = json.loads(lines[0].removeprefix("RESULT "))
    assert len(drafted) == ranks
    return answers, drafted


def assert_ranks_agree(tmp_path: Path, head: Path, **speculative: Any) -> None:
    alone, (drafted,) = run(tmp_path, head, 1)
    together, ranks = run(tmp_path, head, 2, **speculative)
    assert together == alone
    assert len(drafted) > 10
    assert ranks == [drafted, drafted]


def test_equal_drafts(tmp_path: Path) -> None:
    assert_ranks_agree(tmp_path, HEAD)


def test_a_head_that_is_not_sharded(tmp_path: Path) -> None:
    assert_ranks_agree(tmp_path, HEAD, draft_tensor_parallel_size=1)


def test_two_layers_one_kv_head_and_a_draft_vocabulary(tmp_path: Path) -> None:
    """Both ranks hold the K/V head; the head's tokens are taken from the gathered logits."""
    changes = {"num_key_value_heads": 1, "num_slot_layers": 2, "draft_vocab_size": 700}
    changes |= {"markov_gate": True}
    head = make_head(tmp_path / "head", "default", num_draft_slots=6, markov_rank=8, **changes)
    assert_ranks_agree(tmp_path, head)


def test_shapes_that_do_not_divide(tmp_path: Path) -> None:
    head = make_head(tmp_path / "head", "default", num_draft_slots=4, intermediate_size=511)
    assert_ranks_agree(tmp_path, head)
