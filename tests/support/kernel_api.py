"""Writes docs/kernel-api.md, the public functions of the kernels, from their docstrings.

cd tests && python -m support.kernel_api
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

from support.paths import ROOT
from vllm_specformer.data.files import write_atomic

PAGE = ROOT / "docs" / "kernel-api.md"
PACKAGE = ROOT / "kernels" / "specformer_kernels"
HEAD = """# The kernels' API

Generated from the docstrings of `specformer_kernels` by `tests/support/kernel_api.py`; do not
edit. Every function takes the Triton kernel for tensors on a GPU and the PyTorch reference
elsewhere. What each reads, writes and computes at the least is in its README;
[kernels.md](kernels.md) and [verification.md](verification.md) have the ideas.
"""
# The headings of a docstring's sections.
SECTION = re.compile(r"^(Args|Returns|Raises):$", re.MULTILINE)


def page() -> str:
    return "\n".join([HEAD, *(section(module) for module in modules())])


def modules() -> Iterator[ModuleType]:
    for path in sorted(PACKAGE.glob("*/__init__.py")):
        yield import_module(f"specformer_kernels.{path.parent.name}")


def section(module: ModuleType) -> str:
    name = module.__name__.rpartition(".")[2]
    readme = PACKAGE / name / "README.md"
    link = f" [README](../{readme.relative_to(ROOT)})" if readme.exists() else ""
    parts = [f"## {name}\n{inspect.getdoc(module)}{link}\n"]
    for public in module.__all__:
        thing = getattr(module, public)
        if inspect.isfunction(thing):
            parts.append(function(public, thing))
        else:
            parts.append(f"### `{public}`\n{summary(thing)}\n")
    return "\n".join(parts)


def summary(thing: object) -> str:
    if inspect.isclass(thing):
        return (inspect.getdoc(thing) or "").strip()
    return f"`{thing!r}`"


def function(name: str, thing: object) -> str:
    signature = inspect.signature(thing)  # type: ignore[arg-type]
    arguments = [f"    {one}," for one in map(str, signature.parameters.values())]
    result = inspect.formatannotation(signature.return_annotation).strip("'\"")
    code = "\n".join([f"{name}(", *arguments, f") -> {result}"])
    text = inspect.getdoc(thing) or ""
    return f"### `{name}`\n```python\n{plain(code)}\n```\n{described(text)}\n"


def plain(code: str) -> str:
    """Annotations are kept as text; the quotes around them say nothing."""
    return re.sub(r": '([^']*)'", r": \1", code)


def described(text: str) -> str:
    """A docstring as Markdown: its sections as lists."""
    first, *rest = SECTION.split(text)
    parts = [first.strip()]
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        lines = inspect.cleandoc(body)
        if title == "Returns":
            parts.append(f"Returns: {lines}")
        else:
            items = re.sub(r"^(\w+): ", r"- `\1`: ", lines, flags=re.MULTILINE)
            parts.append(f"{title}:\n\n{items}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    write_atomic(PAGE, page().encode())
