"""Synthetic acceptance on V2, which a benchmark of drafting costs stands on."""

from __future__ import annotations

from support import synthetic
from support.v2.engines import TEXTS, engine


def test_served() -> None:
    with engine(synthetic.SPECULATIVE) as llm:
        synthetic.assert_as_asked(*synthetic.kept_per_position(llm, TEXTS[:8], 24))
