"""Make a Hugging Face directory of a GGUF file, which vLLM and `specformer` take as a target.

    pip install gguf==0.19.0
    python examples/gguf/from_gguf.py model.gguf my-target

Transformers reads the file and undoes its quantisation; what is written are ordinary bfloat16
weights with tokenizer and chat template. GGUF keeps numbers such as the norm's epsilon in float32
(1e-5 becomes 9.999999747378752e-06): they are written as they were meant.

A converted model is the quantised one, not the original: a head trained for one is not for the
other. Answers for its training must come from the very directory that is served.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# Of the file that was read, not of the model: left out of config.json.
READING = ("quantization_config", "_name_or_path", "pretraining_tp", "dtype", "unk_token_id")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path, help="the model's file")
    parser.add_argument("out", type=Path, help="directory to write")
    options = parser.parse_args()
    convert(options.gguf, options.out)
    print(f"next: specformer distill --target {options.out} --prompts ... (docs/training.md)")


def convert(gguf: Path, out: Path) -> None:
    """Read `gguf` and write it to the directory `out`.

    Raises:
        ImportError: the package gguf is missing; Transformers' message names it.
    """
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    write(model, AutoTokenizer.from_pretrained(**source), out)


def write(model: Any, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write what was read from a GGUF file as bfloat16 weights and a tokenizer without its traces.

    Args:
        model: a causal language model in float32.
        tokenizer: its own, with the chat template.
        out: directory, created if need be.
    """
    kind = type(model)
    plain = kind(type(model.config)(**plain_config(model.config.to_dict())))
    plain.load_state_dict(model.state_dict(), strict=True)
    generation: GenerationConfig = model.generation_config
    plain.generation_config = generation
    plain.to(torch.bfloat16).save_pretrained(out)
    # A decoded text has to be the tokens' own, space for space.
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = plain.config.max_position_embeddings
    tokenizer.save_pretrained(out)


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what only the GGUF file is about, and with round numbers."""
    return {
        name: rounded(value)
        for name, value in config.items()
        if name not in (*READING, "transformers_version")
    }


def rounded(value: Any) -> Any:
    """A number that went through float32, as it was written before; anything else as it is."""
    if not isinstance(value, float) or value != float(np.float32(value)):
        return value
    return float(str(np.float32(value)))


def stamp(out: Path, version: str) -> None:
    """Name the Transformers version whose configuration this is, whichever one has written it.

    A target's fingerprint covers config.json, so a new version alone would make another target.
    """
    path = out / "config.json"
    config = json.loads(path.read_text()) | {"transformers_version": version}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
