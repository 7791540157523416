"""Requests with images for tiny targets that read them: processor, prompts, and the reference.

vLLM and Transformers want torchvision for these models; see `make test-families`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen2VLImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
from vllm import RequestOutput

from support.dense import DenseReference
from support.family_targets import IMAGE, VIDEO, VISION, VISION_END, VISION_START
from support.outputs import Tokens

_NAMES = {
    IMAGE: "<|image_pad|>",
    VIDEO: "<|video_pad|>",
    VISION_START: "<|vision_start|>",
    VISION_END: "<|vision_end|>",
}
_CELL = VISION["patch_size"] * VISION["spatial_merge_size"]  # pixels of one token's side
SIZES = ((2, 2), (3, 5), (6, 4))  # of images, in tokens


def write_processor(directory: Path) -> Any:
    """Give a target what vLLM turns images and texts into tokens with; returns it."""
    config = AutoConfig.from_pretrained(directory)
    size = config.get_text_config().vocab_size
    words = {_NAMES.get(i, f"t{i}"): i for i in range(size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")),
        additional_special_tokens=list(_NAMES.values()),
    )
    cut = {"patch_size": VISION["patch_size"], "merge_size": VISION["spatial_merge_size"]}
    pixels = {"shortest_edge": _CELL**2, "longest_edge": 64 * _CELL**2}
    video = getattr(transformers, VIDEO_PROCESSOR_MAPPING_NAMES[config.model_type]["torchvision"])
    processor = getattr(transformers, PROCESSOR_MAPPING_NAMES[config.model_type])(
        image_processor=Qwen2VLImageProcessor(size=pixels, **cut),
        tokenizer=tokenizer,
        video_processor=video(size=pixels, **cut),
    )
    processor.save_pretrained(directory)
    return processor


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Random colours, of a size in tokens (height, width)."""
    height, width = size
    shape = height * _CELL, width * _CELL, 3
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8))


@dataclass(frozen=True)
class Seen:
    """A vLLM prompt, and the images in it."""

    prompt: Any
    images: tuple[Image.Image, ...]


def mixed_requests(count: int = 9) -> list[Seen]:
    """Random texts with no image, one, or two of different sizes, beside each other."""
    random, made = Random(3), []

    def text(length: int) -> list[int]:
        return [random.randrange(300) for _ in range(length)]

    for index in range(count):
        number = (1, 0, 2, 1, 0, 1)[index % 6]
        images = [picture(SIZES[(index + i) % len(SIZES)], 10 * index + i) for i in range(number)]
        tokens = text(4 + index) + [VISION_START, IMAGE, VISION_END] * number + text(6)
        data = {"multi_modal_data": {"image": images}} if images else {}
        made.append(Seen({"prompt_token_ids": tokens} | data, tuple(images)))
    return made


class SeeingReference(DenseReference):
    """Target and head in plain PyTorch on texts that begin with prompts that may have images."""

    def __init__(self, head: Path, target: Path, processor: Any) -> None:
        super().__init__(head, target)
        self._processor = processor
        self._images: dict[Tokens, tuple[Image.Image, ...]] = {}

    def show(self, outputs: Sequence[RequestOutput], requests: Sequence[Seen]) -> None:
        """From now on texts that begin with these prompts show the requests' images.

        In outputs the place of an image is spread over as many tokens as it takes.
        """
        for output, request in zip(outputs, requests, strict=True):
            if request.images:
                self._images[tuple(output.prompt_token_ids or ())] = request.images

    def states(self, ids: Tensor) -> list[Tensor]:
        text = tuple(ids[0].tolist())
        images = next((i for p, i in self._images.items() if text[: len(p)] == p), None)
        if images is None:
            return super().states(ids)
        pixels = self._processor.image_processor(list(images), return_tensors="pt")
        self.target.target(
            input_ids=ids,
            mm_token_type_ids=(ids == IMAGE).int(),
            use_cache=False,
            **pixels,
        )
        return [self.target._states.pop(i) for i in self.target.hook_ids]
