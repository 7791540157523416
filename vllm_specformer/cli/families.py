"""`specformer families`: the models a head can be trained for and served with."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from vllm_specformer.families import RECORD, Families, Family, read_families
from vllm_specformer.hooks import HandedOut

_ROOT = "vllm.model_executor.models."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="list the refused ones too, with reasons")
    what.add_argument("--json", action="store_true", help="print the whole list as JSON")
    what.add_argument(
        "--record",
        action="store_true",
        help="make the list anew from the installed vLLM and Transformers (maintainers)",
    )
    what.add_argument(
        "--update",
        nargs=2,
        type=Path,
        metavar=("PAGE", "RESULTS"),
        help="write list and results into docs/families.md (maintainers)",
    )


def run(options: argparse.Namespace) -> int:
    """Print the list, or write it."""
    if options.record:
        RECORD.write_text(make_list().to_json(), encoding="utf-8")
        read_families.cache_clear()
    families = read_families()
    if options.json:
        print(families.to_json(), end="")
    elif options.update:
        path, results = options.update
        page = updated(path.read_text(encoding="utf-8"), families, results)
        path.write_text(page, encoding="utf-8")
    else:
        print(as_text(families, refused=options.all))
    return 0


def make_list() -> Families:
    """Look at the installed vLLM and Transformers; half a minute."""
    import transformers

    from vllm_specformer.engine.compat.handed_out import handed_out
    from vllm_specformer.engine.compat.target_classes import target_classes
    from vllm_specformer.engine.compat.versions import installed_vllm, vllm_root
    from vllm_specformer.training.buildable import model_types, obstacles

    classes, types = target_classes(vllm_root()), model_types()
    wanted = {c.architecture: types.get(c.architecture) for c in classes if c.hands_out_states}
    found = obstacles(sorted({t for t in wanted.values() if t is not None}))
    nothing = HandedOut(first=False, last=False)
    states = dict.fromkeys(classes, nothing)
    for c in classes:
        if c.hands_out_states:
            states[c] = handed_out(vllm_root(), c.module, c.name) or nothing
    families = tuple(
        Family(
            architecture=c.architecture,
            served_by=f"{c.module.removeprefix(_ROOT)}:{c.name}",
            hands_out_states=c.hands_out_states,
            wraps_transformers=c.wraps_transformers,
            first_state=states[c].first,
            last_state=states[c].last,
            model_type=types.get(c.architecture),
            obstacle=found.get(types.get(c.architecture, ""), "") if c.hands_out_states else "",
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
    """The page with the results of `make test-families` and the list between its marks."""
    with results.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    page = _replaced(page, "results", _markdown(header, rows))
    supported = [family for family in families.families if not family.refusal]
    served_by = ["Transformers" if f.wraps_transformers else f"`{f.served_by}`" for f in supported]
    table = _markdown(
        ["architecture", "model type", "vLLM's class", "default hooks"],
        [
            [f.architecture, str(f.model_type), by, f.default_hooks]
            for f, by in zip(supported, served_by, strict=True)
        ],
    )
    about = (
        f"vLLM {families.vllm} and Transformers {families.transformers}: {len(supported)} of the "
        f"{len(families.families)} architectures in vLLM's registry.\n\n"
    )
    return _replaced(page, "list", about + table)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _replaced(page: str, name: str, content: str) -> str:
    """Put `content` between the comments that open and close part `name`."""
    before, _, rest = page.partition(f"<!-- {name} -->\n")
    _, _, after = rest.partition(f"<!-- /{name} -->")
    return f"{before}<!-- {name} -->\n{content}<!-- /{name} -->{after}"
