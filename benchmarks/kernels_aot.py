"""What every kernel uses on GPUs that are not at hand: registers, shared memory, spills.

Compiles each kernel at the tile sizes its launcher chooses, for every dtype and architecture, and
writes benchmarks/results/kernels-aot.csv. No GPU takes part. Fails where a kernel spills registers
on an NVIDIA target or wants more shared memory than the device has.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import aot
import kernel_cases
import triton
from tqdm import tqdm

RESULT = Path(__file__).parent / "results" / "kernels-aot.csv"


@dataclass(frozen=True)
class Row:
    """A compiled kernel; registers and spill per thread."""

    kernel: str
    dtype: str
    arch: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    case: str
    tiles: str
    num_warps: int
    num_stages: int
    triton: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.kernel, self.dtype, self.arch, self.case, self.tiles

    def problems(self) -> Iterator[str]:
        """What keeps the kernel from running on the device, or from running well."""
        where = f"{self.kernel} ({self.case}, {self.dtype}, {self.arch})"
        if self.shared_bytes > aot.SHARED_MEMORY[self.arch]:
            yield f"{where}: {self.shared_bytes} bytes of shared memory exceed the device's"
        if self.spill_bytes and self.arch.startswith("sm_"):
            yield f"{where}: spills {self.spill_bytes} bytes a thread"


@dataclass(frozen=True)
class Job:
    """One row to be: the launches of a kernel in a case that share its tile sizes."""

    case: str
    dtype: str
    arch: str
    launches: tuple[aot.Launch, ...]

    @property
    def key(self) -> tuple[str, ...]:
        return self.launches[0].name, self.dtype, self.arch, self.case, self.launches[0].tiles

    def compile(self) -> Row:
        """Compile every launch; the row holds the largest of each figure."""
        kernels = [aot.compile_launch(launch, self.arch) for launch in self.launches]
        usages = [aot.usage(kernel, self.arch) for kernel in kernels]
        metadata = kernels[0].metadata
        return Row(
            kernel=self.launches[0].name,
            dtype=self.dtype,
            arch=self.arch,
            registers=max(usage.registers for usage in usages),
            shared_bytes=max(usage.shared_bytes for usage in usages),
            spill_bytes=max(usage.spill_bytes for usage in usages),
            case=self.case,
            tiles=self.launches[0].tiles,
            num_warps=metadata.num_warps,
            num_stages=metadata.num_stages,
            triton=triton.__version__,
        )


def jobs(
    ops: Iterable[str] | None = None,
    dtypes: Iterable[str] = tuple(aot.DTYPES),
    archs: Iterable[str] = tuple(aot.TARGETS),
) -> Iterator[Job]:
    """Everything there is to compile, in the order of the table; calls the launchers."""
    cases = kernel_cases.modules()
    archs = tuple(archs)
    for op in cases if ops is None else ops:
        for dtype in dtypes:
            for case, call in cases[op].aot_calls(aot.DTYPES[dtype]):
                groups: dict[tuple[str, str], list[aot.Launch]] = {}
                for launch in aot.launches_of(call):
                    groups.setdefault((launch.name, launch.tiles), []).append(launch)
                for launches in groups.values():
                    for arch in archs:
                        yield Job(case, dtype, arch, tuple(launches))


def read(path: Path = RESULT) -> list[Row]:
    integers = ("registers", "shared_bytes", "spill_bytes", "num_warps", "num_stages")
    with path.open(newline="") as file:
        return [
            Row(**(line | {name: int(line[name]) for name in integers}))  # type: ignore[arg-type]
            for line in csv.DictReader(file)
        ]


def write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", help="this op only (repeat); prints, writes none")
    parser.add_argument("--out", type=Path, help=f"file to write (default: {RESULT.name})")
    args = parser.parse_args(arguments)
    todo = list(jobs(args.op))
    rows = []
    for job in (bar := tqdm(todo, unit="kernel", disable=None)):
        bar.set_postfix_str(f"{job.launches[0].name} {job.dtype} {job.arch}")
        rows.append(job.compile())
    out = args.out or (None if args.op else RESULT)
    if out:
        write(out, rows)
        print(f"wrote {out}")
    else:
        for row in rows:
            print(f"{row.registers:4} registers {row.shared_bytes:7} shared", *row.key)
    largest = max((row.spill_bytes for row in rows if row.arch.startswith("sm_")), default=0)
    kernels = len({row.kernel for row in rows})
    print(f"{len(rows)} rows of {kernels} kernels; largest spill on NVIDIA: {largest} bytes")
    problems = [problem for row in rows for problem in row.problems()]
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
