"""Let the environment that runs this see another's packages, behind its own."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

OPENMP = Path("lib") / "libiomp5.so"  # vLLM's engines are started with it (serving/server.py)


def borrow(other: Path) -> Path:
    """Write the file by which Python finds them; returns it."""
    own = Path(sysconfig.get_paths()["purelib"])
    found = sorted(other.resolve().glob("lib/python*/site-packages"))
    if len(found) != 1:
        raise SystemExit(f"{other}: no environment")
    link = own / "borrowed.pth"
    link.write_text(f"{found[0]}\n")
    openmp = Path(sys.prefix) / OPENMP
    if (other / OPENMP).is_file() and not openmp.exists():
        openmp.symlink_to((other / OPENMP).resolve())
    return link


if __name__ == "__main__":
    print(borrow(Path(sys.argv[1])))
