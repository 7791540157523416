"""After moving accepted paths, the target's K and V are those of a run without speculation.

They are compared up to the rounding that verifying several rows at once brings: a run with chains
of drafts, which move nothing, shows how much that is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from vllm import LLM
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from support.engines import drafting, greedy
from support.v2.engines import TEXTS, engine, runner
from vllm_specformer.engine.head_pages import target_layers

TEXT = {"max_tokens": 24, "ignore_eos": True}
# How much more than chains' rows a moved row may differ.
ROOM = 4.0


@contextmanager
def watching_cache(llm: LLM) -> Iterator[dict[tuple[int, ...], list[Tensor]]]:
    """By prompt: K and V of every layer [tokens, heads, 2 * size], of all tokens in the cache."""
    found: dict[tuple[int, ...], list[Tensor]] = {}
    ours = runner(llm)
    original = GPUModelRunner.sample_tokens

    def sampled(self: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
        states = None if self.execute_model_state is None else self.execute_model_state
        batch = None if states is None else states.input_batch
        output = original(self, *args, **kwargs)
        for row, state in enumerate([] if batch is None else batch.idx_mapping.tolist()):
            prompt = int(ours.req_states.prompt_len.np[state])
            tokens = ours.req_states.all_token_ids.gpu[state, :prompt].tolist()
            length = int(ours.req_states.num_computed_tokens.gpu[state])
            found[tuple(tokens)] = [
                _rows(layer.kv_cache, ours.block_tables.input_block_tables[0][row], length)
                for layer in target_layers(ours.vllm_config)
            ]
        return output

    with mock.patch.object(GPUModelRunner, "sample_tokens", sampled):
        yield found


def _rows(cache: Tensor, table: Tensor, length: int) -> Tensor:
    pages = cache[table[: -(-length // cache.shape[2])].long()]
    return pages.transpose(1, 2).flatten(0, 1)[:length].clone()


def furthest(one: dict[Any, list[Tensor]], other: dict[Any, list[Tensor]]) -> float:
    """The largest difference in the tokens that both have."""
    assert one.keys() == other.keys()
    return max(
        float((a[: len(b)] - b[: len(a)]).abs().max())
        for prompt in one
        for a, b in zip(one[prompt], other[prompt], strict=True)
    )


def test_moved_rows_are_in_their_place() -> None:
    texts, params = TEXTS[:4], greedy(**TEXT)
    with engine() as llm, watching_cache(llm) as alone:
        llm.generate(texts, params, use_tqdm=False)
    with engine(drafting(8)) as llm, watching_cache(llm) as chains:
        llm.generate(texts, params, use_tqdm=False)
    with engine(drafting(8, tree_nodes=16)) as llm, watching_cache(llm) as moved:
        llm.generate(texts, params, use_tqdm=False)
    assert len(alone) == len(texts)
    for prompt, layers in moved.items():
        assert len(layers[0]) >= len(prompt) + TEXT["max_tokens"] - 8
    rounding, found = furthest(alone, chains), furthest(alone, moved)
    print(f"largest difference {found:.2e}, of chains {rounding:.2e}")
    assert 0 < found <= ROOM * rounding
