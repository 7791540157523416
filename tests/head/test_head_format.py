"""docs/head-format.md is what a head's configuration takes."""

from __future__ import annotations

from support.head_format import PAGE, page
from vllm_specformer.head_fields import HeadFields


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "make references"


def test_every_field_is_described() -> None:
    for field in HeadFields.model_fields.values():
        assert field.description
