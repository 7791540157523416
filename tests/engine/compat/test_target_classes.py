"""The recorded list of families against the installed packages, and the page made from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from support.paths import ROOT
from vllm_specformer.cli.families import TRIED, as_text, make_list, updated
from vllm_specformer.cli.main import main
from vllm_specformer.engine.compat.target_classes import target_classes
from vllm_specformer.engine.compat.versions import installed_vllm, vllm_root
from vllm_specformer.families import Families, Family, read_families

NAMED = (
    "Gemma4ForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
# A class of each way of naming its ancestors; some need packages that are not installed.
ASK_VLLM = """
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.model_executor.models.registry import ModelRegistry
for line in open(0):
    try:
        loaded = ModelRegistry.models[line.strip()].load_model_cls()
    except ImportError:
        continue
    print(line.strip(), supports_eagle3(loaded))
"""


@pytest.fixture(scope="module")
def families() -> Families:
    return read_families()


def test_list_is_that_of_the_installed_packages(families: Families) -> None:
    if (families.vllm, families.transformers) != (installed_vllm()[1], transformers.__version__):
        pytest.skip("other versions are installed than the list was made from")
    assert make_list() == families, "make it anew: specformer families --record"


@pytest.mark.families
def test_sources_say_what_the_classes_say() -> None:
    """Where vLLM can import a class here, it answers as its source was read."""
    classes = {c.architecture: c for c in target_classes(vllm_root())}
    names = [n for n, c in classes.items() if c.module.startswith("vllm.model_executor.models.")]
    done = subprocess.run(
        [sys.executable, "-c", ASK_VLLM],
        input="\n".join(names),
        capture_output=True,
        text=True,
        check=True,
    )
    said = dict(line.split() for line in done.stdout.splitlines() if line.count(" ") == 1)
    said = {name: answer == "True" for name, answer in said.items() if name in classes}
    assert len(said) >= 100
    assert said == {name: classes[name].hands_out_states for name in said}


def test_named_families_are_supported(families: Families) -> None:
    found = [families.find(name) for name in NAMED]
    assert [f.refusal for f in found if f is not None] == [""] * len(NAMED)
    assert not any(f.wraps_transformers for f in found if f is not None)


def test_reasons(families: Families) -> None:
    def refusal(name: str) -> str:
        family = families.find(name)
        assert family is not None
        return family.refusal

    assert "SupportsEagle3" in refusal("CohereForCausalLM")
    assert "no language model" in refusal("MiniCPMForCausalLM")
    olmo = families.find("Olmo2ForCausalLM")
    assert olmo is not None
    assert olmo.wraps_transformers


def test_command(capsys: pytest.CaptureFixture[str], families: Families) -> None:
    assert main(["families"]) == 0
    short = capsys.readouterr().out
    assert short == as_text(families, refused=False) + "\n"
    assert "LlamaForCausalLM" in short
    assert "CohereForCausalLM" not in short
    assert main(["families", "--all"]) == 0
    assert "CohereForCausalLM" in capsys.readouterr().out
    assert main(["families", "--json"]) == 0
    assert capsys.readouterr().out == families.to_json()


def test_page_is_up_to_date(families: Families) -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    results = ROOT / "benchmarks" / "results" / "families.csv"
    assert updated(page, families, results) == page, (
        "specformer families --update docs/families.md benchmarks/results/families.csv"
    )


def test_page_shows_lists_and_results(tmp_path: Path) -> None:
    parts = "".join(f"<!-- {n} -->\nold\n<!-- /{n} -->\n" for n in ("results", "refused", "list"))
    results = tmp_path / "results.csv"
    results.write_text("family,architecture,drafts\nllama,LlamaForCausalLM,10 (0)\n")
    (tmp_path / TRIED).write_text("architecture,why\nPhiForCausalLM,it is too small\n")

    def family(name: str, served: bool = True) -> Family:
        architecture = f"{name.title()}ForCausalLM"
        place = f"{name}:{architecture}"
        return Family(architecture, place, served, False, served, served, name, "")

    found = [family("llama"), family("phi"), family("qwen2"), family("other", False)]
    text = updated(f"a\n{parts}c\n", Families("1", "2", tuple(found)), results)
    assert "| llama | LlamaForCausalLM | 10 (0) |" in text
    assert "old" not in text
    assert "vLLM 1 and Transformers 2: 3 of the 4 architectures" in text
    assert "registry, 1 of them served here." in text
    line = "| LlamaForCausalLM | llama | `llama:LlamaForCausalLM` | 0, L/2, L-1, L | served |"
    assert line in text
    assert "| 0, L/2, L-1, L | by shape; tried: it is too small |" in text
    assert (
        "| Qwen2ForCausalLM | qwen2 | `qwen2:Qwen2ForCausalLM` | 0, L/2, L-1, L | by shape |"
        in text
    )
    assert "(it lacks SupportsEagle3) | OtherForCausalLM |" in text
    assert text.startswith("a\n")
    assert text.endswith("c\n")
