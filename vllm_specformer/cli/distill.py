"""`specformer distill`: prompts in, the target's own answers out."""

from __future__ import annotations

import argparse
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_specformer.cli.arguments import (
    count,
    json_object,
    positive,
    share,
    temperature,
    top_p,
)
from vllm_specformer.cli.common import INTERRUPTED, fields_of, say

if TYPE_CHECKING:
    from vllm_specformer.data.manifest import Manifest
    from vllm_specformer.distill.distill import Options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what")
    what.add_argument("--target", required=True, help="directory or hub name of the model")
    what.add_argument("--revision", help="branch, tag or commit of a model of the hub")
    what.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        type=Path,
        metavar="FILE",
        help="JSONL, JSON or Parquet with messages, conversations, prompt or text",
    )
    what.add_argument("--out", required=True, type=Path, metavar="DIR", help="result directory")
    what.add_argument(
        "--max-prompts", type=positive, metavar="N", help="draw N of the prompts by --seed"
    )
    what.add_argument(
        "--max-bad-lines",
        type=count,
        metavar="N",
        help="malformed records that may be left out (default: 1%%, 10 in small files)",
    )
    what.add_argument(
        "--shard-size", type=positive, default=1000, metavar="N", help="prompts per file (1000)"
    )
    how = parser.add_argument_group("how answers are drawn")
    how.add_argument("--temperature", type=temperature, default=0.0, help="default: 0, greedy")
    how.add_argument(
        "--sampled-share",
        type=share,
        default=0.25,
        metavar="S",
        help="share of the prompts answered at --sampled-temperature instead (0.25)",
    )
    how.add_argument(
        "--sampled-temperature", type=temperature, default=1.0, metavar="T", help="default: 1"
    )
    how.add_argument("--top-p", type=top_p, default=1.0, help="where the temperature is not 0 (1)")
    how.add_argument(
        "--max-tokens", type=positive, default=1024, metavar="N", help="longest answer (1024)"
    )
    how.add_argument("--seed", type=int, default=0, help="of drawing prompts and answers (0)")
    how.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja template instead of the target's"
    )
    how.add_argument(
        "--chat-template-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="variables for the template, such as '{\"enable_thinking\": false}'",
    )
    engine = parser.add_argument_group("what answers")
    engine.add_argument(
        "--engine",
        default="offline",
        metavar="offline|URL",
        help="vLLM in this process (default), or an OpenAI-compatible server",
    )
    engine.add_argument("--dtype", default="auto", help="of the offline engine (auto)")
    engine.add_argument(
        "--max-model-len", type=positive, metavar="N", help="context, if shorter than the model's"
    )
    engine.add_argument(
        "--engine-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="more arguments for the offline engine, such as '{\"tensor_parallel_size\": 2}'",
    )
    engine.add_argument("--served-model", metavar="NAME", help="the target's name on the server")
    engine.add_argument(
        "--concurrency", type=positive, default=64, metavar="N", help="of a server's requests (64)"
    )


def run(options: argparse.Namespace) -> int:
    """Distill; exit code 0 when the directory is complete, 130 when interrupted."""
    from vllm_specformer.distill.distill import Options, distill, safe
    from vllm_specformer.errors import SpecFormerError

    request = Options(**fields_of(options, Options))
    _check(request)
    # Batch systems send SIGTERM before SIGKILL: end as on Ctrl-C, with the engine shut down.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        manifest = distill(request, report=say)
    except KeyboardInterrupt:
        say(f"\ninterrupted. {safe(request.out)}")
        return INTERRUPTED
    except SpecFormerError:
        raise
    except Exception:
        say(f"\nunexpected error, see below. {safe(request.out)}")
        raise
    print(summary(request, manifest))
    return 0


def _check(options: Options) -> None:
    """Refuse options that would have no effect."""
    from vllm_specformer.errors import SpecFormerError

    idle = {
        "--engine-args": options.engine_args,
        "--dtype": options.dtype != "auto",
    }
    other = {"--served-model": options.served_model}
    for name, given in (other if options.offline else idle).items():
        if given:
            raise SpecFormerError(
                f"{name} has no effect with --engine {options.engine}; leave it out"
            )


def summary(options: Options, manifest: Manifest) -> str:
    """What the directory holds and what to do with it."""
    from vllm_specformer.distill.distill import in_words

    counts = manifest.counts
    lines = [
        f"{options.out}: {counts.conversations:,} conversations, {counts.tokens:,} tokens, "
        f"{counts.answer_tokens:,} of them in {counts.answers:,} answers of the target; "
        f"{counts.sampled:,} conversations drawn at a temperature above 0"
    ]
    if counts.skipped:
        lines.append(f"warning: left out: {in_words(counts.skipped)}")
    if counts.cut:
        lines.append(f"without their later turns: {in_words(counts.cut)}")
    command = ["specformer", "train", "--target", options.target, "--data", str(options.out)]
    lines.append(f"next: {shlex.join(command)} --out HEAD")
    return "\n".join(lines)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
