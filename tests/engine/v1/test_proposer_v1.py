"""What V1's proposer does by itself, before it drafts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


def test_class_is_judged_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proposer is built before the target's weights are read, so its check comes in time."""
    from vllm_specformer.engine import proposer_v1

    config = SimpleNamespace(model_config="the target's")
    monkeypatch.setattr(
        proposer_v1,
        "check_target_class",
        lambda c: (_ for _ in ()).throw(LookupError(c.model_config)),
    )
    with pytest.raises(LookupError, match="the target's"):
        proposer_v1.SpecFormerProposer.__init__(
            object.__new__(proposer_v1.SpecFormerProposer), config, torch.device("cpu")
        )
