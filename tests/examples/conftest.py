"""The example scripts import each other by plain names, as they do when run as scripts."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / "server"), str(ROOT / "benchmarks")]
# Behind all packages: names such as `build` and `install` are common.
sys.path.append(str(ROOT / "examples" / "training" / "bundled_pair"))
