"""Answers from vLLM in this process: token ids in, token ids out."""

from __future__ import annotations

import dataclasses
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_specformer.distill.backend import EngineError, Progress
from vllm_specformer.distill.dialogue import Answer, Dialogue, Request
from vllm_specformer.serving.cpu_memory import with_memory

# Arguments of vLLM that have an option of their own -> that option.
_OWN = {
    "model": "--target",
    "tokenizer": "--target",
    "revision": "--revision",
    "dtype": "--dtype",
    "max_model_len": "--max-model-len",
}


class OfflineEngine:
    """vLLM's `LLM` on the target.

    Every turn of all dialogues of a shard is one batch. The prefix cache is emptied between shards,
    so a shard's batches do not depend on what ran before it. The engine runs inside this process:
    then its schedule depends on the requests alone, and a SIGKILL leaves no engine behind that
    holds the memory which the next run needs.
    """

    def __init__(
        self,
        target: Path,
        dtype: str,
        max_model_len: int | None,
        engine_args: dict[str, Any],
    ) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm
        except ImportError as error:
            raise EngineError(
                f"--engine offline: vLLM cannot be imported ({error})",
                "install it, or name a running server with --engine URL",
            ) from None
        check_engine_args(engine_args, {f.name for f in dataclasses.fields(vllm.EngineArgs)})
        try:
            self._llm = vllm.LLM(
                model=str(target),
                dtype=dtype,
                max_model_len=max_model_len,
                **with_memory(engine_args),
            )
        except Exception as error:  # there are many ways not to start, and few have a class
            if not isinstance(error, ValueError):
                traceback.print_exc()
            raise EngineError(
                f"--engine offline: vLLM does not start with {target}: {error}",
                "it says more with "
                "VLLM_LOGGING_LEVEL=INFO, and --engine-args sets memory and the like",
            ) from None
        self._sampling: Callable[..., Any] = vllm.SamplingParams
        self.context: int = self._llm.model_config.max_model_len
        self.versions = {"vllm": vllm.__version__}

    def answer(self, dialogues: Sequence[Dialogue], progress: Progress) -> None:
        """Carry every dialogue to its end, a turn of all of them at a time."""
        self._llm.reset_prefix_cache()
        waiting = [dialogue for dialogue in dialogues if dialogue.is_open]
        while waiting:
            requests = [dialogue.request() for dialogue in waiting]
            for dialogue, answer in zip(waiting, self._complete(requests, progress), strict=True):
                dialogue.accept(answer)
            waiting = [dialogue for dialogue in waiting if dialogue.is_open]

    def _complete(self, requests: Sequence[Request], progress: Progress) -> list[Answer]:
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        params = [
            self._sampling(
                temperature=request.temperature,
                top_p=request.top_p,
                max_tokens=request.max_tokens,
                seed=request.seed,
                detokenize=False,
            )
            for request in requests
        ]
        outputs = []
        for output in _finished(self._llm, prompts, params):
            progress.answered(1, len(output.outputs[0].token_ids))
            outputs.append(output)
        answers = []
        for output in sorted(outputs, key=lambda output: int(output.request_id)):
            completion = output.outputs[0]
            if completion.finish_reason not in ("stop", "length"):
                raise EngineError(
                    f"vLLM ended an answer with finish_reason={completion.finish_reason!r}",
                    "give the same command again",
                )
            answers.append(Answer(list(completion.token_ids), completion.finish_reason))
        return answers


def check_engine_args(given: dict[str, Any], known: set[str]) -> None:
    """Refuse engine arguments that vLLM does not know, or that an option of ours sets.

    Raises:
        EngineError: names the argument.
    """
    for name in given:
        if name in _OWN:
            raise EngineError(f"--engine-args: {name!r} is set with {_OWN[name]}")
        if name not in known:
            raise EngineError(
                f"--engine-args: vLLM has no engine argument {name!r}",
                "names are written with underscores, as in vllm.EngineArgs",
            )


def _finished(llm: Any, prompts: Sequence[Any], params: Sequence[Any]) -> Iterator[Any]:
    """vLLM's outputs of whole answers as they come, to be counted; as `LLM.generate`, in any order.

    `generate` itself tells a bar of answers only, and of tokens in words.
    """
    llm.enqueue(prompts, params, use_tqdm=False)
    while llm.llm_engine.has_unfinished_requests():
        yield from (output for output in llm.llm_engine.step() if output.finished)
