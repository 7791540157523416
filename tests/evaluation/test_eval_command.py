"""`specformer eval` without an engine: metrics, files, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.file_limits import file_limit
from support.paths import HEAD, PROMPTS, TARGET
from support.training_texts import make_texts, write_distilled
from vllm_specformer.cli.main import main
from vllm_specformer.config import read_head_config


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that says why."""
    capsys.readouterr()
    assert main(["eval", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [text for text in error.splitlines() if text.startswith("specformer eval: ")]
    return line


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first prompts as conversations of two turns, of which the first is asked."""
    path = tmp_path_factory.mktemp("prompts") / "chats.jsonl"
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[:6]]
    records = [
        {
            "messages": [{"role": "user", "content": text}, {"role": "user", "content": "and?"}],
            "kind": "code" if number < 4 else "chat",
        }
        for number, text in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prompts_to_metrics(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "template"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    out, plot = tmp_path / "eval.json", tmp_path / "eval.png"
    arguments = (HEAD, "--target", TARGET, "--prompts", chats, "--chat-template", template)
    limits = ("--max-tokens", "12", "--num-speculative-tokens", "1", "4", "--temperature", "0", "1")
    files = ("--json", out, "--plot", plot)
    assert main(["eval", *map(str, (*arguments, *limits, *files))]) == 0
    metrics: dict[str, Any] = json.loads(out.read_text())
    assert metrics["dtype"] == "float32" or metrics["device"] == "cuda"
    assert metrics["engine"] == []
    assert list(metrics["offline"]) == ["greedy", "temperature_1"]
    for name, group in metrics["offline"].items():
        assert group["texts"] == 6
        assert group["mean_answer_tokens"] <= 12
        for part in ("all", "less_repetitive_half"):
            assert list(group[part]["head"]) == ["K=1", "K=4"]
            assert len(group[part]["head"]["K=4"]["acceptance_per_position"]) == 4
            assert {"lookup_3", "lookup_2_3"} < group[part].keys()
        kinds = group["by_kind"]
        assert {kind: found["texts"] for kind, found in kinds.items()} == {"chat": 2, "code": 4}
        method = "head" if name == "greedy" else "head_drawn"
        steps = [found["all"][method]["K=4"]["tokens_per_step"] for found in kinds.values()]
        assert group["mean_over_kinds"]["K=4"]["head"] == pytest.approx(sum(steps) / 2, abs=1e-3)
        assert min(steps) <= group["all"][method]["K=4"]["tokens_per_step"] <= max(steps)
        assert ("share_of_bound" in group) == (name != "greedy")
        head, bound = (group["all"].get(method) for method in ("head", "bound"))
        served = group["all"]["head_drawn" if bound else "head"]["K=4"]["tokens_per_step"]
        lookup = max(group["all"][m]["K=4"]["tokens_per_step"] for m in ("lookup_3", "lookup_2_3"))
        assert group["over_lookup"]["K=4"] == pytest.approx(served / lookup, abs=1e-3)
        if bound:
            share = head["K=4"]["tokens_per_step"] / bound["K=4"]["tokens_per_step"]
            assert group["share_of_bound"]["K=4"] == pytest.approx(share, abs=1e-3)
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    assert "drafts at temperature 0:" in shown.err
    assert "drafts at temperature 1:" in shown.err
    printed = shown.out
    assert "greedy: tokens per step, 6 texts" in printed
    assert "greedy, by kind: tokens per step" in printed
    assert "mean of kinds" in printed
    assert "of bound" in printed
    # Under the table that has such a column, and under no other.
    greedy, _, sampled = printed.partition("temperature 1: tokens per step")
    assert "lookup: n-grams of the text itself" in greedy
    assert "drawn" not in greedy
    assert "drawn drafts are what sampled requests get" in " ".join(sampled.split())
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_trees_and_their_ranking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fitting changes two fields of the head's config.json and nothing else of the head."""
    head, out = tmp_path / "head", tmp_path / "eval.json"
    shutil.copytree(HEAD, head)
    before = {path.name: path.read_bytes() for path in head.iterdir()}
    arguments = (head, "--target", TARGET, "--prompts", PROMPTS, "--max-prompts", 12)
    limits = ("--max-tokens", 24, "--temperature", 0, 1, "--tree-nodes", 4, 16)
    assert main(["eval", *map(str, (*arguments, *limits, "--json", out))]) == 0
    assert "tokens per step of trees" in capsys.readouterr().out
    groups = json.loads(out.read_text())["offline"]
    for group in groups.values():
        trees = group["trees"]
        assert list(trees) == ["chain K=8", "n=4", "n=16"]
        assert (
            trees["chain K=8"]["tokens_per_step"] == group["all"]["head"]["K=8"]["tokens_per_step"]
        )
        four, sixteen = trees["n=4"], trees["n=16"]
        assert 1 < four["tokens_per_step"] < sixteen["tokens_per_step"]
        assert len(sixteen["acceptance_per_position"]) == 8
        assert 0 < sixteen["stderr"] < 1
    assert {path.name: path.read_bytes() for path in head.iterdir()} == before

    assert (
        main(["eval", *map(str, (*arguments, *limits, "--fit-tree-ranking", "--json", out))]) == 0
    )
    report = json.loads(out.read_text())
    fields = {name: report[name] for name in ("tree_ranking", "tree_ranking_sampled")}
    for found in fields.values():
        assert len(found) == 8
        assert all(0.4 < tau < 2 for tau in found)
    assert fields["tree_ranking"] != fields["tree_ranking_sampled"]
    after = {path.name: path.read_bytes() for path in head.iterdir()}
    assert json.loads(after["config.json"]) == json.loads(before["config.json"]) | fields
    assert {**after, "config.json": b""} == {**before, "config.json": b""}
    assert read_head_config(head).tree_ranking_sampled == fields["tree_ranking_sampled"]


def test_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It changes the fields of the kinds of texts there are, and nothing else of the head."""
    head, out = tmp_path / "head", tmp_path / "eval.json"
    shutil.copytree(HEAD, head)
    before = {path.name: path.read_bytes() for path in head.iterdir()}
    arguments = (head, "--target", TARGET, "--prompts", PROMPTS, "--max-prompts", 12)
    limits = ("--max-tokens", 24, "--num-speculative-tokens", 4, "--calibrate", "--json", out)
    assert main(["eval", *map(str, (*arguments, *limits, "--temperature", 1, "--likeliest"))]) == 0
    assert "expected calibration error" in capsys.readouterr().out
    report = json.loads(out.read_text())["calibration"]
    assert list(report) == ["sampled"]
    assert report["sampled"]["texts"] == 12
    kept = json.loads(out.read_text())["offline"]["temperature_1"]["kept_of_likeliest"]["K=4"]
    assert kept == sorted(kept)
    assert kept[len(kept) // 2] > 0.6  # half of the drafts, if they are the likeliest
    fitted, raw = (report["sampled"][n] for n in ("fitted_to_the_other_half", "probability"))
    assert fitted["log_loss"] < raw["log_loss"]
    fields = {"acceptance_calibration_sampled": report["sampled"]["calibration"]}
    after = {path.name: path.read_bytes() for path in head.iterdir()}
    assert json.loads(after["config.json"]) == json.loads(before["config.json"]) | fields
    assert {**after, "config.json": b""} == {**before, "config.json": b""}
    config = read_head_config(head)
    assert config.acceptance_calibration_sampled == report["sampled"]["calibration"]
    few = (head, "--target", TARGET, "--prompts", PROMPTS, "--max-prompts", 4, "--calibrate")
    assert "--calibrate: 4 answers of a temperature are too few" in refused(
        capsys, *few, "--max-tokens", 8, "--num-speculative-tokens", 1
    )


def test_metrics_that_cannot_be_written_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval.json"
    arguments = (HEAD, "--target", TARGET, "--prompts", PROMPTS, "--max-prompts", 2)
    limits = ("--max-tokens", 4, "--num-speculative-tokens", 1, "--json", out)
    with file_limit(100):
        assert main(["eval", *map(str, (*arguments, *limits))]) == 2
    printed = capsys.readouterr()
    assert f"specformer eval: {out}: File too large while writing" in printed.err
    remedy = "raise the limit on the size of files (`ulimit -f`). Its content is printed above"
    assert remedy in printed.err
    metrics = json.loads(printed.out[printed.out.index("\n{") :])
    assert metrics["offline"]["greedy"]["texts"] == 2
    assert list(tmp_path.iterdir()) == []


def test_distilled_answers_to_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all temperatures they have, or those asked for; nothing is generated."""
    write_distilled(tmp_path / "data", make_texts(24, 2048))
    shutil.copytree(HEAD, tmp_path / "head", ignore=shutil.ignore_patterns("provenance.json"))
    arguments = (tmp_path / "head", "--target", TARGET)
    arguments += ("--data", tmp_path / "data", "--json", tmp_path / "f")
    arguments += ("--num-speculative-tokens", "2")
    assert main(["eval", *map(str, arguments)]) == 0
    groups = json.loads((tmp_path / "f").read_text())["offline"]
    texts = make_texts(24, 2048)
    greedy = int((texts.temperatures == 0).sum())
    assert {name: group["texts"] for name, group in groups.items()} == {
        "greedy": greedy,
        "temperature_1": len(texts) - greedy,
    }
    assert "no provenance.json" in capsys.readouterr().err
    assert main(["eval", *map(str, (*arguments, "--temperature", "1"))]) == 0
    assert list(json.loads((tmp_path / "f").read_text())["offline"]) == ["temperature_1"]
    line = refused(capsys, *arguments, "--temperature", "0.5")
    assert "have 0, 1 only; leave it out, or add --serve" in line


def test_what_it_refuses(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pair = (HEAD, "--target", TARGET)
    line = refused(capsys, *pair, "--prompts", PROMPTS, "--num-speculative-tokens", "9")
    assert "--num-speculative-tokens 9: this head drafts 1 to 8 tokens" in line
    assert "no chat template" in refused(capsys, *pair, "--prompts", chats)
    assert "check the path" in refused(capsys, *pair, "--prompts", tmp_path / "none.jsonl")
    assert "no such file" in refused(capsys, *pair, "--data", tmp_path)
    line = refused(capsys, HEAD, "--target", tmp_path / "none", "--prompts", PROMPTS)
    assert "no such directory" in line
    line = refused(capsys, tmp_path, "--prompts", PROMPTS)
    assert "config.json is missing" in line
    line = refused(capsys, *pair, "--prompts", PROMPTS, "--json", tmp_path / "no" / "x.json")
    assert "create it" in line


def test_a_target_of_other_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((TARGET / "config.json").read_text()) | {"vocab_size": 2050}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = refused(capsys, HEAD, "--target", tmp_path, "--prompts", PROMPTS)
    assert "vocab_size is 2050, the head's is 2048" in line
