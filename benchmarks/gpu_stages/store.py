"""Results on disk: one JSON file per stage, a unit at a time, so that a run can go on later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_specformer.data.files import write_atomic

Result = dict[str, Any]


class Store:
    """The results in one directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, stage: str) -> dict[str, Result]:
        """Every unit of the stage that has a result or failed."""
        path = self._path(stage)
        return json.loads(path.read_text())["units"] if path.is_file() else {}

    def finished(self, stage: str) -> dict[str, Result]:
        """The units that need not run again."""
        return {name: unit for name, unit in self.read(stage).items() if not unit.get("failure")}

    def add(self, stage: str, unit: str, result: Result) -> None:
        """Write one unit's result, in place of an earlier one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        units = self.read(stage) | {unit: result}
        content = json.dumps({"stage": stage, "units": units}, indent=1) + "\n"
        write_atomic(self._path(stage), content.encode())

    def summarise(self, rows: list[Result]) -> None:
        """Write stage d's rows, measured beside predicted."""
        content = json.dumps(rows, indent=1) + "\n"
        write_atomic(self.folder / "summary.json", content.encode())

    def _path(self, stage: str) -> Path:
        return self.folder / f"stage-{stage}.json"
