"""Where a training has the target's hidden states from: the target in this process, or vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
import transformers
from torch import Tensor

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.target.ends import TargetEnds
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import can_pack, check_parts, load_target
from vllm_specformer.training.heldout import run_target
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packing import Batch, Batches
from vllm_specformer.training.result import Inputs
from vllm_specformer.training.run_directory import RunDirectory
from vllm_specformer.training.state_cache import StateCache
from vllm_specformer.training.streamed_states import states_from_server, states_from_vllm
from vllm_specformer.training.texts import Texts

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_GIB = 2**30


class States(Protocol):
    """A source of states.

    Attributes:
        ends: what the head works with of the target.
        parameters: of the whole target.
    """

    ends: TargetEnds
    parameters: int

    def can_pack(self) -> bool:
        """Whether texts that share a row do not see each other."""

    def begin(self, batches: Batches) -> None:
        """From now on these batches may be asked for, one after another."""

    def trained(self, number: int, batch: Batch, fields: dict[str, Tensor]) -> HookedRows:
        """Batch `number` of those that are trained on, laid out in `fields`, with its states."""

    def held_out(self, batch: Batch, fields: dict[str, Tensor]) -> HookedRows:
        """The same for a batch of texts that are evaluated."""


class TransformersStates:
    """The states of a target that runs here.

    Args:
        directory, cache: where to keep states of texts that are trained on, and how many bytes.
    """

    def __init__(self, target: HookedTarget, directory: Path, cache: int) -> None:
        self.ends: TargetEnds = target
        self._target = target
        self.parameters = sum(p.numel() for p in target.target.parameters())
        self._directory, self._limit = directory, cache
        self._packed = False
        self._cache: StateCache | None = None

    def can_pack(self) -> bool:
        return can_pack(self._target)

    def begin(self, batches: Batches) -> None:
        self._packed = batches.budget.packed
        if self._limit:
            self._cache = StateCache(self._directory, self._limit, batches.texts)

    def trained(self, number: int, batch: Batch, fields: dict[str, Tensor]) -> HookedRows:
        if self._cache is None:
            return self.held_out(batch, fields)
        return self._cache.rows(self._target, fields, batch, self._packed)

    def held_out(self, batch: Batch, fields: dict[str, Tensor]) -> HookedRows:
        return run_target(self._target, fields, self._packed)


def states_directory(out: Path) -> Path:
    """Where a server is proposed to write: beside the run, which may clean up what is in it."""
    return out.absolute().with_name(f"{out.absolute().name}-states")


@contextmanager
def open_states(
    inputs: Inputs,
    config: SpecFormerConfig,
    texts: Texts,
    directory: RunDirectory,
    device: torch.device,
) -> Iterator[States]:
    """The target's states, from Transformers or vLLM, as the settings say."""
    settings, dtype = inputs.settings, _DTYPES[inputs.dtype]
    if settings.states == "transformers":
        model = load_target(inputs.directory, dtype, device)
        transformers.utils.logging.disable_progress_bar()  # one bar is enough from here on
        target = HookedTarget(model, config.aux_hidden_state_layer_ids)
        check_parts(target, settings.target)
        yield TransformersStates(target, directory.path, int(settings.cache_states * _GIB))
        return
    transformers.utils.logging.disable_progress_bar()
    if settings.source == "server":
        with states_from_server(
            settings.states,
            inputs.directory,
            settings.target,
            settings.served_model,
            config,
            texts,
            dtype=dtype,
            device=device,
            directory=states_directory(directory.path),
            limit=int(settings.states_disk * _GIB),
        ) as served:
            yield served
        return
    print("starting vLLM, which runs the target", flush=True)
    with states_from_vllm(
        inputs.directory,
        settings.target,
        config,
        texts,
        dtype=dtype,
        device=device,
        directory=directory.states,
        limit=int(settings.states_disk * _GIB),
        engine_args=settings.engine_args,
        devices=settings.engine_devices,
    ) as states:
        yield states
