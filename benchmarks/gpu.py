"""All checks and benchmarks on a GPU, resumably, within a time budget.

    python benchmarks/gpu.py                   # all stages, as far as 8 minutes reach
    python benchmarks/gpu.py                   # goes on where the last call stopped
    python benchmarks/gpu.py --stage d --minutes 30
    python benchmarks/gpu.py --dry             # without a GPU: toy sizes in Triton's interpreter
    python benchmarks/gpu.py --predictions     # of stage d, as in docs/gpu-predictions.md

Stages: a environment, b kernels, c the bundled pair's output, drafts and acceptance, d throughput
against other methods at equal acceptance, e a profile of the draft step. A stage is made of units,
each a process with a result of its own; what has a result is not run again unless --again. They
run in the order of their worth (`gpu_stages/plan.py`). Results are
benchmarks/results/gpu/stage-*.json, logs are build/gpu/*.log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_stages.plan import STAGES, Unit, units
from gpu_stages.store import Store

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
SCRATCH = ROOT / "build" / "gpu"
DRY = ROOT / "build" / "gpu-dry"
LOG_LINES = 20


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.predictions:
        from gpu_stages.prediction_tables import tables, tree_tables

        print(tables(), tree_tables(), sep="\n\n")
        return 0
    from gpu_stages.report import print_report

    store = Store(args.out)
    wanted = [
        unit
        for unit in units(args.dry, args.out, args.scratch)
        if unit.stage in args.stage and args.only in unit.name
    ]
    failed = run_all(wanted, store, args)
    print_report(store, args.dry)
    left = [unit for unit in wanted if unit.name not in store.read(unit.stage)]
    if left:
        print(f"{len(left)} of {len(wanted)} units are left; the same command goes on with them")
    return 1 if failed else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", nargs="+", default=list(STAGES), choices=STAGES, metavar="a..e")
    parser.add_argument("--only", default="", metavar="TEXT", help="units with this in their name")
    parser.add_argument("--minutes", type=float, default=8, help="start nothing that goes past (8)")
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--dry", action="store_true", help="toy sizes on a CPU, no times")
    parser.add_argument("--predictions", action="store_true", help="print them and end")
    parser.add_argument("--out", type=Path, help="of the results")
    parser.add_argument("--scratch", type=Path, help="of checkpoints, logs and traces")
    args = parser.parse_args(arguments)
    args.out = (args.out or (DRY if args.dry else RESULTS)).resolve()
    args.scratch = (args.scratch or (DRY if args.dry else SCRATCH)).resolve()
    return args


def run_all(wanted: Sequence[Unit], store: Store, args: argparse.Namespace) -> int:
    """Run what is missing and fits the time; how many failed."""
    deadline = time.monotonic() + 60 * args.minutes
    failed = 0
    for unit in wanted:
        if not args.again and unit.name in store.finished(unit.stage):
            continue
        left = deadline - time.monotonic()
        if left < unit.expected:
            continue
        # A dry run may share a small machine with others; its units take what they take.
        result = run(unit, left if args.dry else min(unit.limit, left), args)
        store.add(unit.stage, unit.name, result)
        failed += "failure" in result
        print(f"{unit.stage}, {unit.name}: {result['seconds']:.0f} s", flush=True)
    return failed


def run(unit: Unit, limit: float, args: argparse.Namespace) -> dict[str, object]:
    """One unit's result, or why there is none."""
    args.scratch.mkdir(parents=True, exist_ok=True)
    stem = args.scratch / f"{unit.stage}-{unit.name}".replace(" ", "-").replace(",", "")
    order, result, log = (stem.with_suffix(f".{kind}") for kind in ("order", "result", "log"))
    result.unlink(missing_ok=True)
    interpreted = args.dry and not unit.on_v1
    order.write_text(
        json.dumps({"module": unit.module, "options": unit.options, "interpreted": interpreted})
    )
    command = [sys.executable, "-m", "gpu_stages.run_unit", str(order), str(result)]
    started = time.monotonic()
    with log.open("w") as output:
        failure = finish(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(unit, args.dry),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A group of its own: vLLM's engine is a process behind this one.
                start_new_session=True,
            ),
            limit,
        )
    if failure:
        tail = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        failure = "\n".join([f"{failure}, see {log}", *tail])
    found: dict[str, object] = {"failure": failure} if failure else json.loads(result.read_text())
    return found | {"seconds": round(time.monotonic() - started, 1)}


def finish(process: subprocess.Popen[bytes], limit: float) -> str | None:
    """Wait for a process and end what is left of its group; why it failed, if it did."""
    try:
        code = process.wait(limit)
        return f"exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment(unit: Unit, dry: bool) -> dict[str, str]:
    """This process's, with our folders on the path of vLLM's processes too."""
    folders = [str(ROOT / name) for name in ("benchmarks", "", "kernels", "tests")]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    found = os.environ | {"PYTHONPATH": path} | unit.environment
    if dry:
        found |= {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1",
        }
    return found


if __name__ == "__main__":
    sys.exit(main())
