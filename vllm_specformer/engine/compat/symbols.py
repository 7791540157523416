"""Everything inside vLLM that this package relies on, each with its user and its reason.

A callable lists the parameters we pass (or accept, where we override it) under exactly these
names; vLLM may have further ones only if they have defaults. What `engine/patches/` changes is not
listed here: each patch declares its own entry. Parameters that one supported version
lacks are not listed, since nothing of ours may need them: `sample_draft` gained `num_steps` in
0.33, `dispatch_cg_and_sync_dp` gained `allow_skip_drafts`.
"""

from __future__ import annotations

from dataclasses import dataclass

CLASS = ("class",)
VALUE = ("value",)
ATTRIBUTE = ("attribute",)
FUNCTION = ("function",)


@dataclass(frozen=True)
class Reliance:
    """One symbol ("module:Qualified.name"), which of our modules needs it, and what for.

    `overridden` marks methods our subclasses replace: vLLM calls them by position, so the order of
    the parameters counts too. `passes_on` marks functions we wrap and hand all parameters on to:
    there new ones do no harm. `later` is the symbol's place in later versions.
    """

    symbol: str
    needed_by: str
    reason: str
    kinds: tuple[str, ...] = FUNCTION
    parameters: tuple[str, ...] = ()
    overridden: bool = False
    passes_on: bool = False
    bases: tuple[str, ...] = ()
    contains: tuple[str, ...] = ()
    later: str = ""


def members(owner: str, needed_by: str, reason: str, names: str) -> tuple[Reliance, ...]:
    """One entry per attribute of `owner` in the space-separated `names`."""
    return tuple(Reliance(f"{owner}.{n}", needed_by, reason, ATTRIBUTE) for n in names.split())


def call(symbol: str, needed_by: str, reason: str, parameters: str = "") -> Reliance:
    return Reliance(symbol, needed_by, reason, parameters=tuple(parameters.split()))


def override(symbol: str, needed_by: str, reason: str, parameters: str = "") -> Reliance:
    return Reliance(
        symbol, needed_by, reason, parameters=tuple(parameters.split()), overridden=True
    )


REGISTRATION_FILE = "engine/patches/registration.py"
DRAFTERS = "engine/patches/drafters.py"
COMMAND_LINE = "engine/patches/command_line.py"
MODEL = "engine/model.py"
CHECKS = "engine/checks.py"
ATTENTION = "engine/attention.py"
HEAD_PAGES = "engine/head_pages.py"
KV_GROUPS = "engine/patches/kv_groups.py"
CPU_PAGES = "engine/cpu/pages.py"
SHARDING = "engine/sharding.py"
V1 = "engine/proposer_v1.py"
V2 = "engine/speculator_v2.py"
DRAWS_V2 = "engine/draws/sampling_v2.py"
CPU_SAMPLING = "engine/patches/cpu_sampling.py"
REQUESTS = "engine/patches/requests.py"
DRAFT_TIME = "engine/metrics.py"
KV_TRANSFER = "engine/kv_transfer.py"
COUPLED = "engine/coupled.py"
CANDIDATES = "engine/candidates/"
VOCABULARY = "engine/target_logits.py"
CONFIDENCE = "engine/confidence/cut_v1.py"
CUT_V2 = "engine/confidence/cut_v2.py"
ESTIMATOR = "engine/confidence/estimator.py"
CARRIED = "engine/patches/carried_drafts.py"
DRAFTLESS = "engine/patches/draftless_steps.py"
LATE_STORE = "engine/patches/late_store.py"
CPU_NORMS = "engine/cpu/norms.py"
CLIENT = "bench/client.py"
MEASURING = "engine/patches/measuring.py"
STEPPED = "serving/engine.py"

_SPEC = "vllm.config.speculative"
_ARGS = "vllm.engine.arg_utils:EngineArgs"
_BACKEND = "vllm.v1.attention.backend"
_LAYER = "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase"
_EAGLE = "vllm.model_executor.models.interfaces"
_ENDS = "vllm.model_executor.layers"
_RANKS = "vllm.distributed.parallel_state"
_TOGETHER = "vllm.distributed.communication_op"

_OPS = "vllm._custom_ops"
_CACHE = "vllm.v1.kv_cache_interface"
_CPU_BACKEND = "vllm.v1.attention.backends.cpu_attn"

REGISTRATION: tuple[Reliance, ...] = (
    call(
        "vllm.model_executor.models.registry:_ModelRegistry.register_model",
        REGISTRATION_FILE,
        "makes the draft architecture known",
        "model_arch model_cls",
    ),
    call(
        "vllm.transformers_utils.config:maybe_override_with_speculators",
        COMMAND_LINE,
        "called in the wrapper's place",
        "model tokenizer trust_remote_code revision",
    ),
    *members(
        _ARGS,
        REGISTRATION_FILE,
        "where the method is written",
        "speculative_config spec_method spec_model spec_tokens",
    ),
    Reliance(
        f"{_SPEC}:SpeculativeMethod",
        REGISTRATION_FILE,
        'the method that "specformer" stands for',
        VALUE,
        contains=("dflash",),
    ),
    *members(
        f"{_SPEC}:SpeculativeConfig",
        V1 + ", " + V2,
        "read to set up drafting",
        "method num_speculative_tokens draft_model_config draft_sample_method "
        "use_local_argmax_reduction parallel_drafting disable_eagle_block_drop "
        "draft_parallel_config",
    ),
    call(f"{_SPEC}:SpeculativeConfig.use_dflash", REGISTRATION_FILE, "chooses vLLM's DFlash path"),
    call(f"{_SPEC}:SpeculativeConfig.use_eagle", REGISTRATION_FILE, "turns auxiliary states on"),
)

LAYERS: tuple[Reliance, ...] = (
    Reliance(_LAYER, ATTENTION, "base of the draft layer", CLASS, bases=("ABC",)),
    override(f"{_LAYER}.get_attn_backend", ATTENTION, "names our backend"),
    override(f"{_LAYER}.get_kv_cache_spec", ATTENTION, "asks for K/V blocks", "vllm_config"),
    override(f"{_LAYER}.bind_kv_cache", ATTENTION, "hands over the cache", "kv_cache"),
    *members(_LAYER, ATTENTION, "set by load_model on draft layers", "is_draft_layer"),
    Reliance(f"{_BACKEND}:AttentionBackend", ATTENTION, "base of our backend", CLASS),
    override(f"{_BACKEND}:AttentionBackend.get_name", ATTENTION, "names it"),
    override(f"{_BACKEND}:AttentionBackend.get_impl_cls", ATTENTION, "abstract"),
    override(f"{_BACKEND}:AttentionBackend.get_builder_cls", ATTENTION, "abstract"),
    override(
        f"{_BACKEND}:AttentionBackend.get_supported_kernel_block_sizes",
        ATTENTION,
        "we accept any block size",
        "kv_cache_spec",
    ),
    override(
        f"{_BACKEND}:AttentionBackend.supports_batch_invariance",
        ATTENTION,
        "our backend stays out of the way; see checks.py",
    ),
    call(
        f"{_BACKEND}:AttentionBackend.supported_kv_cache_layouts",
        ATTENTION,
        "None unless overridden: the target's backend chooses",
    ),
    *members(
        f"{_BACKEND}:AttentionBackend",
        ATTENTION,
        "set by our backend",
        "forward_includes_kv_cache_update supported_dtypes",
    ),
    Reliance(f"{_BACKEND}:MultipleOf", ATTENTION, "we accept any block size", CLASS),
    Reliance(f"{_BACKEND}:AttentionCGSupport", ATTENTION, "we allow graphs", CLASS),
    Reliance(f"{_BACKEND}:AttentionMetadataBuilder", ATTENTION, "base of our builder", CLASS),
    *members(
        f"{_BACKEND}:AttentionMetadataBuilder", ATTENTION, "we allow graphs", "_cudagraph_support"
    ),
    override(
        f"{_BACKEND}:AttentionMetadataBuilder.__init__",
        ATTENTION,
        "called by the runners",
        "kv_cache_spec layer_names vllm_config device",
    ),
    override(
        f"{_BACKEND}:AttentionMetadataBuilder.build",
        ATTENTION,
        "hands on the common metadata",
        "common_prefix_len common_attn_metadata fast_build",
    ),
    call(
        f"{_BACKEND}:AttentionMetadataBuilder.get_cudagraph_support",
        ATTENTION,
        "read to decide about graphs",
        "vllm_config kv_cache_spec",
    ),
    *members(
        f"{_BACKEND}:CommonAttentionMetadata",
        ATTENTION + ", " + V1,
        "what the kernels read",
        "query_start_loc seq_lens num_reqs num_actual_tokens max_seq_len block_table_tensor "
        "slot_mapping",
    ),
    *(
        Reliance(f"{_CACHE}:{name}", HEAD_PAGES, "kinds of the target's caches", CLASS, bases=base)
        for name, base in (
            ("KVCacheSpec", ()),
            ("AttentionSpec", ("KVCacheSpec",)),
            ("FullAttentionSpec", ("AttentionSpec",)),
            ("MLAAttentionSpec", ("FullAttentionSpec",)),
            ("SlidingWindowSpec", ("AttentionSpec",)),
        )
    ),
    Reliance(f"{_CACHE}:SparseCacheRole", HEAD_PAGES, "an indexer keeps other pages", CLASS),
    *members(f"{_CACHE}:MLAAttentionSpec", HEAD_PAGES, "tells an indexer", "cache_role"),
    *members(
        f"{_CACHE}:AttentionSpec",
        HEAD_PAGES,
        "size of a target layer's pages",
        "num_heads state_content_size_bytes tokens_per_state",
    ),
    call(f"{_CACHE}:replace_as", HEAD_PAGES, "a windowed layer kept", "spec target_cls drop"),
    call(
        "vllm.v1.worker.utils:customize_attention_spec",
        HEAD_PAGES,
        "a layer's spec as the runners ask for it",
        "backend spec",
    ),
    *members(f"{_CACHE}:KVCacheGroupSpec", KV_GROUPS, "gets layers", "layer_names kv_cache_spec"),
    *members(f"{_CACHE}:UniformTypeKVCacheSpecs", KV_GROUPS, "gets layers", "kv_cache_specs"),
    *members(
        "vllm.config.scheduler:SchedulerConfig",
        HEAD_PAGES,
        "whether windows free pages",
        "disable_hybrid_kv_cache_manager",
    ),
    *members(
        "vllm.config.cache:CacheConfig",
        HEAD_PAGES,
        "windows of all layers; named in messages",
        "sliding_window block_size cache_dtype",
    ),
    *members("vllm.config.model:ModelConfig", HEAD_PAGES, "kind of target", "use_mla"),
    *members("vllm.config.model:ModelConfig", HEAD_PAGES, "recurrent layers", "is_hybrid"),
    Reliance("vllm.triton_utils.importing:HAS_TRITON", HEAD_PAGES, "which code runs them", VALUE),
    *members("vllm.config.attention:AttentionConfig", HEAD_PAGES, "refused", "hisparse_config"),
    call("vllm.config.vllm:get_current_vllm_config", ATTENTION, "configs during load"),
    *members(
        "vllm.config.compilation:CompilationConfig",
        ATTENTION,
        "where layers register",
        "static_forward_context",
    ),
    call(
        "vllm.forward_context:set_forward_context",
        V1 + ", " + V2,
        "hands metadata to the draft layer",
        "attn_metadata vllm_config num_tokens num_tokens_across_dp cudagraph_runtime_mode "
        "slot_mapping",
    ),
    Reliance(f"{_EAGLE}:EagleModelMixin", MODEL, "order of the hidden states", CLASS),
    call(
        f"{_EAGLE}:EagleModelMixin._maybe_add_hidden_state",
        MODEL,
        "meaning of a layer id",
        "aux_hidden_states layer_idx hidden_states residual",
    ),
    Reliance(f"{_EAGLE}:SupportsEagle3", MODEL, "what a target must be", CLASS),
    call(f"{_EAGLE}:SupportsEagle3.set_aux_hidden_state_layers", MODEL, "hooks", "layers"),
    call(
        "vllm.model_executor.model_loader:get_model",
        V1 + ", " + V2,
        "builds and loads the head",
        "vllm_config model_config prefix load_config",
    ),
    call(
        "vllm.model_executor.model_loader.utils:get_draft_load_config",
        V2,
        "loads the head",
        "vllm_config",
    ),
    call(
        "vllm.model_executor.model_loader.utils:get_model_cls",
        CHECKS,
        "class of the target",
        "model_config",
    ),
    call(
        "vllm.config.model:ModelConfig.using_transformers_backend",
        CHECKS,
        "whether the target has a state 0",
    ),
    call(f"{_EAGLE}:supports_eagle3", CHECKS, "whether the target can be hooked", "model"),
    Reliance(f"{_ENDS}.logits_processor:LogitsProcessor", VOCABULARY, "target's logits", CLASS),
    call(
        f"{_ENDS}.logits_processor:LogitsProcessor.forward",
        VOCABULARY,
        "logits over some rows of the lm_head",
        "lm_head hidden_states embedding_bias",
    ),
    Reliance(
        f"{_ENDS}.vocab_parallel_embedding:UnquantizedEmbeddingMethod",
        VOCABULARY,
        "what makes an lm_head a plain matrix",
        CLASS,
    ),
    call(
        f"{_ENDS}.vocab_parallel_embedding:UnquantizedEmbeddingMethod.apply",
        VOCABULARY,
        "called by the logits processor with our rows",
        "layer x bias",
    ),
    call(
        f"{_ENDS}.vocab_parallel_embedding:UnquantizedEmbeddingMethod"
        ".process_weights_after_loading",
        VOCABULARY,
        "packs our rows on a CPU",
        "layer",
    ),
    Reliance(
        f"{_ENDS}.linear:UnquantizedLinearMethod",
        VOCABULARY,
        "what makes an lm_head a plain matrix",
        CLASS,
    ),
    Reliance(
        f"{_ENDS}.vocab_parallel_embedding:VocabParallelEmbedding",
        MODEL,
        "the target's table under LoRA wrappers and scales",
        CLASS,
    ),
    *members(
        f"{_ENDS}.vocab_parallel_embedding:VocabParallelEmbedding",
        VOCABULARY,
        "whether the lm_head is whole",
        "tp_size quant_method",
    ),
    call(f"{_RANKS}:get_tensor_model_parallel_rank", SHARDING, "which share of the head"),
    *members("vllm.config.parallel:ParallelConfig", MODEL, "how many", "tensor_parallel_size"),
    call(f"{_TOGETHER}:tensor_model_parallel_all_gather", SHARDING, "parts side by side", "input_"),
    call(f"{_TOGETHER}:tensor_model_parallel_all_reduce", SHARDING, "sum of parts", "input_"),
    Reliance("vllm.v1.attention.backends.utils:PAD_SLOT_ID", V2, "marks rows to skip", VALUE),
    call("vllm.compilation.backends:set_model_tag", V1 + ", " + V2, "cache key", "tag"),
)

CPU_KERNELS: tuple[Reliance, ...] = (
    call(
        f"{_OPS}:cpu_attn_get_scheduler_metadata",
        CPU_PAGES,
        "plans an attention over pages",
        "num_reqs num_heads num_kv_heads head_dim seq_lens dtype query_start_loc causal "
        "sliding_window_size isa enable_kv_split",
    ),
    call(
        f"{_OPS}:cpu_attention_with_kv_cache",
        CPU_PAGES,
        "attends to pages",
        "query key_cache value_cache output query_start_loc seq_lens scale causal alibi_slopes "
        "sliding_window block_table softcap scheduler_metadata s_aux",
    ),
    call(
        f"{_OPS}:cpu_attn_reshape_and_cache",
        CPU_PAGES,
        "writes pages",
        "key value key_cache value_cache slot_mapping isa",
    ),
    call(
        f"{_OPS}:rotary_embedding",
        CPU_PAGES,
        "rotates K before it is stored",
        "positions query key head_size cos_sin_cache is_neox",
    ),
    call(
        f"{_OPS}:rms_norm",
        CPU_NORMS,
        "the head's norms",
        "out input weight epsilon",
    ),
    call(
        f"{_CPU_BACKEND}:_get_attn_isa",
        CPU_PAGES,
        "names the kernels",
        "dtype block_size head_size",
    ),
    *members(
        f"{_CPU_BACKEND}:CPUAttentionBackend", CPU_PAGES, "what they take", "supported_dtypes"
    ),
    call(f"{_CPU_BACKEND}:CPUAttentionBackend.get_supported_head_sizes", CPU_PAGES, "the same"),
    call(
        f"{_CPU_BACKEND}:CPUAttentionBackend.get_supported_kernel_block_sizes",
        CPU_PAGES,
        "the same",
    ),
    *members(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner", V1, "which pages are whose", "input_batch"
    ),
    *members(
        "vllm.v1.worker.gpu_input_batch:InputBatch", V1, "which pages are whose", "block_table"
    ),
    call(
        "vllm.v1.worker.block_table:MultiGroupBlockTable.__getitem__",
        V1,
        "which pages are whose",
        "idx",
    ),
    *members(
        "vllm.v1.worker.block_table:BlockTable", V1, "which pages are whose", "num_blocks_per_row"
    ),
)

# What `bench`, `plan` and `eval --serve` rely on; serving needs none of it.
MEASURED: tuple[Reliance, ...] = (
    call("vllm.benchmarks.serve:add_cli_args", CLIENT, "the client's own options", "parser"),
    call("vllm.benchmarks.serve:main", CLIENT, "vLLM's benchmark client", "args"),
    *members(
        "vllm.v1.engine.llm_engine:LLMEngine",
        MEASURING,
        "from an engine to its scheduler",
        "engine_core",
    ),
    *members("vllm.v1.engine.llm_engine:LLMEngine", STEPPED, "which runner it has", "vllm_config"),
    *members(
        "vllm.v1.engine.core_client:InprocClient", MEASURING, "to the scheduler", "engine_core"
    ),
    *members("vllm.v1.engine.core:EngineCore", MEASURING, "to the scheduler", "scheduler"),
    *members(
        "vllm.v1.core.sched.scheduler:Scheduler",
        MEASURING,
        "holds a measured engine at a number of drafts",
        "dynamic_sd_lookup",
    ),
)
