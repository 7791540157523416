"""Writes docs/head-format.md, the files of a head, from the fields' own descriptions.

cd tests && python -m support.head_format
"""

from __future__ import annotations

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from support.paths import ROOT
from vllm_specformer.config import _LAYER_FIELDS, FORMAT_VERSION
from vllm_specformer.data.files import write_atomic
from vllm_specformer.head_fields import HeadFields
from vllm_specformer.names import ARCHITECTURE, SPECULATORS_TYPE

PAGE = ROOT / "docs" / "head-format.md"
VERIFIER = {"target_name_or_path": "speculators_config.verifier.name_or_path"}
HEAD = f"""# The files of a head

Generated from `vllm_specformer/head_fields.py` by `tests/support/head_format.py`; do not edit.

A head is a directory, or a repository of the hub, in the *speculators* format (version
{FORMAT_VERSION}), which vLLM reads. Unknown fields, missing ones and values out of range are
refused by name before weights are loaded. `specformer check HEAD` judges a head from its files.

| file | what is in it |
|---|---|"""
FILES = {
    "`config.json`": "the fields below, with "
    f'`"speculators_model_type": "{SPECULATORS_TYPE}"` and `"architectures": ["{ARCHITECTURE}"]`',
    "`model.safetensors`": "the head's weights; embedding, final norm and lm_head are the "
    "target's and not in it",
    "`README.md`": "the card that `specformer train` writes: data, steps, acceptance by position",
    "`provenance.json`, `log.csv`, `training.png`": "how it was trained; nothing reads them when "
    "it is served",
}


def page() -> str:
    layer, top = [], []
    for name, field in HeadFields.model_fields.items():
        (layer if name in _LAYER_FIELDS else top).append(row(name, field))
    table = ["| field | type | default | |", "|---|---|---|---|"]
    return "\n".join(
        [
            HEAD,
            *(f"| {name} | {what} |" for name, what in FILES.items()),
            "\n## Choices of the head\nAt the top of `config.json`.\n",
            *table,
            *top,
            "\n## Its layer\nUnder `transformer_layer_config`.\n",
            *table,
            *layer,
            "",
        ]
    )


def row(name: str, field: FieldInfo) -> str:
    kind = getattr(field.annotation, "__name__", str(field.annotation))
    kind = str(field.annotation) if "[" in str(field.annotation) else kind
    kind = kind.replace("typing.", "").replace("|", "\\|")
    default = "" if field.default is PydanticUndefined else f"`{shown(field.default)}`"
    where = VERIFIER.get(name, name)
    cells = f"`{where}`", f"`{kind}`", default, field.description or ""
    return "| " + " | ".join(cells) + " |"


def shown(default: object) -> object:
    return list(default) if isinstance(default, tuple) else default


if __name__ == "__main__":
    write_atomic(PAGE, page().encode())
