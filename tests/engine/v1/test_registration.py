"""Where SpecFormer is chosen, and only there, an unsupported or changed vLLM is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from support.configs import asking, configured
from support.paths import HEAD, TARGET
from vllm_specformer.engine.compat import versions as compat
from vllm_specformer.engine.compat.versions import ALLOW_UNTESTED, IncompatibleVLLMError
from vllm_specformer.engine.patches import ledger
from vllm_specformer.plugin import register


@pytest.fixture(autouse=True)
def registered() -> None:
    """vLLM loads plugins once per process: not first with a version that a test shows it."""
    load_general_plugins()


def test_unsupported_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused where somebody asks for SpecFormer, and nowhere else."""
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    monkeypatch.setattr("vllm.version.__version__", "0.11.2")
    register()
    assert EngineArgs(model=str(TARGET), max_model_len=128).create_engine_config()
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    assert configured(ngram).speculative_config.method == "ngram"
    message = r"does not support vLLM 0\.11\.2; tested are 0\.32\.x.*pip install"
    for asked in (asking(HEAD), {"model": str(HEAD)}, {"method": "specformer"}):
        with pytest.raises(IncompatibleVLLMError, match=message):
            configured(asked)


def test_other_users_of_an_unsupported_vllm_keep_it_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    applied: list[Sequence[str]] = []
    monkeypatch.setattr(ledger, "apply", applied.append)
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    register()
    monkeypatch.setattr("vllm.version.__version__", "0.34.0")
    register()
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    register()
    assert applied == [ledger.SUBJECTS, ledger.ON_ANY_VERSION, ledger.SUBJECTS]


def test_changed_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch release that nobody has recorded is looked at, once, when SpecFormer is chosen."""
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    looked = []

    def missing(root: Path) -> list[str]:
        looked.append(root)
        return ["vllm.x:y: not found in this vLLM (needed by us: reason)"]

    compat._missing_installed.cache_clear()
    monkeypatch.setattr(compat, "missing", missing)
    configured(asking(HEAD))  # the installed version is recorded
    monkeypatch.setattr("vllm.version.__version__", "0.33.7")
    assert EngineArgs(model=str(TARGET), max_model_len=128).create_engine_config()
    assert not looked
    message = (
        r"vLLM 0\.33\.7 has changed what .*: vllm\.x:y: not found .*pip install 'vllm==0\.33\.0'"
    )
    for _ in range(2):
        with pytest.raises(IncompatibleVLLMError, match=message):
            configured(asking(HEAD))
    assert len(looked) == 1
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    assert configured(asking(HEAD)).speculative_config.method == "dflash"
    compat._missing_installed.cache_clear()


def test_patches_are_checked_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_specformer.engine import proposer_v1
    from vllm_specformer.engine.patches.ledger import LEDGER

    monkeypatch.setattr(LEDGER, "problems", lambda: ["vllm.x:y: not found", "vllm.x:z: not found"])
    message = r"relies on: vllm\.x:y: not found and 1 more \(`specformer doctor` lists them\)"
    with pytest.raises(IncompatibleVLLMError, match=message):
        proposer_v1.SpecFormerProposer.__init__(
            object.__new__(proposer_v1.SpecFormerProposer), SimpleNamespace(), torch.device("cpu")
        )
    with pytest.raises(IncompatibleVLLMError, match=message):
        configured(asking(HEAD))
