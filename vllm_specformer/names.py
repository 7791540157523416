"""Names that files, vLLM and this package know a head by. Nothing is imported here."""

from __future__ import annotations

ARCHITECTURE = "SpecFormerDraftModel"
SPECULATORS_TYPE = "specformer"


def describes_head(content: object) -> bool:
    """Whether the content of a `config.json` is a SpecFormer head's: the one test for "ours".

    By kind or by architecture: a head whose file lost one of the two is still refused by name.
    """
    if not isinstance(content, dict):
        return False
    architectures = content.get("architectures")
    return content.get("speculators_model_type") == SPECULATORS_TYPE or (
        isinstance(architectures, (list, tuple)) and ARCHITECTURE in architectures
    )
