"""The compatibility layer against two recorded vLLM versions and the installed one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_specformer.engine.compat import versions as compat
from vllm_specformer.engine.compat.versions import (
    ALLOW_UNTESTED,
    RECORDED,
    RELIED_ON,
    SUPPORTED,
    IncompatibleVLLMError,
    Signature,
    check_chosen,
    check_version,
    evaluate,
    installed_vllm,
    is_allowed,
    missing,
    probe,
    read_snapshot,
    vllm_root,
    write_snapshot,
)

SNAPSHOTS = Path(__file__).parents[1] / "snapshots"
PROPOSE = "vllm.v1.worker.gpu.spec_decode.dflash.speculator:DFlashSpeculator.propose"
SAMPLE = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.sample_draft"
MAX_LEN = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.max_model_len"
MANAGER = (
    "vllm.v1.worker.gpu.spec_decode.adaptive_verification:AdaptiveVerificationManager.__init__"
)
METHOD = "vllm.config.speculative:SpeculativeMethod"
CREATE = "vllm.engine.arg_utils:EngineArgs.create_speculative_config"
APPLY = "vllm.v1.sample.sampler:Sampler.apply_logits_processors"
DFLASH = "vllm.v1.spec_decode.dflash:DFlashProposer"


def snapshot(version: str) -> dict[str, Signature]:
    return read_snapshot(SNAPSHOTS / f"vllm-{version}.json")[1]


@pytest.fixture(params=RECORDED)
def recorded(request: pytest.FixtureRequest) -> dict[str, Signature]:
    return snapshot(request.param)


def test_installed_vllm_equals_its_snapshot() -> None:
    _, version = installed_vllm()
    path = SNAPSHOTS / f"vllm-{version.partition('+')[0]}.json"
    assert path.is_file(), (
        f"vLLM {version} is installed but has no snapshot; record one with "
        "`python -m vllm_specformer.engine.compat.versions --record "
        f"tests/engine/snapshots/{path.name}`"
    )
    found = probe(vllm_root())
    assert found == read_snapshot(path)[1]
    assert missing(vllm_root()) == []


def test_every_supported_minor_version_has_a_snapshot() -> None:
    assert [tuple(map(int, v.split(".")[:2])) for v in RECORDED] == list(SUPPORTED)
    assert [read_snapshot(SNAPSHOTS / f"vllm-{v}.json")[0] for v in RECORDED] == list(RECORDED)


def test_recorded_versions_have_all_we_rely_on(recorded: dict[str, Signature]) -> None:
    assert evaluate(recorded) == []
    places = [{reliance.symbol, reliance.later} & recorded.keys() for reliance in RELIED_ON]
    assert all(len(found) == 1 for found in places)
    assert len(recorded) == len(RELIED_ON)


def test_no_symbol_is_listed_twice() -> None:
    symbols = [reliance.symbol for reliance in RELIED_ON]
    assert len(set(symbols)) == len(symbols)


def test_differences_between_the_versions_are_the_known_ones() -> None:
    old, new = snapshot("0.32.0"), snapshot("0.33.0")
    assert old.keys() - new.keys() == {"vllm.v1.core.kv_cache_utils:get_kv_cache_groups"}
    assert new.keys() - old.keys() == {"vllm.v1.core.kv_cache_planning:get_kv_cache_groups"}
    assert {name for name in old if name in new and old[name] != new[name]} == {
        SAMPLE,
        MAX_LEN,
        METHOD,
        MANAGER,
        "vllm.v1.worker.gpu.dp_utils:dispatch_cg_and_sync_dp",
    }
    # For batch-sharded sampling, which a threshold refuses.
    added = set(new[MANAGER].parameters) - set(old[MANAGER].parameters)
    assert added == {"copy_admitted_drafts_to_host="}
    assert set(new[SAMPLE].parameters) - set(old[SAMPLE].parameters) == {"num_steps="}
    assert (old[MAX_LEN].where, new[MAX_LEN].where) == ("__init__", "property")


@pytest.mark.parametrize("reliance", RELIED_ON, ids=lambda r: r.symbol.rpartition(":")[2])
def test_any_removed_symbol_is_reported_by_name(reliance: compat.Reliance) -> None:
    found = snapshot("0.33.0")
    del found[reliance.later or reliance.symbol]
    (line,) = evaluate(found)
    assert line.startswith(f"{reliance.symbol}: not found")
    assert reliance.needed_by in line
    assert reliance.reason in line


def changed(symbol: str, **fields: object) -> list[str]:
    found = snapshot("0.33.0")
    found[symbol] = replace(found[symbol], **fields)  # type: ignore[arg-type]
    return evaluate(found)


def parameters_of(symbol: str) -> tuple[str, ...]:
    return snapshot("0.33.0")[symbol].parameters


def test_renamed_parameter_is_reported_with_the_new_signature() -> None:
    renamed = tuple(p.replace("num_rejected", "rejects") for p in parameters_of(PROPOSE))
    lines = changed(PROPOSE, parameters=renamed)
    assert any("'num_rejected' is gone or renamed" in line and "rejects" in line for line in lines)
    assert any("new required parameter 'rejects'" in line for line in lines)
    assert all("engine/speculator_v2.py" in line for line in lines)


@pytest.mark.parametrize(
    ("added", "reported"),
    [("extra", True), ("extra=", False), ("*, extra", True), ("*, extra=", False)],
)
@pytest.mark.parametrize("symbol", [PROPOSE, SAMPLE], ids=["overridden", "called"])
def test_only_required_new_parameters_are_reported(symbol: str, added: str, reported: bool) -> None:
    lines = changed(symbol, parameters=(*parameters_of(symbol), added))
    assert (["new required parameter 'extra'" in line for line in lines] == [True]) is reported
    assert bool(lines) is reported


def test_new_order_matters_for_overridden_methods_only() -> None:
    def swapped(symbol: str) -> tuple[str, ...]:
        first, second, *rest = parameters_of(symbol)
        return (second, first, *rest)

    (line,) = changed(PROPOSE, parameters=swapped(PROPOSE))
    assert "changed their order" in line
    assert changed(SAMPLE, parameters=swapped(SAMPLE)) == []


def test_what_is_passed_on_may_gain_parameters() -> None:
    handed_on = "vllm.v1.worker.cpu_model_runner:CPUModelRunner.sample_tokens"
    assert changed(handed_on, parameters=(*parameters_of(handed_on), "extra")) == []
    (line,) = changed(CREATE, parameters=("target_model_config", "parallel_config"))
    assert "parameter 'target_parallel_config' is gone or renamed" in line


def test_patches_take_what_vllm_hands_them_in_its_order() -> None:
    (line,) = changed(APPLY, parameters=("sampling_metadata", "logits", "predict_bonus_token"))
    assert "changed their order" in line
    (line,) = changed(APPLY, parameters=(*parameters_of(APPLY), "extra"))
    assert "new required parameter 'extra'" in line
    assert "engine/patches/requests.py" in line


def test_keyword_catch_all_stands_for_every_name() -> None:
    assert changed(SAMPLE, parameters=("**kwargs",)) == []


def test_changed_base_value_and_kind_are_reported() -> None:
    (line,) = changed(DFLASH, bases=("Proposer",))
    assert "no longer derives from SpecDecodeBaseProposer, only from Proposer" in line
    (line,) = changed(METHOD, strings=("eagle",))
    assert "no longer contains 'dflash'" in line
    (line,) = changed(PROPOSE, kind="attribute")
    assert "is now a attribute, expected function" in line


@pytest.mark.parametrize(
    "version",
    ["0.32.0", "0.32.1", "0.33.0", "0.32.0+cpu", "0.33.1.dev3", "0.33.0rc1", "0.33", "v0.32.0",
     "0.33.0.dev12+g4ba787ec9.cu129", "0.33.0.post1"],
)  # fmt: skip
def test_version_is_accepted(version: str) -> None:
    check_version(version)
    assert is_allowed(version)


@pytest.mark.parametrize(
    "version",
    ["0.31.9", "0.34.0", "0.34.0.dev1", "1.0.0", "0.3.2", "0.320.0", "1.32.0", "", "dev",
     "0.1.dev1+g0.32.0", "0.330 x", "0.33 and more"],
)  # fmt: skip
def test_version_is_rejected_with_version_range_and_remedy(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    with pytest.raises(IncompatibleVLLMError) as error:
        check_version(version)
    assert not is_allowed(version)
    message = str(error.value)
    for part in (version, "0.32.x, 0.33.x", "pip install 'vllm==0.33.*'", f"{ALLOW_UNTESTED}=1"):
        assert part in message
    assert "\n" not in message


def test_untested_version_can_be_forced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    check_version("0.34.0")
    assert "0.34.0" in caplog.text
    assert is_allowed("0.34.0")
    monkeypatch.setenv(ALLOW_UNTESTED, "0")
    with pytest.raises(IncompatibleVLLMError):
        check_version("0.34.0")


@pytest.mark.parametrize(
    ("version", "looked_at"),
    [("0.32.0", False), ("0.33.0+cpu", False), ("v0.33.0", False), ("0.33.1", True),
     ("0.33.0rc1", True), ("0.33.0.post1", True), ("0.33.1.dev3+g4ba787ec9", True)],
)  # fmt: skip
def test_only_what_nobody_recorded_is_looked_at(
    version: str, looked_at: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    monkeypatch.setattr(compat, "_missing_installed", lambda: ("vllm.x:y: is gone", "another"))
    if not looked_at:
        check_chosen(version)
        return
    with pytest.raises(IncompatibleVLLMError) as error:
        check_chosen(version)
    for part in (version, "vllm.x:y: is gone and 1 more", "'vllm==0.33.0'", f"{ALLOW_UNTESTED}=1"):
        assert part in str(error.value)


def test_absent_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(IncompatibleVLLMError, match="vLLM is not installed"):
        vllm_root()


def test_probe_refuses_a_folder_without_vllm(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a vllm package folder"):
        probe(tmp_path)


def test_probe_reads_moved_and_unusual_definitions(tmp_path: Path) -> None:
    """A property with a setter, overloads, nested Literals, keyword-only parameters."""
    root = tmp_path / "vllm"
    (root / "config").mkdir(parents=True)
    (root / "__init__.py").touch()
    (root / "config" / "speculative.py").write_text(
        "from typing import Literal, overload\n"
        'Inner = Literal["dflash"]\n'
        "SpeculativeMethod = Literal['ngram', Inner]\n"
        "class SpeculativeConfig:\n"
        "    num_speculative_tokens: int = 1\n"
        "    @property\n"
        "    def method(self): ...\n"
        "    @method.setter\n"
        "    def method(self, value): ...\n"
        "    @overload\n"
        "    def use_dflash(self, a): ...\n"
        "    def use_dflash(self, a, /, b=1, *c, d, e=2, **f): ...\n"
        "    def load(self):\n"
        "        self.draft_model_config, self.other = 1, 2\n"
    )
    found = probe(root)
    prefix = "vllm.config.speculative:SpeculativeConfig."
    assert found[METHOD].strings == ("dflash", "ngram")
    assert found[prefix + "method"] == Signature("attribute", where="property")
    assert found[prefix + "num_speculative_tokens"] == Signature("attribute", where="class")
    assert found[prefix + "draft_model_config"] == Signature("attribute", where="load")
    use = found[prefix + "use_dflash"]
    assert use.parameters == ("a", "b=", "*c", "*, d", "*, e=", "**f")
    assert use.parameter_names == ("a", "b", "*c", "d", "e", "**f")
    assert use.required == ("a", "d")
    assert DFLASH not in found


def test_probe_finds_inherited_members(tmp_path: Path) -> None:
    """In a class of the same module, of another one, under another name; nowhere outside vLLM."""
    root = tmp_path / "vllm"
    (root / "v1" / "worker").mkdir(parents=True)
    (root / "__init__.py").write_text("class Mixin:\n    def sample_tokens(self): ...\n")
    (root / "v1" / "worker" / "gpu_model_runner.py").write_text(
        "class Base:\n"
        "    def execute_model(self, base): ...\n"
        "    def _sample(self, base): ...\n"
        "class GPUModelRunner(Base):\n"
        "    def _sample(self, logits): ...\n"
    )
    (root / "v1" / "worker" / "cpu_model_runner.py").write_text(
        "from other import Mixin\n"
        "from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner\n"
        "class CPUModelRunner(Mixin, Runner): ...\n"
    )
    found = probe(root)
    prefix = "vllm.v1.worker.cpu_model_runner:CPUModelRunner."
    assert found[prefix + "_sample"].parameters == ("logits",)
    assert found[prefix + "execute_model"].parameters == ("base",)
    assert prefix + "sample_tokens" not in found


def test_snapshot_survives_writing_and_reading(tmp_path: Path) -> None:
    found = snapshot("0.32.0")
    write_snapshot(tmp_path / "again.json", "0.32.0", found)
    assert read_snapshot(tmp_path / "again.json") == ("0.32.0", found)
    assert (tmp_path / "again.json").read_text() == (SNAPSHOTS / "vllm-0.32.0.json").read_text()
    names = list(json.loads((tmp_path / "again.json").read_text())["symbols"])
    assert names == sorted(names)


def test_command_records_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "now.json"
    assert compat.main(["--record", str(path)]) == 0
    assert read_snapshot(path)[1] == probe(vllm_root())
    empty = tmp_path / "vllm"
    empty.mkdir()
    (empty / "__init__.py").touch()
    assert compat.main(["--root", str(empty)]) == 1
    assert f"0 of {len(RELIED_ON)} symbols" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compat.main(["--root", str(tmp_path / "nothing")])


def test_probing_imports_no_vllm() -> None:
    code = (
        "import sys\n"
        "from vllm_specformer.engine.compat.versions import missing, vllm_root, installed_vllm\n"
        "from vllm_specformer.engine.patches.ledger import rows\n"
        "installed_vllm(); missing(vllm_root()); assert rows()\n"
        "heavy = [m for m in sys.modules if m.split('.')[0] in ('vllm', 'torch', 'transformers')]\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
