"""The ledger: everything the plugin changes in vLLM, why, and what keeps it from misfiring.

Importing this module imports nothing of vLLM. `apply_all` runs in every process vLLM loads plugins
in, possibly more than once, and changes nothing the second time.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from vllm_specformer.config import ARCHITECTURE, SPECULATORS_TYPE, flat_fields
from vllm_specformer.engine.patches.command_line import find_target_of_head, offer_method
from vllm_specformer.engine.speculative_config import (
    OwnFields,
    as_dictionary,
    drafts_with_head,
    split_own_fields,
    verifies_coupled,
)

_MARK = "_specformer_patched"


@dataclass(frozen=True)
class Patch:
    """One change: where, why, what guards it, and the function that makes it."""

    target: str
    reason: str
    guard: str
    apply: Callable[[], None] = field(repr=False, compare=False)


def _register_model() -> None:
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(
            ARCHITECTURE, "vllm_specformer.engine.model:SpecFormerDraftModel"
        )


def _to_vllm_config(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """Speculators format -> the draft model's Hugging Face configuration, as vLLM's converters do.

    `pre_trained_config` starts as the head's layer section and is completed in place.
    """
    fields = flat_fields(config_dict)
    pre_trained_config.update(
        architectures=[ARCHITECTURE],
        num_hidden_layers=1,
        is_causal=True,  # keeps vLLM from asking for a non-causal backend for our one layer
        mask_token_id=0,  # required of parallel drafters; our slots are not made from a token
        eagle_aux_hidden_state_layer_ids=list(fields["aux_hidden_state_layer_ids"]),
        specformer=fields,
    )


def _register_format() -> None:
    from vllm.transformers_utils.configs.speculators.algos import SUPPORTED_SPECULATORS_TYPES

    SUPPORTED_SPECULATORS_TYPES.setdefault(SPECULATORS_TYPE, _to_vllm_config)


_ASKED_BY = ("speculative_config", "spec_method", "spec_model", "spec_tokens")


def _accept_method() -> None:
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_speculative_config
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        from vllm_specformer.engine.checks import checked, is_specformer
        from vllm_specformer.engine.metrics import publish

        # The --spec-* flags are another spelling of the same dictionary; merge before judging.
        given = as_dictionary(self.speculative_config or {})
        own = OwnFields()
        flags = {
            "method": getattr(self, "spec_method", None),
            "model": getattr(self, "spec_model", None),
            "num_speculative_tokens": getattr(self, "spec_tokens", None),
        }
        merged = {k: v for k, v in flags.items() if v is not None and k not in given} | given
        clash = any(v is not None and k in given for k, v in flags.items())
        if not clash and is_specformer(merged):
            merged, own = split_own_fields(merged)
            asked = {name: getattr(self, name, None) for name in _ASKED_BY}
            self.speculative_config = checked(merged, target_model_config, target_parallel_config)
            self.spec_method = self.spec_model = self.spec_tokens = None
            publish()
            try:
                config = original(self, target_model_config, target_parallel_config)
            finally:  # these arguments may be asked for a configuration once more
                vars(self).update(asked)
        else:
            config = original(self, target_model_config, target_parallel_config)
        if own != OwnFields():
            # vLLM's config has no field for them; the head's own config travels to every worker.
            config.draft_model_config.hf_config.specformer_verification = own.verification
            config.draft_model_config.hf_config.specformer_confidence = own.confidence
        return config

    setattr(create_speculative_config, _MARK, True)
    EngineArgs.create_speculative_config = create_speculative_config


def _drafts_with_us(vllm_config: Any, *_: Any) -> bool:
    return drafts_with_head(getattr(vllm_config, "speculative_config", None))


@dataclass(frozen=True)
class _Replaced:
    """A class whose constructor builds our subclass when its positional arguments are `wanted`."""

    name: str
    ours: str  # "module:Class"
    wanted: Callable[..., bool]


_REPLACED = {
    "vllm.v1.spec_decode.dflash": _Replaced(
        "DFlashProposer",
        "vllm_specformer.engine.proposer_v1:SpecFormerProposer",
        _drafts_with_us,
    ),
    "vllm.v1.worker.gpu.spec_decode.dflash.speculator": _Replaced(
        "DFlashSpeculator",
        "vllm_specformer.engine.speculator_v2:SpecFormerSpeculator",
        _drafts_with_us,
    ),
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler": _Replaced(
        "RejectionSampler",
        "vllm_specformer.engine.coupled:CoupledSampler",
        lambda sampler, speculative_config, *_: verifies_coupled(speculative_config),
    ),
}


def _construct_ours(base: type, replaced: _Replaced) -> None:
    """Let `base(...)` build our subclass where it is wanted."""
    if _MARK in base.__dict__:
        return

    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if cls is base and replaced.wanted(*args):
            module, name = replaced.ours.split(":")
            cls = getattr(import_module(module), name)
        return object.__new__(cls)

    base.__new__ = staticmethod(__new__)  # type: ignore[method-assign,assignment]
    setattr(base, _MARK, True)


# Modules whose functions fail on the CPU build, fail with speculation or lose time with it ->
# "module:function" of ours.
_REPAIRS = {
    "vllm.utils.cpu_triton_utils": ("cpu_sampling:repair_kernels",),
    "vllm.v1.sample.ops.topk_topp_sampler": ("cpu_sampling:repair_top_k",),
    "vllm.v1.worker.cpu_model_runner": (
        "cpu_sampling:repair_generators",
        "carried_drafts:send_with_output",
        "draftless_steps:sample_plainly",
    ),
    "vllm.v1.executor.multiproc_executor": (
        "carried_drafts:receive_with_output",
        "late_store:store_when_sent",
    ),
    "vllm.v1.sample.sampler": ("requests:repair_min_tokens",),
    "vllm.sampling_params": ("requests:refuse_logprob_token_ids",),
}


class _PostImportHook(importlib.abc.MetaPathFinder):
    """Patches modules when vLLM imports them, so loading the plugin imports none of them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _REPLACED and fullname not in _REPAIRS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _patch_module(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch_module(module: ModuleType) -> None:
    if module.__name__ in _REPAIRS:
        for repair in _REPAIRS[module.__name__]:
            file, function = repair.split(":")
            getattr(import_module(f"vllm_specformer.engine.patches.{file}"), function)(module)
        return
    replaced = _REPLACED[module.__name__]
    _construct_ours(getattr(module, replaced.name), replaced)


def _install_dispatch() -> None:
    if not any(isinstance(finder, _PostImportHook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImportHook())
    for name in (*_REPLACED, *_REPAIRS):
        if name in sys.modules:
            _patch_module(sys.modules[name])


LEDGER: tuple[Patch, ...] = (
    Patch(
        target="vllm.ModelRegistry.register_model",
        reason="adds the architecture SpecFormerDraftModel (official plugin interface)",
        guard="only if the architecture is not registered yet",
        apply=_register_model,
    ),
    Patch(
        target="vllm.transformers_utils.configs.speculators.algos.SUPPORTED_SPECULATORS_TYPES",
        reason="adds the converter of head configurations in speculators format, so that "
        "`vllm serve HEAD` works",
        guard="only if 'specformer' has no converter yet; adds a key, replaces none",
        apply=_register_format,
    ),
    Patch(
        target="vllm.engine.arg_utils.EngineArgs.create_speculative_config",
        reason="vLLM's `method` is a closed list: validates a SpecFormer config and passes it on "
        "as 'dflash', vLLM's word for one-pass drafting from hidden states",
        guard="acts only on method 'specformer' or a SpecFormer head; wrapped once (marker)",
        apply=_accept_method,
    ),
    Patch(
        target="vllm.engine.arg_utils.EngineArgs.add_cli_args",
        reason="`--spec-method` takes the methods of vLLM's closed list only: adds 'specformer' "
        "(see engine/patches/command_line.py)",
        guard="adds one choice to one argument; wrapped once (marker)",
        apply=offer_method,
    ),
    Patch(
        target="vllm.engine.arg_utils.maybe_override_with_speculators",
        reason="`vllm serve HEAD` takes a relative path in the head's file from the working "
        "directory: takes it from the file (see engine/patches/command_line.py)",
        guard="acts on the target that a SpecFormer head names; wrapped once (marker)",
        apply=find_target_of_head,
    ),
    Patch(
        target="vllm.v1.spec_decode.dflash.DFlashProposer.__new__ and "
        "vllm.v1.worker.gpu.spec_decode.dflash.speculator.DFlashSpeculator.__new__",
        reason="vLLM has no hook that hands a custom proposer the hidden states: builds our "
        "subclass instead (V1 and V2 runner)",
        guard="acts only when the draft architecture is SpecFormerDraftModel; installed by a "
        "post-import hook, once (marker)",
        apply=_install_dispatch,
    ),
    Patch(
        target="vllm.v1.worker.gpu.spec_decode.rejection_sampler.RejectionSampler.__new__",
        reason="vLLM has no way to choose another verification: builds our sampler (V2 runner)",
        guard='acts only on "verification": "coupled" in a SpecFormer speculative config; '
        "installed by a post-import hook, once (marker)",
        apply=_install_dispatch,
    ),
    Patch(
        target="vllm.utils.cpu_triton_utils._expand_kernel_impl",
        reason="on the CPU build it discards its result, so with any speculation temperature, "
        "top-k and top-p were uninitialised memory (see engine/patches/cpu_sampling.py)",
        guard="the CPU build alone imports that module; does what the kernel it replaces is to do",
        apply=_install_dispatch,
    ),
    Patch(
        target="vllm.utils.cpu_triton_utils._rejection_greedy_sample_kernel_impl, "
        "._rejection_random_sample_kernel_impl",
        reason="rejection_sample_method 'synthetic', for measuring at a chosen acceptance length, "
        "ends the engine on the CPU build, with any speculation (see patches/cpu_synthetic.py)",
        guard="the CPU build alone imports that module; acts on synthetic acceptance only, wrapped "
        "once",
        apply=_install_dispatch,
    ),
    Patch(
        target="vllm.v1.sample.ops.topk_topp_sampler.apply_top_k_only",
        reason="a step without draft rows ends the engine when a request sets top-k on the CPU "
        "build, with any speculation (see engine/patches/cpu_sampling.py)",
        guard="acts on empty logits only, which the original cannot take; wrapped once",
        apply=_install_dispatch,
    ),
    Patch(
        target="vllm.v1.worker.cpu_model_runner.CPUModelRunner._sample, ._bookkeeping_sync",
        reason="a seeded request whose prompt takes two steps ends the engine on the CPU build, "
        "with or without speculation (see engine/patches/cpu_sampling.py)",
        guard="the CPU's runner alone; acts on rows whose sample is thrown away, wrapped once",
        apply=_install_dispatch,
    ),
    Patch(
        target="vllm.v1.worker.cpu_model_runner.CPUModelRunner.sample_tokens, "
        "vllm.v1.executor.multiproc_executor.MultiprocExecutor.sample_tokens, "
        ".take_draft_token_ids",
        reason="spares the engine one call to the worker process per step: the drafts come with "
        "the step's output (see engine/patches/carried_drafts.py)",
        guard="sent by the CPU's runner alone, and only when the draft architecture is "
        "SpecFormerDraftModel; without them the executor asks as before; wrapped once",
        apply=_install_dispatch,
    ),
    Patch(
        target="vllm.v1.worker.cpu_model_runner.CPUModelRunner.execute_model",
        reason="a step without drafts was laid out and sampled for verification, which its tokens "
        "do not need (see engine/patches/draftless_steps.py)",
        guard="the CPU's runner alone, without asynchronous scheduling, and only when the draft "
        "architecture is SpecFormerDraftModel and no request of the step has drafts; wrapped once",
        apply=_install_dispatch,
    ),
    Patch(
        target="vllm.v1.executor.multiproc_executor.WorkerProc.handle_output",
        reason="after a step that drafts nothing nobody waits while the head's K/V are stored (see "
        "engine/patches/late_store.py)",
        guard="stores what the CPU's SpecFormer proposer has left and does nothing in any other "
        "worker; the next step stores it where this is not called; wrapped once",
        apply=_install_dispatch,
    ),
    Patch(
        target="vllm.v1.sample.sampler.Sampler.apply_logits_processors",
        reason="min_tokens forbids the end of a text one token too long where drafts reach the "
        "minimum, with any speculation on the V1 runner (see engine/patches/requests.py)",
        guard="acts on bonus tokens of requests whose drafts reach min_tokens; wrapped once",
        apply=_install_dispatch,
    ),
    Patch(
        target="vllm.sampling_params.SamplingParams._validate_spec_decode",
        reason="logprob_token_ids ends the engine or returns other tokens' log-probabilities with "
        "any speculation: refuses it by name (see engine/patches/requests.py)",
        guard="acts only when the draft architecture is SpecFormerDraftModel; wrapped once",
        apply=_install_dispatch,
    ),
)


def apply_all() -> None:
    """Make every change of the ledger; safe to call again."""
    for patch in LEDGER:
        patch.apply()
