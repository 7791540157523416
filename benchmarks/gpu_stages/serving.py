"""One vLLM engine at a steady batch: what a step takes and how many tokens it emits."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from gpu_stages.draft_clock import QUALIFIED_NAME
from vllm_specformer.serving.engine import Engine

Options = dict[str, Any]

# Steps before the clock runs: the batch is full and every graph has been replayed.
WARM_UP = 8
WINDOWS = 3


def start(options: Options) -> Engine:
    """The engine; graphs are captured for the batches that will be measured and no others."""
    engine = {
        "model": options["target"],
        "speculative_config": options.get("speculative"),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "disable_log_stats": False,
        "worker_extension_cls": QUALIFIED_NAME,
        "max_num_seqs": max(options["batches"]),
        "seed": 0,
        **options["engine"],
    }
    if not engine.get("enforce_eager"):
        sizes = graph_sizes(options["batches"], options.get("num_speculative_tokens", 0))
        engine["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    return Engine(engine)


def graph_sizes(batches: Sequence[int], num_tokens: int) -> list[int]:
    """Rows of the graphs that steps and drafts of these batches replay, whatever the method.

    A step verifies K + 1 rows of each request; drafts take one, K or K + 1.
    """
    rows = {1, num_tokens, num_tokens + 1} - {0}
    return sorted({batch * n for batch in batches for n in rows})


def prompts(batch: int, context: int, vocabulary: int) -> Iterator[list[int]]:
    """Random tokens, other ones for every request; the same in a smaller batch."""
    for request in range(batch):
        draw = random.Random(request)
        yield [draw.randrange(3, vocabulary) for _ in range(context)]


class SteadyBatch:
    """`batch` requests that all decode until they are aborted."""

    def __init__(self, engine: Engine, batch: int, options: Options) -> None:
        self.engine, self.batch = engine, batch
        model, context = engine.config.model_config, options["context"]
        texts = list(prompts(batch, context, model.get_vocab_size()))
        self.names = engine.submit_endless(texts, model.max_model_len - context)
        engine.read_prompts(self.names)

    def steps(self, number: int) -> tuple[float, int]:
        """Take `number` steps of the whole batch: seconds, and tokens emitted.

        Raises:
            RuntimeError: a request ended before that, at the engine's maximum length.
        """
        outputs = tokens = 0
        started = time.perf_counter()
        while outputs < number * self.batch:
            for output in self.engine.step():
                outputs += 1
                tokens += len(output.outputs[0].token_ids)
                if output.finished:
                    raise RuntimeError(
                        f"a request reached max_model_len after {outputs} outputs of {number} "
                        f"steps with {self.batch} requests; raise it or measure fewer steps"
                    )
        return time.perf_counter() - started, tokens

    def end(self) -> None:
        self.engine.abort(self.names)
        self.engine.finish()


def measure(engine: Engine, batch: int, options: Options) -> Options:
    """Medians over windows of `options["steps"]` steps."""
    requests = SteadyBatch(engine, batch, options)
    requests.steps(WARM_UP)
    engine.llm.collective_rpc("start_draft_clock")
    windows = [requests.steps(options["steps"]) for _ in range(WINDOWS)]
    drafts = engine.llm.collective_rpc("read_draft_clock")[0]
    requests.end()
    seconds = [elapsed / options["steps"] for elapsed, _ in windows]
    emitted = sum(tokens for _, tokens in windows)
    return {
        "batch": batch,
        "step_ms": 1e3 * statistics.median(seconds),
        "step_ms_low": 1e3 * min(seconds),
        "step_ms_high": 1e3 * max(seconds),
        "tokens_per_step": emitted / (batch * WINDOWS * options["steps"]),
        "tokens_per_second": emitted / sum(elapsed for elapsed, _ in windows),
        "draft_ms": statistics.median(drafts) if drafts else 0.0,
    }
