"""The house rules that a machine can check: who may import whom, and no circles."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("vllm_specformer", "specformer_kernels")
PLACES = {"vllm_specformer": ROOT, "specformer_kernels": ROOT / "kernels"}
# What each layer must not import; a layer may import all that stands before it in CONTRIBUTING.md.
FORBIDDEN = {
    "specformer_kernels": ("vllm", "transformers", "vllm_specformer"),
    "vllm_specformer.config": ("vllm", "vllm_specformer.engine"),
    "vllm_specformer.head": ("vllm", "vllm_specformer.engine"),
    "vllm_specformer.head_layers": ("vllm", "vllm_specformer.engine"),
    "vllm_specformer.calibration": ("vllm", "vllm_specformer.engine", "vllm_specformer.target"),
    "vllm_specformer.candidates": (
        "vllm",
        "vllm_specformer.engine",
        "vllm_specformer.target",
        "vllm_specformer.training",
    ),
    "vllm_specformer.target": ("vllm", "vllm_specformer.engine", "vllm_specformer.training"),
    "vllm_specformer.data": ("vllm", "vllm_specformer.engine", "vllm_specformer.target"),
    "vllm_specformer.distill": ("vllm_specformer.engine", "vllm_specformer.training"),
    "vllm_specformer.training": ("vllm", "vllm_specformer.engine"),
    "vllm_specformer.engine": (
        "vllm_specformer.training",
        "vllm_specformer.distill",
        "vllm_specformer.cli",
        "vllm_specformer.bench",
        "vllm_specformer.planning",
        "vllm_specformer.evaluation",
    ),
}


def modules() -> dict[str, Path]:
    found = {}
    for package, place in PLACES.items():
        for path in (place / package).rglob("*.py"):
            name = ".".join(path.relative_to(place).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(path: Path) -> set[str]:
    """Everything a file imports, also inside functions: modules of ours as such, others by name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in within}
    return found


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_imports_run_one_way(layer: str) -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if is_in(module, layer)
        for name in imported(path)
        if any(is_in(name, other) for other in FORBIDDEN[layer])
    ]
    assert not wrong


def test_modules_do_not_import_in_a_circle() -> None:
    graph = {
        module: {name for name in imported(path) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }
    assert_no_circle(graph)


def test_packages_do_not_import_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        mine = room(module)
        others = {room(name) for name in imported(path) if name in MODULES}
        graph.setdefault(mine, set()).update(others - {mine})
    assert_no_circle(graph)


def room(module: str) -> str:
    """The package or file directly below the top: what a newcomer looks at first."""
    return ".".join(module.split(".")[:2])


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_engine_imports_vllm() -> None:
    """But for these files, each for the public thing of vLLM that it is about."""
    allowed = {
        "vllm_specformer.engine",
        "vllm_specformer.plugin",  # vLLM's version
        "vllm_specformer.cli.serve",  # vLLM's own command line
        "vllm_specformer.bench.client",  # vLLM's own benchmark client
        "vllm_specformer.distill.offline",  # the LLM class
        "vllm_specformer.serving.cpu_memory",  # which platform it runs on
        "vllm_specformer.serving.engine",  # the LLM class, stepped by hand
        "vllm_specformer.evaluation.stepwise",  # vLLM's version
    }
    wrong = [
        module
        for module, path in MODULES.items()
        if any(is_in(name, "vllm") for name in imported(path))
        and not any(is_in(module, place) for place in allowed)
    ]
    assert not wrong


def test_the_engine_holds_what_a_step_passes_through() -> None:
    files = [p.name for p in (ROOT / "vllm_specformer" / "engine").glob("*.py")]
    assert len(files) <= 14, sorted(files)
