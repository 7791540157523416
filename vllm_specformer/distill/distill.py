"""A distillation from prompt files to a complete directory, continued wherever it was stopped.

A shard is a fixed set of prompts, decided by the input and the settings. Finished shards are left
alone, the others are made; the manifest follows after each of them. Whatever kills the process, the
same command goes on, and its requests are those an undisturbed run would have sent.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vllm_specformer.data.files import DiskFullError, directory_lock, remove_partials, write_errors
from vllm_specformer.data.manifest import (
    MANIFEST_FILE,
    DistilledDataError,
    Manifest,
    Sampling,
    Settings,
    ShardRecord,
    read_manifest,
)
from vllm_specformer.data.prompts import (
    Prompt,
    PromptError,
    PromptSet,
    scan,
    shortened,
    without_tools,
)
from vllm_specformer.data.shards import ShardWriter, settings_of_shards
from vllm_specformer.distill.backend import Engine, EngineError
from vllm_specformer.distill.dialogue import TEMPLATE, Dialogue
from vllm_specformer.distill.encode import Encoder, TemplateRefusedError, load_encoder
from vllm_specformer.distill.progress import ProgressBar
from vllm_specformer.distill.settings import DistillSettings
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.target.files import find_target, read_json, target_record
from vllm_specformer.target.model import check_trainable
from vllm_specformer.target.quantised import CannotUnpackError, output_is_quantised
from vllm_specformer.target.without_layers import count_parameters

_SHARD, _CPU_SHARD = 1000, 128  # prompts
_TRIED_TEMPLATES = 50  # conversations that are rendered before the engine starts
# Settings that another value of is refused, by the option that sets them.
_OPTIONS = {
    "target.fingerprint": "--target (its files)",
    "sampling.temperature": "--temperature",
    "sampling.sampled_share": "--sampled-share",
    "sampling.sampled_temperature": "--sampled-temperature",
    "sampling.top_p": "--top-p",
    "sampling.max_tokens": "--max-tokens",
    "sampling.seed": "--seed",
    "chat_template_sha256": "--chat-template",
    "chat_template_args": "--chat-template-args",
    "prompts": "--prompts (the files' content)",
    "max_prompts": "--max-prompts",
    "prompt_count": "number of prompts",
    "shard_size": "--shard-size",
    "engine": "--engine",
    "dtype": "--dtype",
    "max_model_len": "--max-model-len",
    "context": "context length",
    "format_version": "format version",
}


class OtherSettingsError(SpecFormerError):
    """The directory was begun with other arguments."""


OpenEngine = Callable[[DistillSettings, Path, Encoder], Engine]


def start_engine(options: DistillSettings, target: Path, encoder: Encoder) -> Engine:
    """Start vLLM, or connect to the server."""
    if options.offline:
        from vllm_specformer.distill.offline import OfflineEngine

        return OfflineEngine(target, options.dtype, options.max_model_len, options.engine_args)
    from vllm_specformer.distill.server import ServerEngine

    config = read_json(target / "config.json")
    text = config.get("text_config") or config
    return ServerEngine(
        options.engine,
        options.served_model or options.target,
        encoder,
        options.concurrency,
        options.max_model_len,
        text.get("max_position_embeddings"),
    )


def distill(
    options: DistillSettings,
    open_engine: OpenEngine | None = None,
    report: Callable[[str], None] = print,
) -> Manifest:
    """Make `options.out` complete, from wherever it stands.

    Args:
        open_engine: what to call for an engine in place of `start_engine`.
        report: gets lines for the user.

    Raises:
        SpecFormerError: wrong input, a directory in use or of another run, an engine that does not
            work, a full disk. What was finished before stays.
    """
    with directory_lock(options.out):
        remove_partials(options.out)
        return _Run(options, report).finish(open_engine or start_engine)


class _Run:
    """One run into a locked directory: everything is checked before the engine starts."""

    def __init__(self, options: DistillSettings, report: Callable[[str], None]) -> None:
        self.options = options
        self.report = report
        self.directory = options.out
        self.finished: dict[int, ShardRecord] = {}
        self.target, commit = find_target(options.target, options.revision)
        record = target_record(options.target, self.target, commit)
        self.prompts = _scanned(options, report)
        self.ids = self.prompts.select(options.max_prompts, options.seed)
        self.encoder = load_encoder(
            self.target,
            options.chat_template,
            options.chat_template_args,
            chats=self.prompts.chats > 0,
        )
        self.begun = _begun(options.out)
        self.settings = Settings(
            target=record,
            sampling=Sampling(
                temperature=options.temperature,
                sampled_share=options.sampled_share,
                sampled_temperature=options.sampled_temperature,
                top_p=options.top_p,
                max_tokens=options.max_tokens,
                seed=options.seed,
            ),
            chat_template_sha256=self.encoder.template_sha256,
            chat_template_args=options.chat_template_args,
            prompts=self.prompts.files,
            max_prompts=options.max_prompts,
            prompt_count=len(self.ids),
            shard_size=options.shard_size or _usual_shard_size(options, self.begun),
            engine="offline" if options.offline else "server",
            dtype=options.dtype if options.offline else "server",
            max_model_len=options.max_model_len,
            # The engine decides; until it runs, what the directory was begun with.
            context=self.begun.context if self.begun else 1,
        )
        self._check_same()
        self._try_template()

    def _check_trainable(self) -> None:
        """Refuse, before an engine starts, a target that no head can be trained for."""
        try:
            check_trainable(self.target)
        except CannotUnpackError as error:
            if output_is_quantised(self.target):
                raise
            count_parameters(self.target)
            self.report(
                f"note: {error.problem}; train with --states vllm, which does not unpack weights"
            )

    def finish(self, open_engine: OpenEngine) -> Manifest:
        """Make the missing shards."""
        manifest = self._manifest()
        if manifest is None or not manifest.complete:
            shards = f"{self.settings.num_shards} shard{'s' * (self.settings.num_shards > 1)}"
            there = f", {len(manifest.shards)} of them finished" if manifest else ""
            # Its answers are of no use if no head can learn from them.
            self._check_trainable()
            self.report(
                f"{len(self.ids)} prompts in {shards}{there}; starting {self.options.engine}"
            )
            manifest = self._generate(open_engine(self.options, self.target, self.encoder))
        if not manifest.counts.conversations:
            raise SpecFormerError(
                f"{self.directory}: not one of {len(self.ids)} prompts could be used: "
                f"{in_words(manifest.counts.skipped)}",
                "choose other prompts or settings, and another directory",
            )
        return manifest

    # -- what is there ------------------------------------------------------------------------

    def _check_same(self) -> None:
        if self.begun is None:
            return
        changes = differences(self.begun, self.settings)
        if changes:
            raise OtherSettingsError(
                f"{self.directory} was begun with other arguments: {'; '.join(changes)}. Give "
                "those again to continue it, or choose another --out"
            )
        # Names may have changed while the content is the same: keep those it was begun with.
        self.settings = self.begun

    def _manifest(self) -> Manifest | None:
        """The manifest made anew from the shards; None where no run has begun."""
        if self.begun is None:
            return None
        path = self.directory / MANIFEST_FILE
        old = read_manifest(self.directory, allow_incomplete=True) if path.is_file() else None
        known = {shard.file: shard.sha256 for shard in old.shards} if old else {}
        self.finished = ShardWriter(self.directory, self.settings).finished(known)
        versions = old.versions if old else _versions({})
        manifest = Manifest.of(self.settings, self.finished.values(), versions)
        if manifest != old:
            manifest.write(self.directory)
        return manifest

    def _try_template(self) -> None:
        """Refuse, before the engine starts, a template that takes none of the conversations."""
        if not self.prompts.chats:
            return
        if self.prompts.with_tools and not self.encoder.shows_tools:
            self.report(f"warning: {without_tools(self.prompts.with_tools)}")
        refusals = []
        for prompt in islice(self.prompts.read(self.ids[:_TRIED_TEMPLATES]), _TRIED_TEMPLATES):
            if prompt.text is not None:
                return
            try:
                self.encoder.opening(prompt.turns[0], prompt.tools)
                return
            except TemplateRefusedError as error:
                refusals.append(str(error))
        raise SpecFormerError(
            f"the chat template refuses each of the first {len(refusals)} conversations: "
            f"{refusals[0]}",
            "give another with --chat-template FILE, or other prompts",
        )

    # -- what is missing ----------------------------------------------------------------------

    def _generate(self, engine: Engine) -> Manifest:
        self._settle_context(engine.context)
        self.writer = ShardWriter(self.directory, self.settings)
        versions = _versions(engine.versions)
        self._write_manifest(versions)
        size = self.settings.shard_size
        shards = {n: self.ids[n * size : (n + 1) * size] for n in range(self.settings.num_shards)}
        missing = {n: ids for n, ids in shards.items() if n not in self.finished}
        done = self.prompts.turns_of([i for n in self.finished for i in shards[n]])
        stream = self.prompts.read([i for ids in missing.values() for i in ids])
        bar = ProgressBar(self.prompts.turns_of(self.ids), done)
        manifest = Manifest.of(self.settings, self.finished.values(), versions)
        try:
            with write_errors():
                for number, ids in missing.items():
                    dialogues = [self._dialogue(prompt) for prompt in islice(stream, len(ids))]
                    engine.answer(dialogues, bar)
                    bar.answered(sum(dialogue.missing_turns for dialogue in dialogues), 0)
                    self.finished[number] = self._write(number, dialogues)
                    manifest = self._write_manifest(versions)
        except (DiskFullError, EngineError, PromptError) as error:
            raise type(error)(f"{error}. {safe(self.directory)}") from None
        finally:
            bar.close()
        self.report(f"{bar.tokens:,} tokens in {bar.seconds:,.0f} s ({bar.speed})")
        return manifest

    def _settle_context(self, context: int) -> None:
        if self.begun is not None and self.begun.context != context:
            raise OtherSettingsError(
                f"{self.directory} was begun with a context of {self.begun.context} tokens, the "
                f"engine now has {context}",
                "set --max-model-len or the server accordingly, or choose another --out",
            )
        self.settings = self.settings.model_copy(update={"context": context})

    def _dialogue(self, prompt: Prompt) -> Dialogue:
        return Dialogue(prompt, self.encoder, self.settings.sampling, self.settings.context)

    def _write(self, number: int, dialogues: Sequence[Dialogue]) -> ShardRecord:
        rows = [row for dialogue in dialogues if (row := dialogue.row()) is not None]
        refused = [d for d in dialogues if (d.skipped or d.cut) and d.reason]
        if not rows and refused and refused[0].skipped != TEMPLATE:
            raise EngineError(
                f"not one of the {len(dialogues)} prompts of a shard got an answer: "
                f"{refused[0].reason}"
            )
        if refused:
            self.report(f"warning: prompt {refused[0].prompt.id}: {refused[0].reason}")
        skipped = Counter(d.skipped for d in dialogues if d.skipped)
        cut = Counter(d.cut for d in dialogues if d.cut)
        return self.writer.write(number, rows, skipped, cut)

    def _write_manifest(self, versions: dict[str, str]) -> Manifest:
        manifest = Manifest.of(self.settings, self.finished.values(), versions)
        manifest.write(self.directory)
        return manifest


def _usual_shard_size(options: DistillSettings, begun: Settings | None) -> int:
    """What the run was begun with; else as many prompts as take a minute or two."""
    if begun is not None:
        return begun.shard_size
    on_cpu = options.offline and not torch.cuda.is_available()
    return _CPU_SHARD if on_cpu else _SHARD


def safe(directory: Path) -> str:
    """What is whole in the directory of a run that ended early, and how to go on."""
    try:
        manifest = read_manifest(directory, allow_incomplete=True)
    except DistilledDataError:
        return "Nothing was begun; give the same command again."
    size = sum((directory / shard.file).stat().st_size for shard in manifest.shards)
    count, total = len(manifest.shards), manifest.num_shards
    needed = f", about {size / count * (total - count) / 1e6:.0f} MB to go" if count else ""
    return (
        f"{count} of {total} shards are finished and safe in {directory}{needed}; give the same "
        "command again, and it continues"
    )


def differences(begun: Settings, now: Settings) -> list[str]:
    """In words, which settings differ; names and paths of equal content do not count."""
    old, new = _comparable(begun), _comparable(now)
    lines = []
    for name, option in _OPTIONS.items():
        if old[name] != new[name]:
            short = isinstance(old[name], (int, float, str, dict, type(None)))
            lines.append(
                f"{option} {_shown(old[name])}, now {_shown(new[name])}" if short else option
            )
    return lines


def _comparable(settings: Settings) -> dict[str, Any]:
    values = settings.model_dump()
    flat = {f"sampling.{name}": value for name, value in values.pop("sampling").items()}
    flat["target.fingerprint"] = values.pop("target")["fingerprint"]
    flat["prompts"] = tuple(file["sha256"] for file in values.pop("prompts"))
    return flat | values


def _shown(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)


def in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"


def _begun(directory: Path) -> Settings | None:
    """The settings a directory was begun with; None for a fresh one."""
    if (directory / MANIFEST_FILE).is_file():
        return read_manifest(directory, allow_incomplete=True).settings
    return settings_of_shards(directory)


def _scanned(options: DistillSettings, report: Callable[[str], None]) -> PromptSet:
    prompts = scan(options.prompts, options.max_bad_lines)
    if prompts.bad:
        report(f"warning: {len(prompts.bad)} malformed records left out:\n{shortened(prompts.bad)}")
    return prompts


def _versions(engine: dict[str, str]) -> dict[str, str]:
    packages = ("vllm-specformer", "transformers", "tokenizers", "pyarrow")
    found = {"python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in packages} | engine
