"""`specformer families`: the models a head can be trained for and served with."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from vllm_specformer.families import RECORD, Families, Family, read_families
from vllm_specformer.hooks import HandedOut
from vllm_specformer.settings import CommandSettings, Flag, Spelling

if TYPE_CHECKING:
    from typing import Self

_ROOT = "vllm.model_executor.models."
TRIED = "families-tried.csv"


class FamiliesSettings(CommandSettings):
    """What to do with the list; one thing at a time."""

    all: bool = Field(False, description="List the refused ones too, with reasons.")
    as_json: Annotated[bool, Flag(name="--json")] = Field(
        False, description="Print the whole list as JSON."
    )
    record: bool = Field(
        False,
        description="Make the list anew from the installed vLLM and Transformers (maintainers).",
    )
    update: Annotated[tuple[Path, Path], Spelling(("PAGE", "RESULTS"))] | None = Field(
        None, description="Write list and results into docs/families.md (maintainers)."
    )

    @model_validator(mode="after")
    def _one_thing(self) -> Self:
        self.check_alternatives("all", "as_json", "record", "update")
        return self


SETTINGS = FamiliesSettings


def run(settings: FamiliesSettings) -> int:
    """Print the list, or write it."""
    if settings.record:
        RECORD.write_text(make_list().to_json(), encoding="utf-8")
        read_families.cache_clear()
    families = read_families()
    if settings.as_json:
        print(families.to_json(), end="")
    elif settings.update:
        path, results = settings.update
        page = updated(path.read_text(encoding="utf-8"), families, results)
        path.write_text(page, encoding="utf-8")
    else:
        print(as_text(families, refused=settings.all))
    return 0


def make_list() -> Families:
    """Look at the installed vLLM and Transformers; half a minute."""
    import transformers

    from vllm_specformer.engine.compat.handed_out import handed_out
    from vllm_specformer.engine.compat.target_classes import target_classes
    from vllm_specformer.engine.compat.versions import installed_vllm, vllm_root
    from vllm_specformer.training.buildable import model_types, obstacles

    classes, types = target_classes(vllm_root()), model_types()
    wanted = sorted(c.architecture for c in classes if c.hands_out_states)
    found = obstacles({name: types[name] for name in wanted if name in types})
    nothing = HandedOut(first=False, last=False)
    states = dict.fromkeys(classes, nothing)
    for c in classes:
        if not c.hands_out_states:
            continue
        if (handed := handed_out(vllm_root(), c.module, c.name)) is None:
            unknown = "which states vLLM's class hands out was not found"
            found[c.architecture] = found.get(c.architecture) or unknown
        else:
            states[c] = handed
    families = tuple(
        Family(
            architecture=c.architecture,
            served_by=f"{c.module.removeprefix(_ROOT)}:{c.name}",
            hands_out_states=c.hands_out_states,
            wraps_transformers=c.wraps_transformers,
            first_state=states[c].first,
            last_state=states[c].last,
            model_type=types.get(c.architecture),
            obstacle=found.get(c.architecture, ""),
        )
        for c in classes
    )
    return Families(installed_vllm()[1], transformers.__version__, families)


def as_text(families: Families, refused: bool) -> str:
    """The list for a terminal."""
    width = max(len(family.architecture) for family in families.families)
    lines = [f"vLLM {families.vllm}, Transformers {families.transformers}"]
    for family in families.families:
        if not family.refusal:
            lines.append(f"{family.architecture:<{width}}  hooks {family.default_hooks}")
        elif refused:
            lines.append(f"{family.architecture:<{width}}  refused: {family.refusal}")
    supported = sum(not family.refusal for family in families.families)
    lines.append(f"{supported} of {len(families.families)} architectures of vLLM's registry")
    return "\n".join(lines)


def updated(page: str, families: Families, results: Path) -> str:
    """The page with the results of `make test-families` and the lists between its marks.

    Beside the results lies `families-tried.csv`: architectures that were tried and not served,
    and why.
    """
    header, *rows = _read(results)
    page = _replaced(page, "results", _markdown(header, rows))
    ran = {row[header.index("architecture")] for row in rows}
    why = dict(row for row in _read(results.with_name(TRIED))[1:])
    supported = [family for family in families.families if not family.refusal]
    table = _markdown(
        ["architecture", "model type", "vLLM's class", "default hooks", "here"],
        [
            [
                f.architecture,
                str(f.model_type),
                "Transformers" if f.wraps_transformers else f"`{f.served_by}`",
                f.default_hooks,
                "served" if f.architecture in ran else _by_shape(why.get(f.architecture)),
            ]
            for f in supported
        ],
    )
    about = (
        f"vLLM {families.vllm} and Transformers {families.transformers}: {len(supported)} of the "
        f"{len(families.families)} architectures in vLLM's registry, {len(ran)} of them served "
        "here.\n\n"
    )
    refused: dict[str, list[str]] = {}
    for family in families.families:
        if family.refusal:
            refused.setdefault(family.refusal, []).append(family.architecture)
    reasons = [[reason, ", ".join(names)] for reason, names in sorted(refused.items())]
    page = _replaced(page, "refused", _markdown(["why", "architectures"], reasons))
    return _replaced(page, "list", about + table)


def _by_shape(reason: str | None) -> str:
    return f"by shape; tried: {reason}" if reason else "by shape"


def _read(path: Path) -> list[list[str]]:
    """A CSV file's rows; none of a file that is not there."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _replaced(page: str, name: str, content: str) -> str:
    """Put `content` between the comments that open and close part `name`."""
    before, _, rest = page.partition(f"<!-- {name} -->\n")
    _, _, after = rest.partition(f"<!-- /{name} -->")
    return f"{before}<!-- {name} -->\n{content}<!-- /{name} -->{after}"
