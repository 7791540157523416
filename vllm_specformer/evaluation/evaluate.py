"""One evaluation from settings to metrics: `specformer eval` without the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_specformer.calibration import Calibrations
from vllm_specformer.candidates import Ranking
from vllm_specformer.config import SpecFormerConfig, read_head_config
from vllm_specformer.data.manifest import TargetRecord
from vllm_specformer.distill.encode import Encoder, load_encoder
from vllm_specformer.environment import versions
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.evaluation import questions as asking
from vllm_specformer.evaluation.agreement import compare
from vllm_specformer.evaluation.answers import answer
from vllm_specformer.evaluation.calibrate import calibrate_kinds, fit, observe
from vllm_specformer.evaluation.causes import explain, hypotheses
from vllm_specformer.evaluation.likeliest import kept_of_likeliest
from vllm_specformer.evaluation.metrics import (
    Metrics,
    group_name,
    of_agreement,
    of_kinds,
    of_texts,
)
from vllm_specformer.evaluation.provenance import read_provenance
from vllm_specformer.evaluation.questions import Questions
from vllm_specformer.evaluation.replay import DraftedText, draft_texts
from vllm_specformer.evaluation.served import Served, serve
from vllm_specformer.evaluation.settings import EvalSettings
from vllm_specformer.evaluation.trees import TreeReplay, fit_ranking
from vllm_specformer.head_files import find_head, write_fields
from vllm_specformer.pairing import check_pair, check_weights
from vllm_specformer.places import lasting, named_target
from vllm_specformer.target.files import end_token_ids, find_target, target_record
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import can_pack, check_parts, load_target, read_target_config
from vllm_specformer.training.packed_head import DEFAULT_MEMORY, PackedHead
from vllm_specformer.training.texts import Text, Texts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Bytes for logits and slot activations: few launches on a GPU, small caches on a CPU.
_MEMORY = {"cuda": 2 << 30, "cpu": DEFAULT_MEMORY}


def evaluate(options: EvalSettings, say: Callable[[str], None] = print) -> Metrics:
    """All metrics of a head; `say` gets lines for the user.

    Raises:
        SpecFormerError: anything the user can put right, before weights are loaded where possible.
    """
    return _Evaluation(options, say).run()


@dataclass(frozen=True)
class _Loaded:
    """Target and head on the device."""

    target: HookedTarget
    head: PackedHead
    packed: bool

    @property
    def memory(self) -> int:
        return _MEMORY[self.target.target.device.type]

    def draft(
        self, what: str, texts: Texts, budgets: Sequence[int], trees: TreeReplay | None = None
    ) -> list[DraftedText]:
        """Of every text; `what` stands beside the bar."""
        made = draft_texts(
            self.head, self.target, texts, budgets, self.packed, self.memory, trees=trees
        )
        return list(tqdm(made, desc=what, total=len(texts), unit="text"))


class _Evaluation:
    """Everything is checked in the constructor, before anything large is loaded."""

    def __init__(self, options: EvalSettings, say: Callable[[str], None]) -> None:
        self.options, self.say = options, say
        self.head = find_head(options.head)
        flags = {"--fit-tree-ranking": options.fit_tree_ranking, "--calibrate": options.calibrate}
        writing = next((flag for flag, is_given in flags.items() if is_given), None)
        if writing and self.head.resolve() != Path(options.head).resolve():
            raise SpecFormerError(
                f"{writing}: {options.head} is a head of the hub, whose files are shared",
                "copy it to a directory and name that",
            )
        self.config: SpecFormerConfig = read_head_config(self.head)
        check_weights(self.head, self.config)
        self.name = options.target or named_target(self.head, self.config, options.revision)
        self.place, commit = find_target(self.name, options.revision)
        self.target_config = read_target_config(self.place)
        check_pair(self.config, self.target_config, self.name)
        self.record: TargetRecord = target_record(self.name, self.place, commit)
        slots = self.config.num_draft_slots
        wanted = options.num_speculative_tokens
        self.budgets = _budgets(wanted or range(1, slots + 1), slots)
        self.served_budgets = self.budgets if wanted else _budgets({min(4, slots), slots}, slots)
        self.device = _device(options.device)
        self.dtype = _dtype(options.dtype, self.device, self.target_config)
        text = self.target_config.get_text_config()
        self.context: int = min(text.max_position_embeddings, self.config.max_position_embeddings)
        if options.serve:  # which goes a step past the end of an answer
            self.context -= slots + 1
        self.end_ids = end_token_ids(self.place)
        self.distilled: Texts | None = None
        self.questions = self._questions()

    def run(self) -> Metrics:
        served = self._serve() if self.options.serve else []
        loaded = self._load()
        if served:
            # Answers of the largest K stand for all: greedy ones are the same at every K.
            by_temperature = {item.temperature: item.texts for item in served}
        elif self.distilled is not None:
            by_temperature = self._distilled_by_temperature()
        else:
            by_temperature = self._answers(loaded)
        collected = {t: self._collect(texts) for t, texts in sorted(by_temperature.items())}
        ranking = self._ranking(loaded, list(collected.values()))
        calibration = self._calibration(loaded, list(collected.values()))
        trees = None
        if self.options.tree_nodes:
            nodes = tuple(sorted(set(self.options.tree_nodes)))
            trees = TreeReplay(nodes, self.options.seed, ranking)
        drafted = {
            temperature: loaded.draft(
                f"drafts at temperature {temperature:g}", texts, self.budgets, trees
            )
            for temperature, texts in collected.items()
        }
        slots = self.config.num_draft_slots
        offline = {
            group_name(temperature): of_texts(texts, self.budgets, self.end_ids, slots)
            | of_kinds(texts, self.questions.kinds, self.budgets, self.end_ids, slots)
            | self._likeliest(loaded, collected[temperature])
            for temperature, texts in drafted.items()
        }
        compared = []
        for item in served:
            known = item.texts is by_temperature[item.temperature]
            compared.append(
                self._compared(loaded, item, drafted[item.temperature] if known else None)
            )
        return {
            "head": lasting(self.options.head),
            "target": self.record.model_dump(),
            "dtype": self.dtype,
            "device": self.device,
            "max_tokens": self.options.max_tokens,
            "seed": self.options.seed,
            "tree_ranking": list(ranking.greedy),
            "tree_ranking_sampled": list(ranking.sampled),
            "calibration": calibration,
            "versions": versions(),
            "offline": offline,
            "engine": compared,
        }

    def _questions(self) -> Questions:
        options = self.options
        if options.data is None:
            return asking.from_files(
                list(options.prompts),
                self._encoder,
                context=self.context,
                max_tokens=options.max_tokens,
                max_prompts=options.max_prompts,
                max_bad_lines=options.max_bad_lines,
                seed=options.seed,
                say=self.say,
            )
        self.distilled = asking.unseen(
            options.data,
            self.record.fingerprint,
            read_provenance(self.head),
            context=self.context,
            max_prompts=options.max_prompts,
            say=self.say,
        )
        return asking.asked_again(
            self.distilled, context=self.context, max_tokens=options.max_tokens, seed=options.seed
        )

    def _encoder(self, chats: bool) -> Encoder:
        options = self.options
        encoder = load_encoder(self.place, options.chat_template, options.chat_template_args, chats)
        self.end_ids = encoder.end_ids
        return encoder

    @property
    def temperatures(self) -> list[float]:
        return sorted(set(self.options.temperature or [0.0]))

    def _serve(self) -> list[Served]:
        jobs = [self.questions.requests(temperature) for temperature in self.temperatures]
        longest = max(len(ids) for ids in self.questions.prompts.values())
        served = []
        for count in self.served_budgets:
            self.say(f"starting vLLM with {count} drafted tokens per step")
            served += serve(
                self.head,
                self.place,
                count,
                jobs,
                dtype=self.dtype,
                end_ids=self.end_ids,
                max_model_len=min(longest + self.options.max_tokens, self.context) + count + 1,
                engine_args=self.options.engine_args,
            )
        return served

    def _load(self) -> _Loaded:
        dtype, device = _DTYPES[self.dtype], torch.device(self.device)
        model = load_target(self.place, dtype, device)
        target = HookedTarget(model, self.config.aux_hidden_state_layer_ids)
        check_parts(target, self.name)
        head = PackedHead.from_pretrained(self.head, dtype=dtype).to(device).eval()
        return _Loaded(target, head, can_pack(target))

    def _distilled_by_temperature(self) -> dict[float, list[Text]]:
        """The distilled answers themselves, of the temperatures that were asked for."""
        assert self.distilled is not None
        found: dict[float, list[Text]] = {}
        for text in self.distilled.each():
            found.setdefault(round(text.temperature, 4), []).append(text)
        wanted = self.options.temperature
        if wanted is None:
            return found
        missing = sorted(set(wanted) - found.keys())
        if missing:
            raise SpecFormerError(
                f"--temperature {missing[0]:g}: the held-out answers of --data have "
                f"{', '.join(f'{t:g}' for t in sorted(found))} only",
                "leave it out, or add --serve to have the prompts answered anew",
            )
        return {temperature: found[temperature] for temperature in wanted}

    def _answers(self, loaded: _Loaded) -> dict[float, list[Text]]:
        """The target's answers by Transformers."""
        model, seed = loaded.target.target, self.options.seed
        return {
            temperature: answer(model, self.questions.requests(temperature), self.end_ids, seed)
            for temperature in self.temperatures
        }

    def _ranking(self, loaded: _Loaded, texts: Sequence[Texts]) -> Ranking:
        """The head's temperatures of a tree's nodes, found anew if that was asked for."""
        if not self.options.fit_tree_ranking:
            return Ranking.of(self.config)
        found = fit_ranking(
            loaded.head, loaded.target, texts, loaded.packed, self.options.seed, loaded.memory
        )
        fields = {"tree_ranking": found.greedy, "tree_ranking_sampled": found.sampled}
        write_fields(self.head, fields)
        self.say(
            f"tree_ranking {list(found.greedy)}, for sampled requests {list(found.sampled)}, "
            f"written to {self.head / 'config.json'}"
        )
        return found

    def _calibration(self, loaded: _Loaded, texts: Sequence[Texts]) -> dict[str, Any]:
        """How probably drafts are accepted, fitted anew if that was asked for; else nothing."""
        if not self.options.calibrate:
            return {}
        head, target = loaded.head, loaded.target
        fields, report = calibrate_kinds(texts, head, target, loaded.packed, loaded.memory)
        write_fields(self.head, fields)
        self.say(f"{' and '.join(fields)} written to {self.head / 'config.json'}")
        return report

    def _likeliest(self, loaded: _Loaded, texts: Texts) -> dict[str, Any]:
        """What is kept of accepted drafts if only the likeliest are verified, where asked for.

        Ranked by the head's calibration, or by the one that vLLM's estimator would come to.
        """
        if not self.options.likeliest:
            return {}
        config, kept = read_head_config(self.head), {}
        is_sampled = bool(float(texts.temperatures[0]))
        curves = Calibrations.of(config)
        known = (config.acceptance_calibration, config.acceptance_calibration_sampled)[is_sampled]
        for count in self.budgets:
            seen = observe(loaded.head, loaded.target, texts, loaded.packed, count, loaded.memory)
            curve = curves[is_sampled] if known else fit(seen, count)
            kept[f"K={count}"] = kept_of_likeliest(seen, curve, count)
        return {"kept_of_likeliest": kept}

    def _collect(self, texts: Sequence[Text]) -> Texts:
        if not any(end - start > 1 for text in texts for start, end in text.spans):
            raise SpecFormerError(
                f"the target ends each of its {len(texts)} answers after one token, which leaves "
                "nothing to draft",
                "give prompts of the form that the target was trained on",
            )
        return Texts.collect(texts, self.context)

    def _compared(
        self, loaded: _Loaded, served: Served, drafted: list[DraftedText] | None
    ) -> Metrics:
        """One engine run against the replay of its answers, which may have drafts already."""
        texts = self._collect(served.texts)
        if drafted is None:
            what = f"drafts of the engine's K={served.num_tokens}, "
            what += f"temperature {served.temperature:g}"
            drafted = loaded.draft(what, texts, [served.num_tokens])
        agreement = compare(served, {text.id: text for text in drafted})
        causes: list[str] = []
        if not agreement.is_clean(self.dtype):
            self.say("steps of the engine differ from the replay's; looking for the cause")
            tried = hypotheses(loaded.head, loaded.target, texts, served, loaded.packed)
            causes = explain(agreement, served, tried, self.dtype)
        return of_agreement(agreement, served, causes)


def _budgets(wanted: Any, slots: int) -> tuple[int, ...]:
    for count in wanted:
        if not 1 <= count <= slots:
            raise SpecFormerError(
                f"--num-speculative-tokens {count}: this head drafts 1 to {slots} tokens"
            )
    return tuple(sorted(set(wanted)))


def _device(name: str) -> str:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise SpecFormerError(
            "--device cuda: PyTorch sees no GPU", "check the driver and its build"
        )
    return ("cuda" if available else "cpu") if name == "auto" else name


def _dtype(name: str, device: str, target: Any) -> str:
    """The target's own on a GPU, where a server would take it; float32 on a CPU."""
    if name != "auto":
        return name
    own = str(target.dtype or target.get_text_config().dtype).removeprefix("torch.")
    return own if device == "cuda" and own in _DTYPES else "float32"
