"""Which hidden states a target's class hands out, read from vLLM's sources without importing them.

vLLM's `SupportsEagle3` says that a class hands out states, not which. Most have all from 0, the
embedding, to L, after the last layer. Some add a residual to the embedding that is not there yet
and fail, some stop before L, some begin after the first layer. The decoder of a class is searched
for in what the class mentions, and the places where it collects states are told apart by how they
number them.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from vllm_specformer.engine.compat.probes import definition, parse
from vllm_specformer.engine.compat.target_classes import TRANSFORMERS, absolute, registered
from vllm_specformer.hooks import HandedOut

_MODELS = ("vllm.model_executor.models.", "vllm.models.")
_WANTED = "aux_hidden_state_layers"
_COLLECT = "_maybe_add_hidden_state"
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def handed_out(root: Path, module: str, name: str) -> HandedOut | None:
    """What class `module:name` hands out on every platform that vLLM has a decoder of it for.

    Returns:
        None where no decoder is found that collects states, or none of vLLM's.
    """
    if f"{module}.".startswith(f"{TRANSFORMERS}."):
        return HandedOut(first=False, last=True)  # states are what layers return
    if not module.startswith(_MODELS):
        return None
    found = {_of_decoder(*methods) for methods in _decoders(root, module, name, set())}
    known = [ends for ends in found if ends is not None]
    if not known:
        return None
    return HandedOut(all(e.first for e in known), all(e.last for e in known))


def _decoders(
    root: Path, module: str, name: str, seen: set[tuple[str, str]]
) -> list[tuple[_Function, ...]]:
    """Methods of every decoder found at or behind `module:name` that collects states."""
    if (module, name) in seen:
        return []
    seen.add((module, name))
    found: list[tuple[_Function, ...]] = []
    for home, node in definitions(root, module, name):
        methods = tuple(_methods(root, home, node).values())
        collects = _of_decoder(*methods) is not None
        found += [methods] if collects else _behind(root, home, node, seen)
    return found


def _behind(
    root: Path, module: str, node: ast.ClassDef, seen: set[tuple[str, str]]
) -> list[tuple[_Function, ...]]:
    """Decoders that a class builds, or else its bases: what they build it may have replaced."""
    found = [d for m in _mentioned(root, module, node.body) for d in _decoders(root, *m, seen)]
    if found:
        return found
    bases = [place for b in _bases(node) for place in definitions(root, module, b)]
    return [d for home, base in bases for d in _behind(root, home, base, seen)]


@cache
def definitions(root: Path, module: str, name: str) -> tuple[tuple[str, ast.ClassDef], ...]:
    """Every class that `module:name` may stand for, and its module; some are chosen by platform."""
    tree = parse(root, module)
    if tree is None:
        return ()
    node = definition(tree.body, name)
    if isinstance(node, ast.ClassDef):
        return ((module, node),)
    found: dict[tuple[str, str], ast.ClassDef] = {}
    for source, original in _imported(root, module).get(name, ()):
        if source.startswith(_MODELS) and (source, original) != (module, name):
            for home, inner in definitions(root, source, original):
                found[home, inner.name] = inner
    return tuple((home, node) for (home, _), node in found.items())


@cache
def _imported(root: Path, module: str) -> dict[str, list[tuple[str, str]]]:
    """Names that a module imports, under conditions too -> every module and name there."""
    tree, found = parse(root, module), defaultdict(list)
    for statement in ast.walk(tree) if tree is not None else ():
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                source = absolute(root, module, statement)
                found[alias.asname or alias.name].append((source, alias.name))
    return found


def _methods(root: Path, module: str, node: ast.ClassDef) -> dict[str, _Function]:
    """A class's methods by name, with those it inherits."""
    methods: dict[str, _Function] = {}
    for base in reversed(_bases(node)):
        for home, inherited in definitions(root, module, base):
            methods |= _methods(root, home, inherited)
    return methods | {m.name: m for m in node.body if isinstance(m, _Function)}


def _bases(node: ast.ClassDef) -> list[str]:
    return [base.id for base in node.bases if isinstance(base, ast.Name)]


def _mentioned(root: Path, module: str, nodes: Sequence[ast.AST]) -> Iterator[tuple[str, str]]:
    """Classes that parts of a module name, or look up by their architecture."""
    inner = [n for node in nodes for n in ast.walk(node)]
    for name in sorted({n.id for n in inner if isinstance(n, ast.Name)}):
        if definitions(root, module, name):
            yield module, name
    for keyword in (n for n in inner if isinstance(n, ast.keyword) and n.arg == "architectures"):
        for constant in ast.walk(keyword.value):
            place = registered(root).get(getattr(constant, "value", ""))
            if place is not None:
                yield place


def _of_decoder(*methods: _Function) -> HandedOut | None:
    """What a class with these methods hands out; None if it collects no states."""
    places = [place for method in methods for place in _places(method)]
    if not places:
        return None
    return HandedOut("first" in places, "last" in places)


def _places(method: _Function) -> Iterator[str]:
    """Of every statement that collects states which of them: "first", "last" or "between"."""
    if method.name == _COLLECT:
        return
    for node in ast.walk(method):
        if isinstance(node, ast.Call) and _is_attribute(node.func, _COLLECT):
            yield from _ends(node.args[1])
        elif isinstance(node, ast.keyword) and (index := _asked(node.value)) is not None:
            yield "between"  # a layer is told to give the state before it, which the first has not
        elif isinstance(node, ast.If) and _collects(node.body):
            for part in ast.walk(node.test):
                if isinstance(part, ast.expr) and (index := _asked(part)) is not None:
                    adds_nothing = isinstance(index, ast.Name) and _adds_residual(node.body)
                    yield from ("between",) if adds_nothing else _ends(index)


def _ends(index: ast.expr) -> tuple[str, ...]:
    """Which ends a number reaches that a state is collected by."""
    if isinstance(index, ast.BinOp):  # i + 1, after layer i
        return ("last",)
    if _is_attribute(index, "end_layer"):
        return ("last",)
    # 0, the first layer's number, or i before layer i
    return ("first",)


def _asked(node: ast.AST) -> ast.expr | None:
    """`index` of `index in self.aux_hidden_state_layers`."""
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
        return node.left if _is_attribute(node.comparators[0], _WANTED) else None
    return None


def _collects(body: list[ast.stmt]) -> bool:
    """Whether a block puts something into a collection of auxiliary states."""
    for node in (n for statement in body for n in ast.walk(statement)):
        if isinstance(node, ast.Attribute) and node.attr == "append":
            owner: ast.expr = node.value
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            owner = node.value
        else:
            continue
        if isinstance(owner, ast.Name) and "aux" in owner.id:
            return True
    return False


def _adds_residual(body: list[ast.stmt]) -> bool:
    """Whether a block adds the residual without asking whether there is one."""
    nodes = [n for statement in body for n in ast.walk(statement)]
    asks = any(
        isinstance(n, ast.Compare) and isinstance(n.ops[0], ast.Is | ast.IsNot) for n in nodes
    )
    adds = any(
        isinstance(n, ast.BinOp)
        and any(isinstance(side, ast.Name) and side.id == "residual" for side in (n.left, n.right))
        for n in nodes
    )
    return adds and not asks


def _is_attribute(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == name
