"""Which states a class hands out is read from the ways in which vLLM's decoders collect them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_specformer.engine.compat.handed_out import handed_out
from vllm_specformer.engine.compat.versions import installed_vllm, vllm_root
from vllm_specformer.families import read_families
from vllm_specformer.hooks import HandedOut

ALL = HandedOut(first=True, last=True)
# A decoder's forward, as vLLM has them, around what the loop does.
DECODER = """
from vllm.model_executor.models.interfaces import EagleModelMixin

class Decoder(EagleModelMixin):
    def forward(self, hidden_states, residual=None):
        aux_hidden_states = []
        {before}
        for idx, layer in enumerate(self.layers):
            {entering}
            hidden_states, residual = layer(hidden_states, residual)
            {leaving}
        {after}
        return hidden_states, aux_hidden_states

class Target:
    def __init__(self):
        self.model = {build}
"""
AT_START = "self._maybe_add_hidden_state(aux_hidden_states, 0, hidden_states, residual)"
AFTER_EACH = "self._maybe_add_hidden_state(aux_hidden_states, idx + 1, hidden_states, residual)"
BEFORE_EACH = "if idx in self.aux_hidden_state_layers: aux_hidden_states.append({})"
BY_HAND = "if idx + 1 in self.aux_hidden_state_layers: aux_hidden_states.append(hidden_states)"
AT_END = (
    "if self.end_layer in self.aux_hidden_state_layers: aux_hidden_states.append(hidden_states)"
)
NO_RESIDUAL = "hidden_states if residual is None else hidden_states + residual"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty vllm package folder with a registry of one architecture."""
    models = tmp_path / "vllm" / "model_executor" / "models"
    models.mkdir(parents=True)
    (models / "registry.py").write_text(
        '_TEXT_GENERATION_MODELS = {"Inner": ("inner", "Target")}\n'
    )
    return tmp_path / "vllm"


def write(root: Path, name: str, build: str = "Decoder()", **parts: str) -> None:
    places = dict.fromkeys(("before", "entering", "leaving", "after"), "pass") | parts
    path = root / "model_executor" / "models" / f"{name}.py"
    path.write_text(DECODER.format(build=build, **places))


def found(root: Path, name: str = "inner", target: str = "Target") -> HandedOut | None:
    return handed_out(root, f"vllm.model_executor.models.{name}", target)


@pytest.mark.parametrize(
    ("parts", "first", "last"),
    [
        ({"before": AT_START, "leaving": AFTER_EACH}, True, True),
        ({"before": AT_START.replace("0", "self.start_layer"), "leaving": BY_HAND}, True, True),
        # DeepSeek V2: the embedding has no residual yet.
        (
            {"entering": BEFORE_EACH.format("hidden_states + residual"), "after": AT_END},
            False,
            True,
        ),
        # DeepSeek V3.2, on NVIDIA and on AMD.
        ({"entering": BEFORE_EACH.format(NO_RESIDUAL)}, True, False),
        ({"entering": BEFORE_EACH.format("hidden_states + residual")}, False, False),
        # GLM-5
        ({"entering": BEFORE_EACH.format("self._aux(hidden_states)"), "after": AT_END}, True, True),
        # DeepSeek V4
        ({"leaving": BY_HAND}, False, True),
        # DeepSeek V4.1
        (
            {
                "leaving": "layer(capture_previous_aux=idx in self.aux_hidden_state_layers)",
                "after": AT_END.replace(".append(hidden_states)", "[self.end_layer] = 1"),
            },
            False,
            True,
        ),
    ],
)
def test_ways_of_collecting(root: Path, parts: dict[str, str], first: bool, last: bool) -> None:
    write(root, "inner", **parts)
    assert found(root) == HandedOut(first, last)


def test_asking_without_collecting_is_nothing(root: Path) -> None:
    write(
        root, "inner", after="if self.end_layer in self.aux_hidden_state_layers: raise ValueError"
    )
    assert found(root) is None
    assert found(root, target="Unheard") is None
    assert handed_out(root, "somewhere.else", "Target") is None


def test_class_that_builds_another_one_by_its_architecture(root: Path) -> None:
    write(root, "inner", leaving=BY_HAND)
    write(root, "outer", build='make(architectures=["Inner"])')
    assert found(root, "outer") == HandedOut(first=False, last=True)


def test_what_a_base_builds_may_be_replaced(root: Path) -> None:
    write(root, "inner", leaving=BY_HAND)
    write(root, "own", before=AT_START, leaving=BY_HAND)
    models = root / "model_executor" / "models"
    imports = (
        "from vllm.model_executor.models.inner import Target as Base\n"
        "from .own import Decoder as Own\n"
    )
    (models / "replaces.py").write_text(imports + "class Target(Base):\n    model_cls = Own\n")
    assert found(root, "replaces") == ALL
    (models / "keeps.py").write_text(imports + "class Target(Base):\n    pass\n")
    assert found(root, "keeps") == HandedOut(first=False, last=True)


def test_method_of_a_base_may_be_replaced(root: Path) -> None:
    """A decoder that no longer collects is none, whatever its base did."""
    write(root, "inner", before=AT_START, leaving=AFTER_EACH)
    path = root / "model_executor" / "models" / "derived.py"
    path.write_text(
        "from .inner import Decoder\n"
        "class Plain(Decoder):\n    def forward(self):\n        return 0\n"
        "class Target:\n    model_cls = Plain\n"
    )
    assert found(root, "derived") is None


def test_every_platform_counts(root: Path) -> None:
    write(root, "one", before=AT_START, leaving=AFTER_EACH)
    write(root, "two", leaving=BY_HAND)
    path = root / "model_executor" / "models" / "inner.py"
    path.write_text("if here:\n    from .one import Target\nelse:\n    from .two import Target\n")
    assert found(root) == HandedOut(first=False, last=True)
    assert found(root, "one") == ALL


def test_every_supported_family_is_proved() -> None:
    """A decoder that collects states is found behind each, and the default hooks are among them."""
    families = read_families()
    if families.vllm != installed_vllm()[1]:
        pytest.skip("another version is installed than the list was made from")
    for family in families.families:
        if family.refusal:
            continue
        place = family.served_by.split(":")
        module = (
            place[0] if place[0].startswith("vllm.") else f"vllm.model_executor.models.{place[0]}"
        )
        handed = handed_out(vllm_root(), module, place[1])
        assert handed == family.handed_out, family.architecture
        for layers in (4, 5, 61):
            hooks = family.handed_out.default_hooks(layers)
            assert len(hooks) >= 3
            assert not handed.lacking(hooks, layers)
    ends = {f.architecture: (f.first_state, f.last_state) for f in families.families}
    # Read by a person in vLLM 0.32.0.
    assert ends["LlamaForCausalLM"] == ends["Cohere2MoeForCausalLM"] == (True, True)
    assert ends["Qwen3_5MoeForCausalLM"] == ends["KimiLinearForCausalLM"] == (True, True)
    assert ends["DeepseekV3ForCausalLM"] == ends["KimiK25ForConditionalGeneration"] == (False, True)
    assert ends["DeepseekV32ForCausalLM"] == ends["GlmMoeDsaForCausalLM"] == (False, False)
    assert ends["DeepseekV4ForCausalLM"] == ends["Olmo2ForCausalLM"] == (False, True)


@pytest.mark.parametrize(
    ("ends", "layers", "hooks"),
    [
        (ALL, 36, (0, 18, 35, 36)),
        (HandedOut(False, True), 36, (1, 18, 35, 36)),
        (HandedOut(False, False), 36, (1, 18, 34, 35)),
        (HandedOut(False, False), 4, (1, 2, 3)),
    ],
)
def test_default_hooks(ends: HandedOut, layers: int, hooks: tuple[int, ...]) -> None:
    assert ends.default_hooks(layers) == hooks
    assert ends.refusal(hooks, layers) == ""


def test_refusal_names_states_and_remedy() -> None:
    assert HandedOut(False, False).refusal((0, 18, 35, 36), 36) == (
        "hands out no hidden state 0 and 36; train a head with --hooks 1,18,34,35"
    )
