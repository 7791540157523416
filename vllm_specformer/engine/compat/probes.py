"""What vLLM looks like from outside: a reader of its sources that never imports it.

Importing vLLM takes ten seconds and may start a GPU context, and a symbol that moved makes the
import itself fail. Reading the sources with `ast` answers in under two seconds, for an installed
vLLM and for an unpacked wheel alike. `probe` reads a source tree, `evaluate` compares the outcome
(fresh or recorded) with what we rely on: the tables of `symbols*.py` and what our patches change.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from vllm_specformer.engine.compat.symbols import (
    CPU_KERNELS,
    LAYERS,
    MEASURED,
    REGISTRATION,
    Reliance,
)
from vllm_specformer.engine.compat.symbols_candidates import TREES
from vllm_specformer.engine.compat.symbols_cpu import CPU_RUNNER
from vllm_specformer.engine.compat.symbols_extraction import EXTRACTION
from vllm_specformer.engine.compat.symbols_runners import RUNNER_V1, RUNNER_V2
from vllm_specformer.engine.compat.symbols_verification import VERIFICATION
from vllm_specformer.engine.patches.ledger import Patch, declared


def patched(patches: Iterable[Patch]) -> Iterator[Reliance]:
    """What each patch relies on: its target, with the parameters that our function takes.

    vLLM calls our function as it would call its own, so the order of the parameters counts.
    """
    for patch in patches:
        yield Reliance(
            patch.target,
            patch.file,
            patch.why,
            (patch.kind,),
            patch.parameters,
            overridden=True,
            passes_on=patch.passes_on,
            bases=patch.bases,
            later=patch.later,
        )


RELIED_ON: tuple[Reliance, ...] = (
    *REGISTRATION,
    *RUNNER_V1,
    *RUNNER_V2,
    *VERIFICATION,
    *TREES,
    *CPU_RUNNER,
    *LAYERS,
    *CPU_KERNELS,
    *MEASURED,
    *EXTRACTION,
    *patched(declared()),
)

# How a parameter is written in a Signature: "name", with default "name=", keyword-only "*, name".
_KEYWORD_ONLY = "*, "
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Signature:
    """One symbol of vLLM as its source declares it.

    `where` says how a class member comes to be: "class" (a field), "property", or the name of the
    method that first assigns `self.X`.
    """

    kind: str
    parameters: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    strings: tuple[str, ...] = ()
    where: str = ""

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Signature:
        lists = ("parameters", "bases", "strings")
        tuples: dict[str, Any] = {name: tuple(record.get(name, ())) for name in lists}
        return cls(record["kind"], where=record.get("where", ""), **tuples)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return tuple(p.removeprefix(_KEYWORD_ONLY).removesuffix("=") for p in self.parameters)

    @property
    def required(self) -> tuple[str, ...]:
        """The parameters a caller has to give; `*args` and `**kwargs` are never among them."""
        return tuple(
            p.removeprefix(_KEYWORD_ONLY)
            for p in self.parameters
            if not p.endswith("=") and (p.startswith(_KEYWORD_ONLY) or not p.startswith("*"))
        )

    @property
    def takes_any_keyword(self) -> bool:
        return any(p.startswith("**") for p in self.parameters)


def probe(root: Path) -> dict[str, Signature]:
    """The signatures of everything in RELIED_ON found under `root`, the vllm package folder.

    A symbol that is absent is absent from the result.

    Raises:
        FileNotFoundError: `root` holds no vLLM package.
    """
    if not (root / "__init__.py").is_file():
        raise FileNotFoundError(f"{root} is not a vllm package folder (no __init__.py in it)")
    found = {}
    for reliance in RELIED_ON:
        for symbol in filter(None, (reliance.symbol, reliance.later)):
            module, _, qualified = symbol.partition(":")
            tree = parse(root, module)
            signature = _find(root, tree, qualified.split(".")) if tree is not None else None
            if signature is not None:
                # A registry's whole content would only make snapshots long.
                keep = signature.strings if reliance.contains else ()
                found[symbol] = replace(signature, strings=keep)
    parse.cache_clear()
    return found


def missing(root: Path) -> list[str]:
    """What `root` lacks of what we rely on, one line each; empty means compatible.

    Raises:
        FileNotFoundError: `root` holds no vLLM package.
    """
    return evaluate(probe(root))


def evaluate(found: Mapping[str, Signature]) -> list[str]:
    """Compare a probe's outcome, fresh or recorded, with RELIED_ON; one line per difference."""
    lines = []
    for reliance in RELIED_ON:
        signature = found.get(reliance.symbol) or found.get(reliance.later)
        problems = (
            ["not found in this vLLM"] if signature is None else _compare(reliance, signature)
        )
        lines += [
            f"{reliance.symbol}: {problem} (needed by {reliance.needed_by}: {reliance.reason})"
            for problem in problems
        ]
    return lines


def _compare(reliance: Reliance, signature: Signature) -> Iterator[str]:
    if signature.kind not in reliance.kinds:
        yield f"is now a {signature.kind}, expected {' or '.join(reliance.kinds)}"
        return
    for base in reliance.bases:
        if base not in signature.bases:
            yield f"no longer derives from {base}, only from {', '.join(signature.bases) or '-'}"
    for string in reliance.contains:
        if string not in signature.strings:
            yield f"no longer contains {string!r}"
    if "function" not in reliance.kinds:
        return
    names = signature.parameter_names
    known = reliance.parameters
    if not signature.takes_any_keyword:
        for name in known:
            if name not in names:
                yield f"parameter {name!r} is gone or renamed; it now takes ({', '.join(names)})"
    for name in signature.required:
        if name not in known and not reliance.passes_on:
            yield f"has a new required parameter {name!r}"
    if reliance.overridden:
        order = tuple(name for name in names if name in known)
        if sorted(order) == sorted(known) and order != known:
            yield f"parameters changed their order to ({', '.join(names)})"


@cache
def parse(root: Path, module: str) -> ast.Module | None:
    below = root.joinpath(*module.split(".")[1:])
    for path in (below.with_suffix(".py"), below / "__init__.py"):
        if path.is_file():
            return ast.parse(path.read_text(encoding="utf-8"))
    return None


def _find(root: Path, tree: ast.Module, names: list[str]) -> Signature | None:
    if len(names) == 1:
        return _describe(definition(tree.body, names[0]), tree)
    owner = definition(tree.body, names[0])
    if not isinstance(owner, ast.ClassDef):
        return None
    return _member(owner, names[1]) or _inherited(root, tree, owner, names[1])


def _inherited(root: Path, tree: ast.Module, owner: ast.ClassDef, name: str) -> Signature | None:
    """A member of the classes of vLLM that a class derives from."""
    for base in owner.bases:
        if not isinstance(base, ast.Name):
            continue
        node = definition(tree.body, base.id)
        place: ast.Module | None = tree
        names = [base.id, name]
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            place = parse(root, module) if module.startswith("vllm.") else None
            names[0] = next(a.name for a in node.names if (a.asname or a.name) == base.id)
        found = _find(root, place, names) if place is not None else None
        if found is not None:
            return found
    return None


def _member(owner: ast.ClassDef, name: str) -> Signature | None:
    """A member that a class itself declares or assigns."""
    node = definition(owner.body, name)
    if isinstance(node, _Function):
        if _decorated(node, "property"):
            return Signature("attribute", where="property")
        parameters = _parameters(node.args)
        static = _decorated(node, "staticmethod")
        return Signature("function", parameters if static else parameters[1:])
    if node is not None:
        return Signature("attribute", where="class")
    return _assigned_on_self(owner, name)


def _decorated(node: _Function, name: str) -> bool:
    return any(isinstance(d, ast.Name) and d.id == name for d in node.decorator_list)


def _describe(node: ast.stmt | None, tree: ast.Module) -> Signature | None:
    if node is None:
        return None
    if isinstance(node, _Function):
        return Signature("function", _parameters(node.args))
    if isinstance(node, ast.ClassDef):
        return Signature("class", bases=tuple(ast.unparse(base) for base in node.bases))
    if isinstance(node, ast.ImportFrom):
        return Signature("import")
    return Signature("value", strings=tuple(sorted(_strings(node, tree))))


def definition(body: list[ast.stmt], name: str) -> ast.stmt | None:
    """The last statement that binds `name`: of `@overload`s the one with the body."""
    result: ast.stmt | None = None
    for node in body:
        if isinstance(node, _Function | ast.ClassDef) and node.name == name:
            # A property's setter or deleter has the name of the property and hides its getter.
            is_setter = isinstance(node, _Function) and any(
                isinstance(d, ast.Attribute) for d in node.decorator_list
            )
            result = result if is_setter and result is not None else node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                result = node
        elif isinstance(node, ast.ImportFrom) and any(
            (alias.asname or alias.name) == name for alias in node.names
        ):
            result = node
    return result


def _parameters(arguments: ast.arguments) -> tuple[str, ...]:
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    first_default = len(positional) - len(arguments.defaults)
    result = [name + "=" * (i >= first_default) for i, name in enumerate(positional)]
    if arguments.vararg is not None:
        result.append(f"*{arguments.vararg.arg}")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        result.append(_KEYWORD_ONLY + argument.arg + "=" * (default is not None))
    if arguments.kwarg is not None:
        result.append(f"**{arguments.kwarg.arg}")
    return tuple(result)


def _assigned_on_self(owner: ast.ClassDef, name: str) -> Signature | None:
    for method in owner.body:
        if not isinstance(method, _Function):
            continue
        for node in ast.walk(method):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and node.attr == name
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            ):
                return Signature("attribute", where=method.name)
    return None


def _strings(node: ast.stmt, tree: ast.Module) -> set[str]:
    """String constants in a value, following names bound in the same module (nested Literals)."""
    result: set[str] = set()
    value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
    for child in ast.walk(value) if value is not None else ():
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            result.add(child.value)
        elif isinstance(child, ast.Name):
            inner = definition(tree.body, child.id)
            if isinstance(inner, ast.Assign | ast.AnnAssign) and inner is not node:
                result |= _strings(inner, tree)
    return result
