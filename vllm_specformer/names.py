"""Names that files, vLLM and this package know a head by. Nothing is imported here."""

from __future__ import annotations

ARCHITECTURE = "SpecFormerDraftModel"
SPECULATORS_TYPE = "specformer"
