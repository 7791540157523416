"""Which of vLLM's architectures hand out hidden states, read from its sources without importing it.

Importing every model class needs what only some of them use (torchvision, audio libraries), so the
classes are followed through the sources: a class supports drafting from hidden states if
`SupportsEagle3` is among its ancestors.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_specformer.engine.compat.probes import definition, parse

INTERFACE = "SupportsEagle3"
# Tables of the registry with models that generate text.
TABLES = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
_MODELS = "vllm.model_executor.models"
TRANSFORMERS = f"{_MODELS}.transformers"


@dataclass(frozen=True)
class TargetClass:
    """What vLLM serves an architecture with."""

    architecture: str
    module: str
    name: str
    hands_out_states: bool

    @property
    def wraps_transformers(self) -> bool:
        """Whether it runs the model's Transformers code, which has no state 0 to hand out."""
        return self.module == TRANSFORMERS


def target_classes(root: Path) -> list[TargetClass]:
    """Every architecture of the registry under `root`, the vllm package folder, by name.

    Raises:
        FileNotFoundError: `root` holds no registry of models.
    """
    found = {
        architecture: TargetClass(architecture, module, name, _derives(root, module, name))
        for architecture, (module, name) in registered(root).items()
    }
    return [found[architecture] for architecture in sorted(found)]


@cache
def registered(root: Path) -> dict[str, tuple[str, str]]:
    """Module and name of the class that serves each architecture of the registry.

    Raises:
        FileNotFoundError: `root` holds no registry of models.
    """
    registry = parse(root, f"{_MODELS}.registry")
    if registry is None:
        raise FileNotFoundError(f"{root} holds no registry of models; is it a vllm package folder?")
    found = {}
    for table in TABLES:
        node = definition(registry.body, table)
        if not isinstance(node, ast.Assign):
            continue
        for architecture, (module, name) in ast.literal_eval(node.value).items():
            module = module if module.startswith("vllm.") else f"{_MODELS}.{module}"
            found[architecture] = (module, name)
    return found


@cache
def _derives(root: Path, module: str, name: str) -> bool:
    """Whether `module:name` is the interface or has it among its ancestors."""
    if name == INTERFACE:
        return True
    tree = parse(root, module)
    if tree is None:
        return False
    node = definition(tree.body, name)
    if isinstance(node, ast.ClassDef):
        return any(_derives(root, module, b.id) for b in node.bases if isinstance(b, ast.Name))
    within = [node] if isinstance(node, ast.ImportFrom) else ast.walk(tree)
    return any(
        _derives(root, absolute(root, module, statement), original)
        for statement, original in _imports(within, name)
    )


def _imports(nodes: Iterable[ast.AST], name: str) -> Iterator[tuple[ast.ImportFrom, str]]:
    """Every import that may bind `name`, with the name it has there.

    Some modules choose by platform; one platform whose class hands out states is enough here, the
    worker asks the class itself (`checks.check_target_class`).
    """
    for statement in nodes:
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    yield statement, alias.name


def absolute(root: Path, module: str, node: ast.ImportFrom) -> str:
    """The module that an import inside `module` names."""
    if not node.level:
        return node.module or ""
    package = root.joinpath(*module.split(".")[1:]).is_dir()
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + package]
    return ".".join([*parts, *([node.module] if node.module else [])])
