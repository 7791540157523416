"""Checks every kernel against its reference on the device, then times it.

    python benchmarks/kernels.py --op grouped_rms_norm --quick

On a GPU: predictions first (least bytes over the copy bandwidth measured in this run, plus a fixed
cost per launch), then medians of CUDA events, beside what a user would take instead. Inputs are
rotated past the caches, and calls are replayed from a CUDA graph, as in serving; what reads results
on the host is timed call by call. Results go to benchmarks/results/gpu/kernels-<device>.{json,csv}.

Without a GPU: a smoke run of toy sizes in Triton's interpreter. The checks are real, the times mean
nothing, and no file is written unless --out names one.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import kernel_cases
import torch
from kernel_cases import Alternative, BenchCase
from kernel_report import Row, print_predictions, print_results, write
from kernel_timing import Timing, copy_bandwidth, error_of, rotation, time_calls
from specformer_kernels import interpreter
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results" / "gpu"
# From one kernel to the next in a CUDA graph; assumed before measuring, the same on every device.
LAUNCH_SECONDS = 2e-6
# Other implementations round in other places; this tells rounding from another result.
ALTERNATIVE_TOLERANCE = 2e-2
SEED = 42
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Task:
    """One case and the row that becomes of it."""

    case: BenchCase
    row: Row


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    on_gpu = args.device == "cuda"
    with nullcontext() if on_gpu else interpreter.interpreted():
        bandwidth = copy_bandwidth() if on_gpu else None
        tasks, failures = plan(args, bandwidth)
        rows = [task.row for task in tasks]
        report = describe(args) | {"rows": rows}
        if bandwidth:
            print(f"copy bandwidth: {bandwidth / 1e9:.0f} GB/s on {report['device']}")
            print_predictions(rows)
        if args.out:
            write(args.out, report)
        total = sum(3 + len(task.case.alternatives) for task in tasks)
        with tqdm(total=total, unit="step", disable=None) as bar:
            for task in tasks:
                measure(task, args, bar)
                if args.out:
                    write(args.out, report)
    print_results(rows)
    failures += [f"{r['op']}, {r['case']}: {r['failure']}" for r in rows if r["failure"]]
    if not on_gpu:
        print("smoke run: the checks are real, the times mean nothing")
    elif args.out:
        print(f"wrote {args.out}.json and .csv")
    print(*(f"FAILED {failure}\n" for failure in failures), sep="", end="", file=sys.stderr)
    return 1 if failures else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ops = list(kernel_cases.modules())
    parser.add_argument("--op", action="append", choices=ops, help="this op only (repeat)")
    parser.add_argument("--quick", action="store_true", help="a few sizes of each op")
    parser.add_argument("--check", action="store_true", help="compare only, time nothing")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, help="stem of the files to write")
    args = parser.parse_args(arguments)
    args.op = args.op or ops
    if args.device == "cuda" and not args.out:
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        args.out = RESULTS / f"kernels-{name}"
    return args


def describe(args: argparse.Namespace) -> Row:
    import triton

    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "launch_seconds": LAUNCH_SECONDS,
    }


def plan(args: argparse.Namespace, bandwidth: float | None) -> tuple[list[Task], list[str]]:
    """The cases with their predictions; an op that cannot say its cases is a failure."""
    tasks, failures = [], []
    for op in args.op:
        try:
            cases = kernel_cases.modules()[op].bench_cases(
                args.device, DTYPES[args.dtype], args.quick
            )
            tasks += [Task(case, prediction(op, case, args.dtype, bandwidth)) for case in cases]
        except Exception as error:
            failures.append(f"{op}: {_reason(error)}")
    return tasks, failures


def prediction(op: str, case: BenchCase, dtype: str, bandwidth: float | None) -> Row:
    seconds = case.launches * LAUNCH_SECONDS
    return {
        "op": op,
        "case": case.name,
        "dtype": dtype,
        "least_bytes": case.least_bytes,
        "launches": case.launches,
        "predicted_us": (case.least_bytes / bandwidth + seconds) * 1e6 if bandwidth else None,
        "aim": case.aim,
        "tolerance": case.tolerance,
        "copy_bytes_per_second": bandwidth,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "failure": None,
    }


def measure(task: Task, args: argparse.Namespace, bar: tqdm) -> None:
    """Check, then time if asked to; whatever goes wrong is noted in the row."""
    case, row = task.case, task.row
    bar.set_postfix_str(f"{row['op']} {row['case']}")
    position = bar.n
    try:
        expected, seconds = check(case, row)
        bar.update()
        if not (row["failure"] or args.check):
            # One run is enough where the time means nothing.
            known = None if args.device == "cuda" else Timing(seconds, seconds, seconds, "eager")
            time_case(case, row, expected, known, args.device, bar)
    except Exception as error:
        row["failure"] = _reason(error)
    bar.update(position + 3 + len(case.alternatives) - bar.n)
    gc.collect()


def seeded_inputs(case: BenchCase) -> tuple[Any, ...]:
    torch.manual_seed(SEED)
    return case.inputs()


def check(case: BenchCase, row: Row) -> tuple[Any, float]:
    """Compare on fresh inputs, with unwritten memory poisoned; what is right, and the seconds."""
    inputs = seeded_inputs(case)
    with interpreter.poisoned_empty():
        start = time.perf_counter()
        found = case.kernel(*inputs)
        seconds = time.perf_counter() - start
    del inputs
    expected = case.reference(*seeded_inputs(case))
    row["error"] = error_of(found, expected)
    if not row["error"] <= case.tolerance:
        row["failure"] = f"differs from the reference: {row['error']:.1e} > {case.tolerance:.1e}"
    return expected, seconds


def time_case(
    case: BenchCase, row: Row, expected: Any, known: Timing | None, device: str, bar: tqdm
) -> None:
    inputs = rotation(case.inputs, case.least_bytes, device)
    kernel = known or time_calls(case.kernel, inputs, device)
    bar.update()
    row["kernel"] = _timing(kernel)
    if device == "cuda":
        row["copy_share"] = case.least_bytes / kernel.seconds / row["copy_bytes_per_second"]
        if kernel.how != "graph":
            row["failure"] = "reads results on the host: no CUDA graph can hold it"
    row["others"] = {}
    reference = {"reference": Alternative(case.reference, is_comparable=False)}
    for name, other in {**reference, **case.alternatives}.items():
        row["others"][name] = time_other(other, case, inputs, expected, kernel, device)
        bar.update()


def time_other(
    other: Alternative | str,
    case: BenchCase,
    inputs: Sequence[tuple[Any, ...]],
    expected: Any,
    kernel: Timing,
    device: str,
) -> Row:
    """Its timing, or why there is none. Nothing that fails here is a fault of the kernel."""
    if isinstance(other, str):
        return {"note": other}
    if other.is_compiled:
        if device != "cuda":
            return {"note": "not compiled in a smoke run"}
        torch._dynamo.reset()
    prepare = other.prepare or (lambda *arguments: arguments)
    try:
        result = {}
        if other.is_comparable:
            error = error_of(other.call(*prepare(*seeded_inputs(case))), expected)
            if not error <= max(case.tolerance, ALTERNATIVE_TOLERANCE):
                result["note"] = f"differs: {error:.1e}"
        timing = time_calls(other.call, [prepare(*arguments) for arguments in inputs], device)
    except Exception as error:
        return {"note": _reason(error)}
    return _timing(timing) | {"times_kernel": timing.seconds / kernel.seconds} | result


def _timing(timing: Timing) -> Row:
    microseconds = {"us": timing.seconds, "low_us": timing.low, "high_us": timing.high}
    return {name: round(value * 1e6, 3) for name, value in microseconds.items()} | {
        "how": timing.how
    }


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


if __name__ == "__main__":
    sys.exit(main())
