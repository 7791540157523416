"""The target's answers by Transformers, where no engine is at hand."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from vllm_specformer.distill.dialogue import Request
from vllm_specformer.training.texts import Text

_BATCH = 64


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    requests: Mapping[int, Request],
    end_ids: frozenset[int],
    seed: int,
) -> list[Text]:
    """Continue every prompt; all requests have one temperature.

    Nothing but the temperature is applied, whatever the model's own generation_config says. Prompts
    of similar length share a batch, padded on the left.
    """
    torch.manual_seed(seed)
    ordered = sorted(requests, key=lambda number: len(requests[number].prompt_ids))
    temperature = requests[ordered[0]].temperature
    texts = []
    bar = tqdm(total=len(ordered), desc=f"answers at temperature {temperature:g}", unit="prompt")
    with bar:
        for first in range(0, len(ordered), _BATCH):
            numbers = ordered[first : first + _BATCH]
            batch = [requests[number] for number in numbers]
            for number, ids, made in zip(
                numbers, batch, _complete(model, batch, end_ids), strict=True
            ):
                start = len(ids.prompt_ids)
                tokens = np.array([*ids.prompt_ids, *made], dtype=np.int32)
                texts.append(Text(number, tokens, ((start, len(tokens)),), temperature))
            bar.update(len(batch))
    return texts


def _complete(
    model: PreTrainedModel, batch: Sequence[Request], end_ids: frozenset[int]
) -> list[list[int]]:
    width = max(len(request.prompt_ids) for request in batch)
    padding = min(end_ids, default=0)  # masked, so any token will do
    ids = torch.full((len(batch), width), padding)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[row, width - len(request.prompt_ids) :] = 1
    temperature = batch[0].temperature
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    model.generation_config = GenerationConfig(
        max_new_tokens=max(request.max_tokens for request in batch),
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=padding,
        **(drawn if temperature else {"do_sample": False}),
    )
    device = model.device
    out = model.generate(ids.to(device), attention_mask=mask.to(device))[:, width:].tolist()
    answers = []
    for request, row in zip(batch, out, strict=True):
        answers.append(cut(row, request.max_tokens, end_ids))
    return answers


def cut(tokens: list[int], max_tokens: int, end_ids: Container[int]) -> list[int]:
    """An answer up to its end token, or to its longest length."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in end_ids), len(tokens))
    return tokens[: min(end, max_tokens)]
