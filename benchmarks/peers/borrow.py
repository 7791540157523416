"""Let the environment that runs this see another's packages, behind its own."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def borrow(other: Path) -> Path:
    """Write the file by which Python finds them; returns it."""
    own = Path(sysconfig.get_paths()["purelib"])
    found = sorted(other.resolve().glob("lib/python*/site-packages"))
    if len(found) != 1:
        raise SystemExit(f"{other}: no environment")
    link = own / "borrowed.pth"
    link.write_text(f"{found[0]}\n")
    return link


if __name__ == "__main__":
    import sys

    print(borrow(Path(sys.argv[1])))
