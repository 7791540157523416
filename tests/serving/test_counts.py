"""What a server has counted about its drafts, read from pages of /metrics."""

from __future__ import annotations

import pytest

from vllm_specformer.serving.counts import DraftCounts, parse_draft_counts

METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 100.0
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.79e+09
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 200.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 130.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 50.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 80.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
"""


def test_draft_counts_of_a_metrics_page() -> None:
    counts = parse_draft_counts(METRICS)
    assert counts == DraftCounts(drafts=100, drafted=200, accepted=130, accepted_at=(80, 50))
    assert counts.tokens_per_step == pytest.approx(2.3)
    assert counts.acceptance_per_position == pytest.approx([0.8, 0.5])


def test_draft_time_where_a_server_counts_it() -> None:
    page = """\
# TYPE specformer:draft_seconds_total counter
specformer:draft_seconds_total{engine="0"} 1.5
specformer:draft_seconds_total{engine="1"} 0.5
# TYPE specformer:draft_steps_total counter
specformer:draft_steps_total{engine="0"} 30.0
specformer:draft_steps_total{engine="1"} 10.0
"""
    counts = parse_draft_counts(METRICS + page)
    assert (counts.draft_seconds, counts.draft_steps) == (2.0, 40)
    assert parse_draft_counts(METRICS).draft_seconds is None
    since = counts - parse_draft_counts(page)
    assert (since.draft_seconds, since.draft_steps) == (0.0, 0)


def test_draft_counts_without_speculation() -> None:
    counts = parse_draft_counts("# TYPE vllm:num_requests_running gauge\n")
    assert counts == DraftCounts()
    assert counts.tokens_per_step == 1.0


def test_draft_counts_since_an_earlier_page() -> None:
    now = parse_draft_counts(METRICS)
    assert now - DraftCounts() == now
    since = now - DraftCounts(40, 80, 50, (30, 20))
    assert since == DraftCounts(60, 120, 80, (50, 30))
