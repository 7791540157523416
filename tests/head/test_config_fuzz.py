"""Whatever a head's config.json holds: a head, or one error that names the file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config

from vllm_specformer.config import SpecFormerConfig, read_head_config
from vllm_specformer.head_fields import HeadConfigError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["slots", "mixed", "specformer", "8", "1e3", "\ud800", "a\nb"])
)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
# A case needs milliseconds, but the machine may be busy; the directory is rewritten by each case.
CASES = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def complete() -> dict[str, Any]:
    target = Qwen3Config(
        vocab_size=50, hidden_size=32, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    return SpecFormerConfig.preset("default", target, "some/target").to_dict()


COMPLETE = complete()


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every entry, at any depth."""
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    found = []
    for key, value in entries:
        found.append((*path, key))
        if isinstance(value, (dict, list)):
            found += places(value, (*path, key))
    return found


@st.composite
def damaged(draw: st.DrawFn) -> dict[str, Any]:
    """A head's configuration with up to three entries replaced, removed or added."""
    content = copy.deepcopy(COMPLETE)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(content)))
        parent = content
        for key in path:
            parent = parent[key]
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "replace":
            parent[last] = draw(JSON_VALUES)
        elif change == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=4) | st.sampled_from(["self", "_x", "dtype"]))] = draw(
                JSON_VALUES
            )
    return content


def read(directory: Path, content: bytes) -> None:
    """Read the content as a head's; a refusal must be the one error, in one line, for people."""
    path = directory / "config.json"
    path.write_bytes(content)
    try:
        config = read_head_config(directory)
    except HeadConfigError as error:
        message = str(error)
        assert str(path) in message
        assert "\n" not in message
        assert "field '" in message or "; " in message or " must " in message
    else:
        # What is accepted is a head through and through: it can be written and read again.
        again = SpecFormerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again.to_dict() == config.to_dict()


def encoded(content: Any) -> bytes:
    return json.dumps(content).encode()


@CASES
@given(damaged())
def test_damaged_entries(tmp_path: Path, content: dict[str, Any]) -> None:
    read(tmp_path, encoded(content))


@CASES
@given(JSON_VALUES)
def test_any_json(tmp_path: Path, content: Any) -> None:
    read(tmp_path, encoded(content))


@CASES
@given(st.binary(max_size=40) | st.integers(0, 2000).map(lambda n: encoded(COMPLETE)[:n]))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    read(tmp_path, content)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe{}", b""],
    ids=["deep-list", "deep-object", "long-number", "utf-16", "empty"],
)
def test_hostile_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(
        HeadConfigError, match=r"config\.json: not valid JSON \(.*\); copy or train"
    ):
        read_head_config(tmp_path)


def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(HeadConfigError, match=r"config\.json: cannot be read \(.*; 'model' must"):
        read_head_config(tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(HeadConfigError, match=r"file/config\.json: cannot be read"):
        read_head_config(file)
