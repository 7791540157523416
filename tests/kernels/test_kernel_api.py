"""docs/kernel-api.md is what the kernels' docstrings say, and they say what is asked of them."""

from __future__ import annotations

import inspect

from support.kernel_api import PAGE, described, modules, page


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "make references"


def test_every_public_name_has_a_docstring() -> None:
    for module in modules():
        for name in module.__all__:
            thing = getattr(module, name)
            assert not callable(thing) or inspect.getdoc(thing), f"{module.__name__}.{name}"


def test_sections_become_lists() -> None:
    text = "Adds.\n\nArgs:\n    a: one\n        and more.\n    b: two.\n\nReturns:\n    a + b."
    assert described(text) == (
        "Adds.\n\nArgs:\n\n- `a`: one\n    and more.\n- `b`: two.\n\nReturns: a + b.\n"
    )
