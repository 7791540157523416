"""Which distilled texts an evaluation takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.paths import TARGET
from support.training_texts import make_texts, write_distilled
from vllm_specformer.data.manifest import read_manifest
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.evaluation.questions import asked_again, unseen
from vllm_specformer.target.files import fingerprint
from vllm_specformer.training.result import data_digest
from vllm_specformer.training.texts import split


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("distilled") / "data"
    write_distilled(directory, make_texts(60, 40))
    return directory


def chosen(data: Path, provenance: dict[str, Any] | None, **changes: Any) -> tuple[list[int], str]:
    said: list[str] = []
    options = {"context": 512, "max_prompts": None, "say": said.append} | changes
    texts = unseen(data, fingerprint(TARGET), provenance, **options)
    return texts.ids.tolist(), " ".join(said)


def trained_on(data: Path, share: float) -> dict[str, Any]:
    digest = data_digest(read_manifest(data))
    return {"data": {"manifest_sha256": digest}, "settings": {"eval_share": share, "seed": 3}}


def test_held_out_part_of_the_training_data(data: Path) -> None:
    ids, said = chosen(data, trained_on(data, 0.2))
    texts = make_texts(60, 40)
    trained, _ = split(texts, 0.2, 100)
    assert sorted({*texts.ids[trained].tolist(), *ids}) == texts.ids.tolist()
    assert not set(ids) & set(texts.ids[trained].tolist())
    assert f"{len(ids)} texts of it were held out" in said
    assert chosen(data, trained_on(data, 0.2), max_prompts=3)[0] == ids[:3]


def test_all_of_other_data(data: Path) -> None:
    other = trained_on(data, 0.2)
    other["data"]["manifest_sha256"] = "0" * 64
    assert chosen(data, other) == (make_texts(60, 40).ids.tolist(), "")
    ids, said = chosen(data, None)
    assert len(ids) == len(make_texts(60, 40))
    assert "no provenance.json" in said


def test_nothing_held_out(data: Path) -> None:
    with pytest.raises(SpecFormerError, match="trained on all of it"):
        chosen(data, trained_on(data, 0.0))


def test_prompts_of_distilled_texts(data: Path) -> None:
    texts = unseen(
        data, fingerprint(TARGET), None, context=512, max_prompts=None, say=lambda line: None
    )
    asked = asked_again(texts, context=512, max_tokens=7, seed=0)
    for i in range(len(texts)):
        start, _ = texts.answers(i)[0]
        assert asked.prompts[int(texts.ids[i])] == texts.input_ids(i)[:start].tolist()
    greedy, drawn = asked.requests(0.0), asked.requests(0.5)
    assert {request.seed for request in greedy.values()} == {None}
    assert len({request.seed for request in drawn.values()}) == len(drawn)
    assert {request.max_tokens for request in drawn.values()} == {7}
