"""`specformer distill`: prompts in, the target's own answers out."""

from __future__ import annotations

import shlex
import signal
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_specformer.cli.common import INTERRUPTED, say
from vllm_specformer.distill.settings import DistillSettings

if TYPE_CHECKING:
    from vllm_specformer.data.manifest import Manifest


SETTINGS = DistillSettings


def run(settings: DistillSettings) -> int:
    """Distill; exit code 0 when the directory is complete, 130 when interrupted."""
    from vllm_specformer.distill.distill import distill, safe
    from vllm_specformer.errors import SpecFormerError

    # Batch systems send SIGTERM before SIGKILL: end as on Ctrl-C, with the engine shut down.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        manifest = distill(settings, report=say)
    except KeyboardInterrupt:
        say(f"\ninterrupted. {safe(settings.out)}")
        return INTERRUPTED
    except SpecFormerError:
        raise
    except Exception:
        say(f"\nunexpected error, see below. {safe(settings.out)}")
        raise
    print(summary(settings, manifest))
    return 0


def summary(settings: DistillSettings, manifest: Manifest) -> str:
    """What the directory holds and what to do with it."""
    from vllm_specformer.data.shards import cut_answers
    from vllm_specformer.distill.distill import in_words

    counts = manifest.counts
    lines = [
        f"{settings.out}: {counts.conversations:,} conversations, {counts.tokens:,} tokens, "
        f"{counts.answer_tokens:,} of them in {counts.answers:,} answers of the target; "
        f"{counts.sampled:,} conversations drawn at a temperature above 0"
    ]
    cut = cut_answers(settings.out, manifest)
    of_all = f"of {counts.answers:,} answers"
    if cut.at_max_tokens:
        longest = manifest.sampling.max_tokens
        lines.append(f"{cut.at_max_tokens:,} {of_all} reached --max-tokens {longest}")
    if cut.at_context:
        lines.append(f"{cut.at_context:,} {of_all} filled the context of {manifest.context} tokens")
    if counts.skipped:
        lines.append(f"warning: left out: {in_words(counts.skipped)}")
    if counts.cut:
        lines.append(f"without their later turns: {in_words(counts.cut)}")
    command = ["specformer", "train", "--target", settings.target, "--data", str(settings.out)]
    lines.append(f"next: {shlex.join(command)} --out HEAD")
    return "\n".join(lines)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
