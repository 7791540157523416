"""One comparison from settings to metrics: `specformer bench` without the command line.

Servers of all arms seldom fit a machine together. So in every round each arm's server starts in its
turn, is measured at every concurrency, and ends; a different arm begins each round, and every other
round takes the concurrencies from the top. With `together` all servers are up, one of them works at
a time, and the arms of a concurrency are measured next to each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vllm_specformer.bench.arms import TREE, Arm, Schedule, build, default_names
from vllm_specformer.bench.cells import Cell, Cells, Key, all_keys, load_average, make_cell
from vllm_specformer.bench.client import Client
from vllm_specformer.bench.prompts import digest, write_data_set
from vllm_specformer.bench.settings import BenchSettings, server_arguments
from vllm_specformer.config import read_head_config
from vllm_specformer.data.files import directory_lock, write_atomic
from vllm_specformer.data.openings import read_prompts
from vllm_specformer.environment import hardware, versions
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.head_fields import HeadFields
from vllm_specformer.head_files import find_head
from vllm_specformer.pairing import check_pair, check_weights
from vllm_specformer.places import lasting, named_target
from vllm_specformer.planning.plan_file import Plan, read_plan
from vllm_specformer.serving.counts import read_draft_counts
from vllm_specformer.serving.server import Server, serving
from vllm_specformer.shapes import HeadShape, TargetShape
from vllm_specformer.target.files import find_target, fingerprint, read_json
from vllm_specformer.target.model import read_target_config

_WARM_UP_TOKENS = 16
_START_TIMEOUT_S = 900.0
# vLLM's processes poll for a second after their last work before they sleep.
_SETTLE_S = 1.5


@dataclass(frozen=True)
class Result:
    """Everything there is to report.

    Attributes:
        about: command, versions, hardware, target and settings, for files and tables.
        cells: the measurements, in the order of rounds, concurrencies and arms.
    """

    about: dict[str, Any]
    cells: list[Cell]
    target: TargetShape
    head: HeadShape
    plan: Plan | None


def compare(options: BenchSettings, say: Callable[[str], None]) -> Result:
    """Measure what is not measured yet; `say` gets lines for the user.

    Raises:
        SpecFormerError: anything the user can put right, before a server is started where possible.
    """
    return _Comparison(options, say).run()


class _Comparison:
    """Everything is checked in the constructor."""

    def __init__(self, options: BenchSettings, say: Callable[[str], None]) -> None:
        self.options, self.say = options, say
        self.head_files = find_head(options.head)
        config = read_head_config(self.head_files)
        check_weights(self.head_files, config)
        self.name = options.target or named_target(self.head_files, config, options.revision)
        place, _ = find_target(self.name, options.revision)
        self.place = Path(lasting(place))
        target = read_target_config(self.place)
        check_pair(config, target, self.name)
        fields = {name: getattr(config, name) for name in HeadFields.model_fields}
        self.head = HeadShape.from_fields(fields)
        self.target = TargetShape.from_config(read_json(self.place / "config.json"))
        self.plan = read_plan(options.schedule) if options.schedule else None
        schedule: Schedule | None = self.plan.schedule if self.plan else None
        head = lasting(options.head)
        confident = self.plan.confident_config(head) if self.plan and self.plan.rows else None
        tree = self.plan.tree_config(head) if self.plan else None
        # On V2 the cut wants full CUDA graphs, so there it has to be asked for.
        names = options.arms or default_names(
            _fitting(options, self.head.slots),
            schedule,
            None if runs_v2() else confident,
            tree if runs_v2() else None,
        )
        self.arms = build(
            names,
            head,
            self.head.slots,
            schedule,
            options.speculative_config,
            confident,
            tree,
        )
        if TREE in names and not runs_v2():
            raise SpecFormerError(
                f"--arms {TREE}: needs vLLM's V2 model runner, and servers here run V1",
                "leave it out (VLLM_USE_V2_MODEL_RUNNER=1 chooses V2 on a GPU)",
            )
        context = options.max_model_len(config.max_position_embeddings)
        self.prompts = read_prompts(options.prompts, self.place, options.max_tokens, context, say)
        for concurrency in options.concurrency:
            options.requests(concurrency, len(self.prompts))
        self.serve = [
            str(self.place),
            *server_arguments(options.engine_args, max(options.concurrency)),
        ]

    def run(self) -> Result:
        out = self.options.out
        with directory_lock(out):
            self._claim(out)
            self.cells = Cells(out / "cells")
            self.data = Path(lasting(out)) / "prompts.json"
            write_data_set(self.prompts, self.data)
            keys = list(all_keys(self.options.repeats, list(self.options.concurrency), self.arms))
            by_name = {arm.name: arm for arm in self.arms}
            missing = [key for key in keys if self.cells.find(key, by_name[key.arm]) is None]
            self.to_do, self.done = len(missing), 0
            if missing:
                self.say(f"{len(keys) - len(missing)} of {len(keys)} measurements are there")
                with Client(out / "client.log") as client:
                    self.client = client
                    order = self._together if self.options.together else self._in_turn
                    order(set(missing))
            cells = [cell for key in keys if (cell := self.cells.find(key, by_name[key.arm]))]
            return Result(self._about(), cells, self.target, self.head, self.plan)

    def _claim(self, out: Path) -> None:
        """Keep measurements of one kind in a directory."""
        options = self.options
        settings = {
            "target": fingerprint(self.place),
            "head": fingerprint(self.head_files),
            "prompts": digest(self.prompts),
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "ignore_eos": options.ignore_eos,
            "requests_per_slot": options.requests_per_slot,
            "serve": self.serve[1:],
            "together": options.together,
        }
        path = out / "settings.json"
        found = read_json(path) if path.is_file() else settings
        for name, value in settings.items():
            if found.get(name) != value:
                raise SpecFormerError(
                    f"--out {out}: holds measurements with {name}={found.get(name)!r}, and now it "
                    f"is {value!r}",
                    "choose another directory, or remove this one",
                )
        write_atomic(path, (json.dumps(settings, indent=2) + "\n").encode())

    def _in_turn(self, missing: set[Key]) -> None:
        """Round by round, one server at a time."""
        for number in range(self.options.repeats):
            for arm in _rotated(self.arms, number):
                keys = [key for key in missing if (key.round, key.arm) == (number, arm.name)]
                if not keys:
                    continue
                with self._server(arm) as server:
                    keys.sort(key=lambda key: key.concurrency, reverse=bool(number % 2))
                    for key in keys:
                        self._measure(key, arm, server)

    def _together(self, missing: set[Key]) -> None:
        """All servers up, the arms of a concurrency next to each other."""
        with contextlib.ExitStack() as stack:
            needed = [arm for arm in self.arms if any(key.arm == arm.name for key in missing)]
            servers = {arm.name: stack.enter_context(self._server(arm)) for arm in needed}
            for number in range(self.options.repeats):
                for place, concurrency in enumerate(self.options.concurrency):
                    for arm in _rotated(self.arms, number + place):
                        key = Key(number, concurrency, arm.name)
                        if key in missing:
                            time.sleep(_SETTLE_S)
                            self._measure(key, arm, servers[arm.name])

    @contextlib.contextmanager
    def _server(self, arm: Arm) -> Iterator[Server]:
        """A server of this arm that has answered requests already."""
        options = list(self.serve)
        if arm.speculative is not None:
            options += ["--speculative-config", json.dumps(arm.speculative)]
        log = self.options.out / f"server-{arm.name}.log"
        self.say(f"starting {arm.name} (log: {log})")
        with serving(options, log, timeout_s=_START_TIMEOUT_S) as server:
            write_atomic(log.with_suffix(".command"), (server.command + "\n").encode())
            for concurrency in (max(self.options.concurrency), 1):
                self._call(server, concurrency, concurrency, _WARM_UP_TOKENS)
            yield server

    def _measure(self, key: Key, arm: Arm, server: Server) -> None:
        requests = self.options.requests(key.concurrency, len(self.prompts))
        load, before = load_average(), read_draft_counts(server.url)
        saved = self._call(server, key.concurrency, requests, self.options.max_tokens)
        cell = make_cell(key, arm, saved, read_draft_counts(server.url) - before, load)
        self.cells.keep(cell)
        self.done += 1
        self.say(
            f"[{self.done}/{self.to_do}] round {key.round + 1}, {key.concurrency} at a time, "
            f"{key.arm}: {cell.tokens_per_second:.0f} tokens/s, "
            f"{cell.tokens_per_step:.2f} tokens per step"
        )

    def _call(
        self, server: Server, concurrency: int, requests: int, max_tokens: int
    ) -> dict[str, Any]:
        arguments = client_arguments(
            self.options, str(self.place), self.data, concurrency, requests, max_tokens
        )
        result = self.options.out / "client-result.json"
        return self.client.measure([*arguments, "--base-url", server.url], result)

    def _about(self) -> dict[str, Any]:
        options = self.options
        most = max(options.concurrency)
        requests = options.requests(most, len(self.prompts))
        client = partial(client_arguments, options, str(self.place), self.data)
        return {
            "command": shlex.join(["specformer", *sys.argv[1:]]),
            "target": lasting(self.name),
            "target_parameters": self.target.parameters,
            "head": lasting(options.head),
            "arms": {arm.name: arm.speculative for arm in self.arms},
            "rounds": options.repeats,
            "order": "all servers up, arms next to each other"
            if options.together
            else "one server at a time, every arm in every round",
            "serve": ["vllm", "serve", *self.serve],
            "client": ["vllm", "bench", "serve", *client(most, requests, options.max_tokens)],
            "temperature": options.temperature,
            "prompts": len(self.prompts),
            "hardware": hardware(),
            "versions": versions(),
        }


def client_arguments(
    options: BenchSettings, model: str, data: Path, concurrency: int, requests: int, max_tokens: int
) -> list[str]:
    """The arguments of `vllm bench serve` for one measurement, but for the server's address."""
    arguments = [
        *("--backend", "openai", "--endpoint", "/v1/completions", "--model", model),
        *("--dataset-name", "sharegpt", "--dataset-path", str(data), "--disable-shuffle"),
        *("--sharegpt-output-len", str(max_tokens), "--num-prompts", str(requests)),
        *("--no-oversample", "--max-concurrency", str(concurrency), "--disable-tqdm"),
        *("--temperature", str(options.temperature), "--seed", "0"),
        *("--ready-check-timeout-sec", "0"),
    ]
    return [*arguments, "--ignore-eos"] if options.ignore_eos else arguments


def _fitting(options: BenchSettings, slots: int) -> Sequence[int]:
    """The numbers of drafted tokens that this head can serve, of those that are default."""
    return [count for count in options.num_speculative_tokens if count <= slots]


def runs_v2() -> bool:
    """Whether servers started here run vLLM's V2 runner, which is GPUs' unless told otherwise."""
    return torch.cuda.is_available() and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0"


def _rotated(arms: Sequence[Arm], places: int) -> list[Arm]:
    """The arms in order, another one first each time."""
    first = places % len(arms)
    return [*arms[first:], *arms[:first]]
