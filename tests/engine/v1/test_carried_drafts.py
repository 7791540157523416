"""On a CPU the drafts come with a step's output, and only what brings none is asked for them."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from support.engines import Job, drafting, engine, greedy, prompts, run_plain
from support.outputs import counting, token_ids
from vllm_specformer.engine.patches import carried_drafts
from vllm_specformer.names import ARCHITECTURE

DRAFTS = DraftTokenIds(["a"], [[1, 2]])
OURS = SimpleNamespace(
    draft_model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=[ARCHITECTURE]))
)


class Runner:
    """What is used of vLLM's runner: an output for a step, then its drafts."""

    def __init__(self, speculative_config: Any = OURS) -> None:
        self.speculative_config = speculative_config
        self.execute_model_state: Any = "a step"
        self.shared = ModelRunnerOutput(req_ids=[], req_id_to_index={})

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        if self.execute_model_state is None:
            return self.shared
        self.execute_model_state = None
        return ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})

    def take_draft_token_ids(self) -> DraftTokenIds:
        return DRAFTS


class Executor:
    """Outputs reach it as they leave a worker process."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.asked = 0

    def sample_tokens(self, grammar_output: Any) -> Any:
        return pickle.loads(pickle.dumps(self.runner.sample_tokens(grammar_output)))

    def take_draft_token_ids(self) -> DraftTokenIds:
        self.asked += 1
        return self.runner.take_draft_token_ids()


class PatchedRunner(Runner):
    def sample_tokens(self, grammar_output: Any) -> Any:
        return carried_drafts.send_with_output(Runner.sample_tokens, self, grammar_output)


class PatchedExecutor(Executor):
    def sample_tokens(self, grammar_output: Any) -> Any:
        return carried_drafts.receive_with_output(Executor.sample_tokens, self, grammar_output)

    def take_draft_token_ids(self) -> Any:
        return carried_drafts.take_received(Executor.take_draft_token_ids, self)


def engine_of(speculative_config: Any = OURS) -> Any:
    return PatchedExecutor(PatchedRunner(speculative_config))


def test_drafts_are_taken_once_from_the_output() -> None:
    ours = engine_of()
    assert not hasattr(ours.sample_tokens(None), "specformer_drafts")
    assert (ours.take_draft_token_ids(), ours.asked) == (DRAFTS, 0)
    assert (ours.take_draft_token_ids(), ours.asked) == (DRAFTS, 1)


def test_another_method_is_asked_as_before() -> None:
    other = engine_of(SimpleNamespace(draft_model_config=None))
    other.sample_tokens(None)
    assert (other.take_draft_token_ids(), other.asked) == (DRAFTS, 1)


def test_an_output_that_steps_share_carries_nothing() -> None:
    ours = engine_of()
    ours.runner.execute_model_state = None
    ours.sample_tokens(None)
    assert not hasattr(ours.runner.shared, "specformer_drafts")
    ours.take_draft_token_ids()
    assert ours.asked == 1


def test_a_worker_process_is_not_asked() -> None:
    job = Job(prompts()[:6], [greedy(8 * (1 + i)) for i in range(6)])
    expected = token_ids(run_plain({"all": job})["all"])
    speculative = drafting(4, num_speculative_tokens_per_batch_size=[[1, 2, 4], [3, 8, 0]])
    with engine(speculative, distributed_executor_backend="mp") as llm, counting(llm) as counted:
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        call, methods = executor.collective_rpc, []

        def collective_rpc(method: Any, *args: Any, **kwargs: Any) -> Any:
            methods.append(method)
            return call(method, *args, **kwargs)

        executor.collective_rpc = collective_rpc
        assert token_ids(job.run(llm)) == expected
        Job(prompts()[:4], greedy(8)).run(llm)  # its last step drafts nothing
        left = call(lambda worker: worker.model_runner.drafter._left)
        late = call(lambda worker: worker.model_runner.drafter.stores_late)
    assert (late, left) == ([True], [None])  # stored before the worker took the next order
    assert counted["spec_decode_num_accepted_tokens"] > 10
    assert "sample_tokens" in methods
    assert "take_draft_token_ids" not in methods
