"""A target under a KV cache dtype, a backend and ranks, for vLLM's functions on KV caches."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator as State
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.mla.flashmla import FlashMLABackend
from vllm.v1.attention.backends.mla.rocm_aiter_mla import AiterMLABackend
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.rocm_attn import RocmAttentionBackend
from vllm.v1.attention.backends.utils import (
    get_supported_kv_cache_layouts,
    resolve_kv_cache_layout,
)
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.worker.utils import allocate_kv_cache, customize_attention_spec

from support.kv_groups.targets import Target
from vllm_specformer.engine.head_pages import HeadShape, Lender, lay_out
from vllm_specformer.engine.patches.kv_groups import head_layer_name

MAX_MODEL_LEN = 8192
BFLOAT16 = torch.bfloat16


class FlashInfer(FlashAttentionBackend):
    """What FlashInfer's backend declares, which cannot be imported without FlashInfer."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [16, 32, 64]


class FlashInferMLA(FlashMLABackend):
    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [32, 64]


# Backend for attention and for MLA.
BACKENDS: dict[str, tuple[type[AttentionBackend], type[AttentionBackend]]] = {
    "FlashAttention": (FlashAttentionBackend, FlashMLABackend),
    "FlashInfer": (FlashInfer, FlashInferMLA),
    "ROCm": (RocmAttentionBackend, AiterMLABackend),
}


class Layer(AttentionLayerBase):
    """The attributes that vLLM's layers read to make their spec."""

    attn_type, indexer, non_causal_multi_token_decode = "decoder", None, False
    mamba_type, is_kv_cache_tp_replicated = MambaAttentionBackendEnum.MAMBA2, False

    def __init__(self, backend: type[AttentionBackend], **attributes: Any) -> None:
        self.attn_backend = backend
        vars(self).update(attributes)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self.attn_backend


class AttentionLayer(Layer):
    get_kv_cache_spec: ClassVar[Any] = Attention.get_kv_cache_spec


class MLALayer(Layer):
    get_kv_cache_spec: ClassVar[Any] = MLAAttention.get_kv_cache_spec


class MambaLayer(Layer):
    get_kv_cache_spec: ClassVar[Any] = MambaBase.get_kv_cache_spec

    def get_state_shape(self) -> Any:
        return self.shapes  # type: ignore[attr-defined]

    def get_state_dtype(self) -> Any:
        return self.dtypes  # type: ignore[attr-defined]


class Setting:
    """One row: a target under a KV cache dtype, a backend and a number of ranks."""

    def __init__(self, target: Target, kv_dtype: str, backend: str, tp: int, drafts: int) -> None:
        self.target, self.tp, self.drafts = target, tp, drafts
        self.attention_backend, self.mla_backend = BACKENDS[backend]
        self.kv_dtype = "auto" if kv_dtype == "bf16" else kv_dtype
        cache = SimpleNamespace(
            block_size=64 if target.mla else 16,
            cache_dtype=self.kv_dtype,
            kv_cache_layout=None,
            skip_page_size_padded=None,
            mamba_page_size_padded=None,
            mamba_block_size=MAX_MODEL_LEN,
            mamba_cache_mode="none",
            use_replayssm=False,
            num_gpu_blocks_override=2,
            prefix_cache_retention_interval=None,
        )
        cache.get_resolved_kv_cache_layout = lambda: self.layout
        self.config: Any = SimpleNamespace(
            model_config=SimpleNamespace(
                model=target.name, dtype=BFLOAT16, max_model_len=MAX_MODEL_LEN
            ),
            cache_config=cache,
            scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
            attention_config=SimpleNamespace(hisparse_config=None),
            compilation_config=SimpleNamespace(static_forward_context={}),
            speculative_config=None,
            kv_transfer_config=None,
            num_speculative_tokens=drafts,
        )
        self.layers: dict[str, Layer] = self.config.compilation_config.static_forward_context
        self._add_layers()
        names = [[layout.name for layout in get_supported_kv_cache_layouts(self._backends())]]
        specs = self.specs().values()
        self.layout = resolve_kv_cache_layout(self.config, names, specs)

    def _backends(self) -> set[type[AttentionBackend]]:
        return {layer.attn_backend for layer in self.layers.values()}

    def _add_layers(self) -> None:
        torch_dtype = BFLOAT16 if self.kv_dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE["fp8"]
        made: list[Layer] = []
        for count, heads, size, window in self.target.attention:
            shape = {"num_kv_heads": max(1, heads // self.tp), "head_size": size}
            shape |= {"head_size_v": size, "sliding_window": window or None}
            dtypes = {"kv_cache_dtype": self.kv_dtype, "kv_cache_torch_dtype": torch_dtype}
            made += [AttentionLayer(self.attention_backend, **shape, **dtypes)] * count
        latent = {"kv_cache_dtype": self.kv_dtype, "head_size": 576, "sliding_window": None}
        made += [MLALayer(self.mla_backend, **latent)] * self.target.mla
        if self.target.mamba:
            self._fit_blocks(made[-1])
            count, width, heads, *sizes = self.target.mamba
            conv = State._orient_conv_shape(width // self.tp, 3 + self.drafts)
            shapes = conv, (heads // self.tp, *sizes)
            dtypes = BFLOAT16, self.target.state_dtype
            made += [MambaLayer(self.attention_backend, shapes=shapes, dtypes=dtypes)] * count
        self.layers |= {f"model.layers.{i}.attn": layer for i, layer in enumerate(made)}

    def _fit_blocks(self, attention: Layer) -> None:
        """Blocks so large that one page holds a state, as vLLM's platforms choose them."""
        cache, backend = self.config.cache_config, attention.attn_backend
        spec = attention.get_kv_cache_spec(self.config)
        token = backend.customize_spec(spec).page_size_bytes // cache.block_size
        _, width, heads, *sizes = self.target.mamba
        conv = (3 + self.drafts) * width // self.tp * BFLOAT16.itemsize
        state = conv + heads // self.tp * math.prod(sizes) * self.target.state_dtype.itemsize
        unit = max(cache.block_size, 128 if self.target.mla else 16)
        cache.block_size = unit * -(-state // (unit * token))
        cache.mamba_page_size_padded = cache.block_size * token

    def specs(self) -> dict[str, Any]:
        """Each layer's spec as the model runners collect them."""
        return {
            name: customize_attention_spec(layer.attn_backend, spec)
            if isinstance(spec := layer.get_kv_cache_spec(self.config), AttentionSpec)
            else spec
            for name, layer in self.layers.items()
        }

    def groups(self, of_head: dict[str, Any]) -> Any:
        return kv_cache_utils.get_kv_cache_groups(self.config, self.specs() | of_head)

    def head_specs(self, shape: HeadShape) -> dict[str, Any]:
        """The specs of the head's layers, if the target can lend one.

        Raises:
            SpecFormerError: it cannot.
        """
        lender, first = Lender(self.config, shape), len(self.layers)
        names = [head_layer_name(first + i) for i in range(lender.num_layers)]
        return dict.fromkeys(names, lender.spec(self.config))

    def check_pages(self, groups: Any, names: list[str], shape: HeadShape) -> None:
        """Lay the head out in pages as vLLM allocates them.

        Raises:
            ValueError: the layout cannot express the groups, or has no room for the head.
        """
        config = kv_cache_utils.get_kv_cache_config_from_groups(self.config, groups, 1 << 40)
        caches = allocate_kv_cache(config, torch.device("cpu"), self.layout)
        lay_out([caches[name] for name in names], shape, dense=False)
