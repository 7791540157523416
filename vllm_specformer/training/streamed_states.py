"""Hidden states from vLLM, a little ahead of the training, on a disk of bounded size.

The plan of a run is known, so a thread lets the engine run over the texts of the next batches while
the head is trained on those before. States lie in one file per text and are deleted when they are
read. A continued run begins at its next batch, and what it needs is made again.

The state of a text's last token is not asked for: no anchor reaches it, and a text that fills the
target's context leaves no room for the token that vLLM says next.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.families import read_families
from vllm_specformer.serving.hidden_states import Extracted, StatesEngine
from vllm_specformer.serving.states_server import StatesServer
from vllm_specformer.target.ends import TargetEnds
from vllm_specformer.target.model import parallel
from vllm_specformer.target.unsupported import UnsupportedTargetError
from vllm_specformer.target.without_layers import count_parameters, load_ends
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packing import Batch, Batches
from vllm_specformer.training.rows import lay_out, parts_of
from vllm_specformer.training.texts import Texts

_OF_FREE = 0.25  # of the disk's free space that files may take at most
# The engine is told so many tokens at a time, if they fit: many steps of it, and few seconds, for
# which an evaluation has to wait.
_ORDER_TOKENS = 1 << 15
_CHECKED = 4  # texts
# How far log probabilities of the likeliest token may lie apart, on average: rounding of logits.
_APART = {torch.float32: 1e-3}
_APART_16_BIT = 0.1
_END_S = 1.0  # for what is under way when nothing more is wanted
_HELD_OUT = -1  # in the place of a batch's number
_Key = tuple[int, int]  # batch and text


class StatesSource(Protocol):
    """An engine or a server that writes states to files."""

    def extract(self, texts: Sequence[Sequence[int]]) -> list[Extracted]:
        """Run the target over token ids; one file per text, whole when this returns."""

    def kill(self) -> None:
        """End at once; an `extract` under way in another thread raises SpecFormerError."""


def check_states(states: str, config: SpecFormerConfig, processes: int) -> None:
    """Refuse what is known not to work, before anything is started.

    Args:
        states: "vllm", or a server's URL.

    Raises:
        SpecFormerError: says what, and what to do.
    """
    if processes > 1:
        where = "start the server on more GPUs"
        if states == "vllm":
            where = (
                "give the engine more GPUs, as in --engine-devices 1,2 "
                "--engine-args '{\"tensor_parallel_size\": 2}'"
            )
        raise SpecFormerError(
            f"--states {states}: one process trains, {processes} were started",
            f"leave torchrun out and {where}",
        )
    if states == "vllm" and find_spec("vllm") is None:
        raise SpecFormerError(
            "--states vllm: vLLM is not installed", "install it, or take --states transformers"
        )
    known = read_families()
    family, last = known.find(config.target_architecture), config.target_num_layers
    if family is not None and family.handed_out.lacking([last], last):
        raise UnsupportedTargetError(
            f"--states {states}: vLLM {known.vllm}'s class for {family.architecture} hands out no "
            f"state {last}, after the last layer, from which the target's distribution is made",
            "take --states transformers",
        )


@contextmanager
def states_from_vllm(
    target: Path,
    name: str,
    config: SpecFormerConfig,
    texts: Texts,
    *,
    dtype: torch.dtype,
    device: torch.device,
    directory: Path,
    limit: int,
    engine_args: dict[str, Any],
    devices: str | None,
) -> Iterator[VllmStates]:
    """Start an engine on the target and take the states from it until the block is left.

    Args:
        name: of the target, for messages.
        dtype, device: of what is loaded of the target here, and the states' dtype.
        directory: for the files; what it holds is removed.
        limit: bytes of files, a quarter of the disk's free space at most.
        engine_args: further arguments of vLLM.
        devices: GPUs that the engine sees; None: ours.

    Raises:
        SpecFormerError: the target is unsuitable, the engine does not start or ends.
    """
    ends = TargetEnds(load_ends(target, dtype, device), config.aux_hidden_state_layer_ids)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    if device.type == "cuda" and devices is None:
        engine_args = {"gpu_memory_utilization": 0.6} | engine_args
    engine = StatesEngine(
        target,
        sorted({*ends.hook_ids, config.target_num_layers}),
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=int(texts.lengths.max()),
        directory=directory,
        engine_args=engine_args,
        environment={} if devices is None else {"CUDA_VISIBLE_DEVICES": devices},
    )
    try:
        with (
            engine,
            _checked(engine, ends, config, texts, directory, limit, target, name) as states,
        ):
            yield states
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def states_from_server(
    url: str,
    target: Path,
    name: str,
    served_as: str | None,
    config: SpecFormerConfig,
    texts: Texts,
    *,
    dtype: torch.dtype,
    device: torch.device,
    directory: Path,
    limit: int,
) -> Iterator[VllmStates]:
    """Take the states from a server that runs already; the rest as of `states_from_vllm`.

    Args:
        served_as: what the server calls the target; None: as here, by name or directory.
        directory: where the server is proposed to write; where it does is found out.

    Raises:
        SpecFormerError: server or target are unsuitable, or the server does not answer.
    """
    hooks = config.aux_hidden_state_layer_ids
    server = StatesServer(
        url,
        name,
        {name, str(target), str(target.resolve())} if served_as is None else {served_as},
        sorted({*hooks, config.target_num_layers}),
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=int(texts.lengths.max()),
        directory=directory,
    )
    place = server.connect(texts.input_ids(0)[:-1].tolist(), config.hidden_size)
    ends = TargetEnds(load_ends(target, dtype, device), hooks)
    with _checked(server, ends, config, texts, place, limit, target, name) as states:
        yield states


@contextmanager
def _checked(
    source: StatesSource,
    ends: TargetEnds,
    config: SpecFormerConfig,
    texts: Texts,
    place: Path,
    limit: int,
    target: Path,
    name: str,
) -> Iterator[VllmStates]:
    """States of a source that writes to `place`, held against the target's own probabilities."""
    limit = min(limit, int(_OF_FREE * shutil.disk_usage(place).free))
    states = VllmStates(source, ends, config, texts, limit, count_parameters(target))
    try:
        states.check(name)
        yield states
    finally:
        states.close()


class VllmStates:
    """The states that an engine or a server writes (see `states.States`)."""

    def __init__(
        self,
        engine: StatesSource,
        ends: TargetEnds,
        config: SpecFormerConfig,
        texts: Texts,
        limit: int,
        parameters: int,
    ) -> None:
        self.ends, self.parameters = ends, parameters
        self._engine, self._texts, self._limit = engine, texts, limit
        self._last = config.target_num_layers
        self._ids = sorted({*ends.hook_ids, self._last})
        self._token_bytes = len(self._ids) * config.hidden_size * ends.dtype.itemsize
        self._changed = threading.Condition()
        # What follows belongs to whoever holds it.
        self._files: dict[_Key, Path] = {}
        self._waiting: list[list[_Key]] = []  # of texts that are evaluated
        self._batches: Batches | None = None
        self._next: int | None = None  # the first batch that was not asked for
        self._used = 0  # bytes of files that are there or being made
        self._error: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._produce, daemon=True, name="states")

    def can_pack(self) -> bool:
        return True

    def begin(self, batches: Batches) -> None:
        self._batches = batches
        self._thread.start()

    def close(self) -> None:
        """End the thread, and the engine if it is at work; remove files that nobody will read."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_END_S)
        if self._thread.is_alive():
            self._engine.kill()
            self._thread.join()
        for file in self._files.values():
            file.unlink(missing_ok=True)

    def trained(self, number: int, batch: Batch, fields: dict[str, Tensor]) -> HookedRows:
        with self._changed:
            if self._next is None:  # a continued run begins somewhere
                self._next = number
                self._changed.notify_all()
        return self._rows([(number, index) for row in batch for index in row], batch, fields)

    def held_out(self, batch: Batch, fields: dict[str, Tensor]) -> HookedRows:
        keys = [(_HELD_OUT, index) for row in batch for index in row]
        with self._changed:
            self._waiting.append(keys)
            self._changed.notify_all()
        return self._rows(keys, batch, fields)

    @torch.no_grad()
    def check(self, name: str) -> None:
        """Hold what the engine says behind some texts against what is made of their states here.

        Raises:
            UnsupportedTargetError: they differ, so the target does more to its states, or has
                another embedding, than the head's drafts would know of.
        """
        indices = range(min(_CHECKED, len(self._texts)))
        apart = []
        extracted = self._extract(indices)
        contents = [self._read(found.file, i) for i, found in zip(indices, extracted, strict=True)]
        for index, found, content in zip(indices, extracted, contents, strict=True):
            states = parts_of(content, self.ends.device, self.ends.dtype)
            by_id = dict(zip(self._ids, states, strict=True))
            logits = self.ends.lm_head(self.ends.norm(by_id[self._last][-1:]))
            logprob = float(logits.float().log_softmax(-1)[0, found.token])
            apart.append(abs(logprob - found.logprob))
            tokens = torch.from_numpy(self._tokens(index)).to(self.ends.device)
            if 0 in by_id and not parallel(self.ends.embed(tokens), by_id[0]):
                raise UnsupportedTargetError(
                    f"target {name}: the state that vLLM hands out before the first layer is not "
                    "the checkpoint's embedding, up to one factor",
                    "this family is not supported",
                )
        if not np.mean(apart) <= _APART.get(self.ends.dtype, _APART_16_BIT):
            raise UnsupportedTargetError(
                f"target {name}: the checkpoint's final norm and lm_head make other probabilities "
                f"of vLLM's last state than vLLM itself (e^{np.mean(apart):.2g} times, on average)",
                "it must run this checkpoint, and its arguments must not change the model; with "
                "neither, this family is not supported with states from vLLM",
            )

    # --- what is made, in the thread ---

    def _produce(self) -> None:
        try:
            while (keys := self._take()) is not None:
                found = self._extract([index for _, index in keys])
                with self._changed:
                    self._files |= {k: f.file for k, f in zip(keys, found, strict=True)}
                    self._changed.notify_all()
        except Exception as error:  # for whoever waits for the states
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _take(self) -> list[_Key] | None:
        """Wait for something to do: the texts to run over next; None: the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self._has_room())
            if self._closing:
                return None
            if self._waiting:
                return self._waiting.pop(0)
            assert self._batches is not None
            assert self._next is not None
            keys: list[_Key] = []
            most = min(self._limit // 4, _ORDER_TOKENS * self._token_bytes)
            while self._has_room() and (not keys or self._bytes(keys) < most):
                batch = self._batches.batch(self._next)
                added = [(self._next, index) for row in batch for index in row]
                self._used += self._bytes(added)
                self._next += 1
                keys += added
            return keys

    def _has_room(self) -> bool:
        """Whether there is a batch to make, and room for it; for one batch there always is."""
        if self._next is None or self._batches is None or self._next >= len(self._batches):
            return False
        batch = self._batches.batch(self._next)
        size = self._bytes([(self._next, index) for row in batch for index in row])
        return not self._used or self._used + size <= self._limit

    def _bytes(self, keys: Sequence[_Key]) -> int:
        indices = [index for _, index in keys]
        return int((self._texts.lengths[indices] - 1).sum()) * self._token_bytes

    def _extract(self, indices: Sequence[int]) -> list[Extracted]:
        return self._engine.extract([self._tokens(index).tolist() for index in indices])

    def _tokens(self, index: int) -> np.ndarray:
        """The tokens of a text whose states are of use, int64."""
        return self._texts.input_ids(index)[:-1].astype(np.int64)

    # --- what is read ---

    def _rows(self, keys: list[_Key], batch: Batch, fields: dict[str, Tensor]) -> HookedRows:
        with self._changed:
            self._changed.wait_for(
                lambda: self._error is not None or all(key in self._files for key in keys)
            )
            if self._error is not None:
                raise self._error
            files = {key[1]: self._files.pop(key) for key in keys}
        laid_out = lay_out(
            lambda index: self._read(files[index], index),
            batch,
            self._texts,
            fields["input_ids"].shape[1],
        )
        if keys[0][0] != _HELD_OUT:
            with self._changed:
                self._used -= self._bytes(keys)
                self._changed.notify_all()
        parts = parts_of(laid_out, self.ends.device, self.ends.dtype)
        by_id = dict(zip(self._ids, parts, strict=True))
        with torch.no_grad():
            last = self.ends.norm(by_id[self._last])
        moved = {name: value.to(self.ends.device) for name, value in fields.items()}
        return HookedRows([by_id[hook] for hook in self.ends.hook_ids], last, **moved)

    def _read(self, file: Path, index: int) -> Tensor:
        """The states of a text [tokens, ids, H]; the file is deleted.

        Raises:
            SpecFormerError: they are another text's.
        """
        content = load_file(file)
        file.unlink()
        if content["token_ids"].tolist() != self._tokens(index).tolist():
            raise SpecFormerError(
                f"--states: {file.name} holds the states of other tokens than text {index}'s",
                "give the same command again",
            )
        return content["hidden_states"]
