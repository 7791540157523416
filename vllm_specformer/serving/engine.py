"""A vLLM engine inside this process, stepped by hand: for measuring, not for serving."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_specformer.serving.cpu_memory import with_memory


class Engine:
    """One engine.

    Args:
        arguments: of `vllm.LLM`; on a CPU memory that fits is added where they say nothing of it.

    Attributes:
        llm: vLLM's own object.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        import vllm

        self.llm: Any = vllm.LLM(**with_memory(arguments))
        self._numbers = itertools.count()

    @property
    def config(self) -> Any:
        """vLLM's config of everything."""
        return self.llm.llm_engine.vllm_config

    @property
    def runner(self) -> str:
        """vLLM's model runner, "V1" or "V2"."""
        return "V2" if getattr(self.config, "use_v2_model_runner", False) else "V1"

    @property
    def is_busy(self) -> bool:
        """Whether a request has not ended."""
        return bool(self.llm.llm_engine.has_unfinished_requests())

    def submit(self, prompt: str | list[int], max_tokens: int, **sampling: Any) -> str:
        """Queue a request, greedy unless `sampling` says otherwise; returns its name."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=max_tokens,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            **{"temperature": 0, **sampling},
        )
        name = f"request-{next(self._numbers)}"
        text = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        self.llm.llm_engine.add_request(name, text, params)
        return name

    def submit_endless(self, prompts: Sequence[str | list[int]], max_tokens: int) -> list[str]:
        """Queue requests that go on past the end of their text; returns their names."""
        return [self.submit(prompt, max_tokens, ignore_eos=True) for prompt in prompts]

    def read_prompts(self, names: Sequence[str]) -> None:
        """Step until each of these requests has its first token, so that all of them decode."""
        waiting = set(names)
        while waiting:
            waiting -= {output.request_id for output in self.step() if output.outputs[0].token_ids}

    def step(self) -> list[Any]:
        """One step of the engine; vLLM's outputs, each with the tokens that this step emitted."""
        outputs: list[Any] = self.llm.llm_engine.step()
        return outputs

    def abort(self, names: Sequence[str]) -> None:
        """End these requests."""
        self.llm.llm_engine.abort_request(list(names))

    def finish(self) -> None:
        """Step until no request is left, also none that was aborted."""
        while self.is_busy:
            self.step()

    def hold_drafts(self, count: int) -> None:
        """Draft `count` tokens per step from now on; see `engine/patches/measuring.py`.

        An engine without speculation is left as it is.
        """
        if self.config.speculative_config is not None:
            from vllm_specformer.engine.patches.measuring import hold_drafts

            hold_drafts(self.llm, count)
