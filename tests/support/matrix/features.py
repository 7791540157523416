"""The table: every feature of vLLM that is tried together with speculation, as data.

`docs/compatibility.md` is this table with the recorded outcomes (see `document.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SAME = "same"  # the output without speculation, token for token, in fp32
REFUSED = "refused"  # one message, before weights are loaded or before the request is admitted
REPEATS = (
    "repeats"  # sampled: a seeded request repeats itself; its distribution is tested elsewhere
)

V1, V2 = "v1", "v2"


@dataclass(frozen=True)
class Request:
    """A feature that a request asks for.

    Attributes:
        name: of the field in vLLM's `SamplingParams`, or what is asked of it.
        settings: keyword arguments of `SamplingParams`; greedy unless they say otherwise.
        expected: what happens, on both runners.
        message: of a refusal, as a regular expression.
        changes_output: it gives another text than plain greedy on the prompts used here.
    """

    name: str
    settings: Mapping[str, Any]
    expected: str = SAME
    message: str = ""
    changes_output: bool = False
    note: str = ""

    def __str__(self) -> str:
        return self.name


def structured(**constraint: Any) -> dict[str, Any]:
    """Keyword arguments of `StructuredOutputsParams`, which features.py must not import."""
    return {"structured": constraint, "max_tokens": 40}


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["get", "set"]}, "count": {"enum": [1, 22, 333]}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= "return " word (" + " word)*\nword ::= [a-z]{2,6}'
# At temperature 1, this leaves the most likely token only: sampled requests can be compared.
ONE_LEFT = {"temperature": 1.0, "top_k": 1}

REQUESTS: tuple[Request, ...] = (
    Request("greedy", {}),
    Request("top_k", ONE_LEFT, note="with `top_k=1` at temperature 1"),
    Request("top_p", {"temperature": 1.0, "top_p": 1e-6}, note="with `top_p=1e-6`"),
    Request("n", {"n": 3, **ONE_LEFT}, note="three completions each"),
    Request("max_tokens=1", {"max_tokens": 1}, changes_output=True),
    Request("min_tokens", {"min_tokens": 30, "max_tokens": 32}, changes_output=True),
    Request("ignore_eos", {"ignore_eos": True, "max_tokens": 32}, changes_output=True),
    Request("stop", {"stop": ["return", " =", "("]}, changes_output=True),
    Request(
        "include_stop_str_in_output",
        {"stop": ["self", "if", "("], "include_stop_str_in_output": True},
        changes_output=True,
    ),
    Request("stop_token_ids", {"stop_token_ids": list(range(200, 300))}, changes_output=True),
    Request("bad_words", {"bad_words": ["self", "return", "None", "("]}, changes_output=True),
    Request("allowed_token_ids", {"allowed_token_ids": [*range(200, 500)]}, changes_output=True),
    Request("repetition_penalty", {"repetition_penalty": 1.3}, changes_output=True),
    Request("presence_penalty", {"presence_penalty": 2.0}, changes_output=True),
    Request("frequency_penalty", {"frequency_penalty": 1.5}, changes_output=True),
    Request("logprobs", {"logprobs": 3}),
    Request("logprobs=-1", {"logprobs": -1}, note="of the whole vocabulary; `max_logprobs=-1`"),
    Request("flat_logprobs", {"logprobs": 2, "flat_logprobs": True}),
    Request("prompt_logprobs", {"prompt_logprobs": 2}),
    Request("json", structured(json=SCHEMA), changes_output=True),
    Request("json_object", structured(json_object=True), changes_output=True),
    Request("regex", structured(regex=r"return (self|None)\.[a-z]{3,8}"), changes_output=True),
    Request("choice", structured(choice=["return None", "raise Error"]), changes_output=True),
    Request("grammar", structured(grammar=GRAMMAR), changes_output=True),
    Request(
        "repetition_detection",
        {"repetition_detection": {"max_pattern_size": 4, "min_count": 2}, "max_tokens": 48},
        changes_output=True,
    ),
    Request("skip_reading_prefix_cache", {"skip_reading_prefix_cache": True}),
    Request("detokenize=False", {"detokenize": False}),
    Request("skip_special_tokens=False", {"skip_special_tokens": False}),
    Request("seed", {"temperature": 0.9, "seed": 7}, REPEATS, changes_output=True),
    Request(
        "logit_bias",
        {"logit_bias": {300: 4.0}},
        REFUSED,
        r"min_p and logit_bias .* not yet supported with spec",
        note="by vLLM, with any speculation",
    ),
    Request(
        "min_p",
        {"temperature": 1.0, "min_p": 0.1},
        REFUSED,
        r"min_p and logit_bias .* not yet supported with spec",
        note="by vLLM, with any speculation",
    ),
    Request(
        "logprob_token_ids",
        {"logprob_token_ids": [5, 300, 301]},
        REFUSED,
        r"logprob_token_ids=\[5, 300, 301\] cannot be combined .*; ask for logprobs",
        note="vLLM would return other tokens' values or stop",
    ),
    Request(
        "trace_decode_token_ids",
        {"trace_decode_token_ids": [300, 301]},
        REFUSED,
        "trace_decode_token_ids is not supported with spec",
        note="by vLLM, with any speculation",
    ),
    Request(
        "thinking_token_budget",
        {"thinking_token_budget": 5},
        REFUSED,
        "thinking_token_budget",
        note="by vLLM, without a reasoning parser",
    ),
)


def named(expected: str) -> list[Request]:
    """Request features with this outcome."""
    return [r for r in REQUESTS if r.expected == expected]


# Without these a request is what it was, so pairs with them would say nothing new.
_ALONE = {"greedy", "flat_logprobs", "detokenize=False", "skip_special_tokens=False", "logprobs=-1"}


def merged(first: Request, second: Request) -> Mapping[str, Any] | None:
    """Settings of a request that asks for both, or None where they contradict."""
    if first.settings.keys() & second.settings.keys() - {"max_tokens", "temperature", "top_k"}:
        return None
    together = {**first.settings, **second.settings}
    limits = [s["max_tokens"] for s in (first.settings, second.settings) if "max_tokens" in s]
    if limits:
        together["max_tokens"] = min(limits)
    if together.get("min_tokens", 0) > together.get("max_tokens", 16):
        return None
    # No text satisfies both; vLLM then samples from nothing, with or without speculation.
    if "structured" in together and together.keys() & {"bad_words", "allowed_token_ids"}:
        return None
    return together


def pairs() -> list[Request]:
    """Every two request features that can be asked for together."""
    usable = [r for r in named(SAME) if r.name not in _ALONE]
    found = []
    for index, first in enumerate(usable):
        for second in usable[index + 1 :]:
            settings = merged(first, second)
            if settings is not None:
                found.append(Request(f"{first.name} + {second.name}", settings))
    return found


@dataclass(frozen=True)
class Engine:
    """A feature of the engine: started with it, the same requests give the same answers.

    Attributes:
        options: of the engine, with and without speculation.
        speculative: fields of the speculative config beside method, head and number of drafts.
        expected: by runner; one that is absent is not tried there, `note` says why.
        message: of a refusal, as a regular expression.
        alters: the options alone change the answers, so the plain engine needs them, too.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    speculative: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, str] = field(default_factory=lambda: {V1: SAME, V2: SAME})
    message: str = ""
    alters: bool = False
    note: str = ""


ON_V1 = {V1: SAME}
REFUSED_ON_V1 = {V1: REFUSED}
# Small blocks, so that the prompts used here fill several.
BLOCKS = {"block_size": 32}
SCHEDULE = [[1, 4, 4], [5, 8, 2], [9, 64, 0]]

ENGINES: tuple[Engine, ...] = (
    Engine("`enable_prefix_caching=True`", BLOCKS),
    Engine("`enable_prefix_caching=False`", {"enable_prefix_caching": False}, expected=ON_V1),
    Engine("`disable_eagle_block_drop`", BLOCKS, {"disable_eagle_block_drop": True}),
    Engine(
        "chunked prefill",
        {"max_num_batched_tokens": 24, "max_num_seqs": 4},
        note="24 tokens per step for 4 requests",
    ),
    Engine(
        "`enable_chunked_prefill=False`",
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 512},
        expected=ON_V1,
    ),
    Engine(
        "`max_num_batched_tokens` = K + 2",
        {"max_num_batched_tokens": 6, "max_num_seqs": 1},
        expected=ON_V1,
    ),
    Engine(
        "`max_num_batched_tokens` = K",
        {"max_num_batched_tokens": 4, "max_num_seqs": 1},
        expected=REFUSED_ON_V1,
        message="does not have enough slots to schedule a token",
        note="by vLLM",
    ),
    Engine("preemption", {**BLOCKS, "num_gpu_blocks_override": 18, "max_num_seqs": 8}),
    Engine("`scheduling_policy=priority`", {"scheduling_policy": "priority"}, expected=ON_V1),
    Engine(
        "`async_scheduling`",
        {"async_scheduling": True},
        expected=ON_V1,
        note="vLLM's CPU build switches it off again",
    ),
    Engine("`logprobs_mode=raw_logits`", {"logprobs_mode": "raw_logits"}, alters=True),
    Engine(
        "`logprobs_mode=processed_logprobs`",
        {"logprobs_mode": "processed_logprobs"},
        expected=ON_V1,
        alters=True,
    ),
    Engine(
        "schedule by batch size", speculative={"num_speculative_tokens_per_batch_size": SCHEDULE}
    ),
    Engine(
        "`draft_sample_method=probabilistic`", speculative={"draft_sample_method": "probabilistic"}
    ),
    Engine(
        "`draft_confidence_threshold`",
        speculative={"draft_confidence_threshold": [[1, 2, 0.2], [3, 64, 0.5]]},
        expected={V1: SAME, V2: REFUSED},
        message="full CUDA graphs",
        note="on V2 with CUDA graphs: `tests/engine/v2/test_cut_v2.py`",
    ),
    Engine(
        "`verification=coupled`",
        speculative={"verification": "coupled"},
        expected={V1: REFUSED, V2: SAME},
        message="needs vLLM's V2 model runner",
    ),
    Engine(
        "`tree_nodes`",
        speculative={"tree_nodes": 8},
        expected=REFUSED_ON_V1,
        message="needs vLLM's V2 model runner",
        note="on V2: `tests/engine/v2/candidates`, [trees.md](trees.md)",
    ),
    Engine(
        "`rejection_sample_method=block`",
        speculative={"rejection_sample_method": "block"},
        expected=REFUSED_ON_V1,
        message="does not keep the target's distribution",
    ),
    Engine(
        "`enable_lora`",
        {"enable_lora": True, "max_lora_rank": 8},
        expected={V1: SAME, V2: REFUSED},
        message="cannot verify drafts of an lm_head with adapters",
        note="adapters in use: `tests/engine/v1/test_lora.py`",
    ),
    Engine(
        "`lora_target_modules` without `lm_head`",
        {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj", "v_proj"]},
    ),
    Engine("draft `kv_cache_dtype=fp8`", speculative={"kv_cache_dtype": "fp8"}, expected=ON_V1),
    Engine(
        "draft `attention_backend`",
        speculative={"attention_backend": "FLASH_ATTN"},
        expected=ON_V1,
        note="a head has its own; the field is without effect",
    ),
    Engine("draft `max_model_len`", speculative={"max_model_len": 64}, expected=ON_V1),
    Engine(
        "draft `quantization`",
        speculative={"quantization": "fp8"},
        expected=REFUSED_ON_V1,
        message="quantization='fp8' has no meaning for a SpecFormer head",
    ),
    Engine(
        "`disable_padded_drafter_batch`",
        speculative={"disable_padded_drafter_batch": True},
        expected=REFUSED_ON_V1,
        message="disable_padded_drafter_batch=True has no meaning",
    ),
    Engine(
        "`use_local_argmax_reduction`",
        speculative={"use_local_argmax_reduction": True},
        expected=REFUSED_ON_V1,
        message="use_local_argmax_reduction=True has no meaning",
    ),
    Engine(
        "`enable_adaptive_verification`",
        speculative={"enable_adaptive_verification": True},
        expected=REFUSED_ON_V1,
        message="Model Runner V1 does not support: adaptive draft verification",
        note="by vLLM; on V2, where it wants CUDA graphs: `tests/engine/v2/test_adaptive.py`",
    ),
    Engine(
        "`pipeline_parallel_size=2`",
        {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
        expected=REFUSED_ON_V1,
        message="pipeline_parallel_size=2: SpecFormer does not support it",
    ),
    Engine(
        "`decode_context_parallel_size=2`",
        {
            "decode_context_parallel_size": 2,
            "tensor_parallel_size": 2,
            "distributed_executor_backend": "mp",
        },
        expected=REFUSED_ON_V1,
        message="decode_context_parallel_size=2: SpecFormer does not support it",
    ),
    Engine(
        "pooling, embeddings",
        {"runner": "pooling"},
        expected=REFUSED_ON_V1,
        message="runner='pooling': this engine generates no text",
    ),
    Engine(
        "`kv_sharing_fast_prefill`",
        {"kv_sharing_fast_prefill": True},
        expected=REFUSED_ON_V1,
        message="Fast prefill optimization for KV sharing is not compatible with EAGLE",
        note="by vLLM",
    ),
)

# What no engine here can try, and where it stands.
NOT_TRIED = {
    "CUDA graphs, `torch.compile` on a GPU": "no GPU here; written for full graphs, see "
    "[one-step.md](one-step.md)",
    "`torch.compile` on a CPU": "`make test-slow` (`tests/engine/v1/test_modes.py`)",
    "tensor parallelism": "`tests/engine/v1/test_sharding.py`, two ranks on a CPU",
    "sleep mode, weights loaded again": "vLLM refuses sleep on a CPU; the worker's methods, with "
    "its allocator replaced: `tests/engine/v2/test_sleep.py`",
    "fp8 KV cache of the target": "same output on both runners "
    "(`tests/engine/v1/test_other_caches.py`, `v2`)",
    "quantised targets (compressed-tensors W8A8 and W4A16, GPTQ, AWQ)": "same output on V1, "
    "trained and served (`tests/engine/v1/test_quantised_targets.py`), see "
    "[quantised-targets.md](quantised-targets.md)",
    "prompt embeddings, beam search": "same output on V1 "
    "(`tests/engine/matrix/test_other_requests.py`)",
    "KV connectors": "vLLM's example, which moves the cache layer by layer, alone and two of them "
    "behind the multi connector: same output and drafts on V1 "
    "(`tests/engine/v1/test_kv_transfer.py`); offloading and NIXL see "
    "[kv-groups.md](kv-groups.md#connectors)",
    "guidance and outlines, tool calls and reasoning parsers over HTTP, weight "
    "reload, resized vocabulary": "same output on V1 in a trial outside of these tests",
    "custom logits processors": "not tried",
    "multi-modal targets": "Qwen2.5-VL and Qwen3-VL, requests with images and without in one "
    "batch: same output and drafts on V1 (`tests/engine/v1/test_images.py`), Qwen3-VL on V2, too; "
    "others see [families.md](families.md)",
    "data parallelism": "two engines of which one is idle: same output on V1 "
    "(`tests/engine/matrix/test_server_faults.py`)",
    "a home directory that cannot be written": "same output on V1, by the temporary directory "
    "(`tests/engine/matrix/test_server_faults.py`)",
    "mixtures of experts on two ranks": "data parallelism, one engine idle while the other drafts: "
    "same output on V1 (`tests/engine/matrix/test_experts.py`, which brings two collectives that "
    "vLLM's CPU build lacks: `distributed/device_communicators/base_device_communicator.py:296, "
    "334`). `--enable-expert-parallel` does not run on a CPU: vLLM's own kernel crashes with "
    "experts of another rank, with or without speculation (`csrc/cpu/cpu_fused_moe.cpp:242`)",
    "bfloat16 and float16": "greedy texts may part at ties, as between batch sizes of vLLM",
    "`rejection_sample_method=synthetic`": "for measuring at a chosen acceptance; the output is "
    "not the target's (`tests/engine/v1/test_cpu_synthetic.py`)",
}
