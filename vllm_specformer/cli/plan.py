"""`specformer plan`: how many tokens to draft at each batch size (see docs/choosing-k.md)."""

from __future__ import annotations

from vllm_specformer.cli.common import INTERRUPTED, say, write_json
from vllm_specformer.planning.settings import PlanSettings

SETTINGS = PlanSettings


def run(settings: PlanSettings) -> int:
    """Print the plan; exit code 0, 130 after Ctrl-C."""
    from vllm_specformer.data.files import write_atomic
    from vllm_specformer.places import lasting
    from vllm_specformer.planning.plan import make_plan
    from vllm_specformer.planning.report import plot, print_plan

    try:
        plan = make_plan(settings, say=say)
    except KeyboardInterrupt:
        say("\ninterrupted; nothing was written")
        return INTERRUPTED
    head = lasting(settings.head) if settings.head else "HEAD"
    print_plan(plan, head)
    if settings.json_file is not None:
        write_json(settings.json_file, plan.to_json(head))
    if settings.plot is not None:
        write_atomic(settings.plot, plot(plan))
    return 0
