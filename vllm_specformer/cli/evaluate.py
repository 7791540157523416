"""`specformer eval`: what a head is worth, offline and in the engine (see docs/evaluate.md)."""

from __future__ import annotations

from vllm_specformer.cli.common import INTERRUPTED, say, write_json
from vllm_specformer.evaluation.settings import EvalSettings

SETTINGS = EvalSettings


def run(settings: EvalSettings) -> int:
    """Evaluate; exit code 0, 1 if the engine disagrees with the replay, 130 after Ctrl-C."""
    from vllm_specformer.data.files import write_atomic
    from vllm_specformer.evaluation.evaluate import evaluate
    from vllm_specformer.evaluation.report import plot, print_report

    try:
        report = evaluate(settings, say=say)
    except KeyboardInterrupt:
        say("\ninterrupted; nothing was written")
        return INTERRUPTED
    print_report(report)
    if settings.json_file is not None:
        write_json(settings.json_file, report)
    if settings.plot is not None:
        write_atomic(settings.plot, plot(report))
    return 0 if all(row["agrees"] for row in report["engine"]) else 1
