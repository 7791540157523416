"""The bundled pair, and short answers of its target."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from support.paths import HEAD, PROMPTS, TARGET
from vllm_specformer.distill.encode import load_encoder
from vllm_specformer.evaluation.answers import answer
from vllm_specformer.evaluation.questions import Questions
from vllm_specformer.target.files import end_token_ids
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import load_target
from vllm_specformer.training.packed_head import PackedHead
from vllm_specformer.training.texts import Text, Texts

MAX_TOKENS = 32


@dataclass
class Pair:
    """Target and head in fp32, and answers at the temperatures 0 and 1."""

    target: HookedTarget
    head: PackedHead
    answers: dict[float, list[Text]]

    def texts(self, temperature: float) -> Texts:
        return Texts.collect(self.answers[temperature], 512)


def load_pair() -> Pair:
    model = load_target(TARGET, torch.float32, torch.device("cpu"))
    head = PackedHead.from_pretrained(HEAD, dtype=torch.float32).eval()
    encoder = load_encoder(TARGET, chats=False)
    lines = PROMPTS.read_text().splitlines()[:32]
    prompts = {
        number: encoder.text(json.loads(line)["prompt"]) for number, line in enumerate(lines)
    }
    asked = Questions(prompts, context=512, max_tokens=MAX_TOKENS, seed=0)
    answers = {
        temperature: answer(model, asked.requests(temperature), end_token_ids(TARGET), seed=0)
        for temperature in (0.0, 1.0)
    }
    target = HookedTarget(model, head.config.aux_hidden_state_layer_ids)
    return Pair(target, head, answers)
