"""What a directory of distilled answers says about itself: `manifest.json`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_specformer.data.files import write_atomic
from vllm_specformer.errors import SpecFormerError

MANIFEST_FILE = "manifest.json"


class DistilledDataError(SpecFormerError):
    """A directory of distilled answers is missing something, damaged or another target's."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetRecord(_Record):
    """The model whose answers these are."""

    name_or_path: str = Field(
        description="An absolute path, which may have moved since, or a name of the hub."
    )
    revision: str | None = Field(description="Commit of the model hub, null for a directory.")
    architecture: str = Field(description="First entry of `architectures` in its config.json.")
    vocab_size: int = Field(gt=0, description="Every token id lies below.")
    fingerprint: str = Field(description="See target/files.py; equal for equal weights.")


class Sampling(_Record):
    """How answers were drawn. Equal values and prompts give equal requests."""

    temperature: float = Field(ge=0, description="0: greedy.")
    sampled_share: float = Field(ge=0, le=1, description="Share drawn at the other temperature.")
    sampled_temperature: float = Field(ge=0, description="Temperature of that share.")
    top_p: float = Field(gt=0, le=1, description="Of answers that are not greedy.")
    max_tokens: int = Field(gt=0, description="Longest answer.")
    seed: int = Field(description="Seeds of all requests derive from it.")


class PromptFile(_Record):
    """One input file, in the order of the command line."""

    file: str
    sha256: str
    records: int = Field(description="Lines, list entries or rows, bad ones included.")
    bad: int = Field(description="Records that were left out because they are malformed.")


class Settings(_Record):
    """All that decides which rows a directory will hold; a resumed run must repeat it."""

    format_version: Literal[1] = 1
    target: TargetRecord
    sampling: Sampling
    chat_template_sha256: str | None = Field(description="Null: plain text, no template in use.")
    chat_template_args: dict[str, Any] = Field(description="Variables given to the template.")
    prompts: list[PromptFile]
    max_prompts: int | None = Field(description="Draw so many of the prompts; null: all.")
    prompt_count: int = Field(description="Prompts in use.")
    shard_size: int = Field(gt=0, description="Prompts per shard.")
    engine: Literal["offline", "server"]
    dtype: str = Field(description="vLLM's dtype; 'server' where a server decided.")
    max_model_len: int | None = Field(
        default=None, description="As it was given; null: the engine's own."
    )
    context: int = Field(gt=0, description="Most tokens of a conversation.")

    @property
    def num_shards(self) -> int:
        return -(-self.prompt_count // self.shard_size)


class ShardRecord(_Record):
    """One Parquet file."""

    file: str
    sha256: str
    rows: int = Field(description="Conversations.")
    tokens: int
    answers: int = Field(description="Answers of the target; several turns have several.")
    answer_tokens: int
    sampled: int = Field(description="Conversations drawn at a temperature above 0.")
    skipped: dict[str, int] = Field(description="Reason -> prompts without a row.")
    cut: dict[str, int] = Field(description="Reason -> conversations without their later turns.")


class Counts(_Record):
    """Sums over the shards."""

    conversations: int = 0
    tokens: int = 0
    answers: int = 0
    answer_tokens: int = 0
    sampled: int = 0
    skipped: dict[str, int] = {}
    cut: dict[str, int] = {}

    @classmethod
    def of(cls, shards: Iterable[ShardRecord]) -> Counts:
        sums: Counter[str] = Counter()
        skipped: Counter[str] = Counter()
        cut: Counter[str] = Counter()
        for shard in shards:
            sums.update(
                conversations=shard.rows,
                tokens=shard.tokens,
                answers=shard.answers,
                answer_tokens=shard.answer_tokens,
                sampled=shard.sampled,
            )
            skipped.update(shard.skipped)
            cut.update(shard.cut)
        return cls(**sums, skipped=dict(sorted(skipped.items())), cut=dict(sorted(cut.items())))


class Manifest(Settings):
    """`manifest.json`: the settings, and what is there so far."""

    complete: bool
    counts: Counts
    versions: dict[str, str]
    shards: list[ShardRecord]

    @classmethod
    def of(
        cls, settings: Settings, shards: Iterable[ShardRecord], versions: dict[str, str]
    ) -> Manifest:
        records = sorted(shards, key=lambda shard: shard.file)
        fields = {name: getattr(settings, name) for name in Settings.model_fields}
        return cls(
            **fields,
            complete=len(records) == settings.num_shards,
            counts=Counts.of(records),
            versions=versions,
            shards=records,
        )

    @property
    def settings(self) -> Settings:
        return Settings(**{name: getattr(self, name) for name in Settings.model_fields})

    def write(self, directory: Path) -> None:
        """Replace `directory/manifest.json`."""
        text = json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n"
        write_atomic(directory / MANIFEST_FILE, text.encode())


def read_manifest(
    directory: Path, fingerprint: str | None = None, allow_incomplete: bool = False
) -> Manifest:
    """Read `directory/manifest.json`.

    Args:
        fingerprint: of the target one is going to train for; None takes any target's answers.
        allow_incomplete: take what an unfinished run has written so far.

    Raises:
        DistilledDataError: no manifest, an unusable one, another target's, or an unfinished run.
    """
    path = directory / MANIFEST_FILE
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DistilledDataError(
            f"{path}: no such file", "name a directory that `specformer distill --out` has written"
        ) from None
    except ValidationError as error:
        raise DistilledDataError(
            f"{path}: {_first(error)}", "distill into a new directory"
        ) from None
    found = manifest.target
    if fingerprint is not None and found.fingerprint != fingerprint:
        raise DistilledDataError(
            f"{path}: these are answers of {found.name_or_path} (fingerprint "
            f"{found.fingerprint[:12]}), not of the target given (fingerprint "
            f"{fingerprint[:12]})",
            "a head learns from its own target's answers only, distill again",
        )
    if not manifest.complete and not allow_incomplete:
        raise DistilledDataError(
            f"{path}: only {len(manifest.shards)} of {manifest.num_shards} shards are there",
            "give the `specformer distill` command that began it again, and it continues; `train "
            "--partial-data` takes what is there",
        )
    return manifest


def _first(error: ValidationError) -> str:
    """The first complaint in words, with the field it is about."""
    item = error.errors()[0]
    field = ".".join(str(part) for part in item["loc"])
    return f"field {field!r}: {item['msg']}" if field else item["msg"]
