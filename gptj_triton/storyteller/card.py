"""The model card that `train_storyteller.py` writes beside the weights.

Every figure in the card is handed in or measured here; this file knows nothing of how the model is trained.
"""

from __future__ import annotations

import os
import platform
import textwrap
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from transformers import GPTJForCausalLM, PreTrainedTokenizerFast

from gptj_triton.storyteller.curve import Curve

GUTENBERG = (
    "11, 16, 55, 113, 236, 289, 503, 540, 640, 641, 1597, 2435, 2591, 2781, 3027, 3282, 3454, 5615, 6746, 7277, 7439, "
    "7885, 27826"
)
TEMPERATURE, TOP_P, REPETITION_PENALTY = 0.8, 0.95, 1.1
PROMPTS = (
    "Once upon a time",
    "There was once a poor woodcutter who",
    "In a castle by the sea there lived",
    "The old witch looked at the girl and said",
    "'Who are you?' asked the fox.",
    "The youngest brother set out into the wide world",
    "One cold winter's night",
    "The Princess opened the little door and",
    "Deep in the forest stood a tree",
    "When the King heard this",
)


@dataclass(frozen=True)
class Figures:
    """What the card reports; losses in nats a token of the saved fp16 weights, without dropout."""

    settings: Any
    curve: Curve
    hardware: str
    text_bytes: int
    held_out_bytes: int
    training_tokens: int
    held_out_tokens: int
    training_loss: float
    held_out_loss: float

    @property
    def bits_a_byte(self) -> float:
        return self.held_out_loss / log(2) * self.held_out_tokens / self.held_out_bytes


def hardware_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def samples(model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerFast, new_tokens: int) -> list[str]:
    """Each prompt with its continuation; sample i is drawn on the CPU in fp32 with seed i."""
    texts = []
    for seed, prompt in enumerate(PROMPTS):
        torch.manual_seed(seed)
        ids = tokenizer(prompt, return_tensors="pt")
        drawn = model.generate(
            **ids,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            repetition_penalty=REPETITION_PENALTY,
            max_new_tokens=new_tokens,
        )
        texts.append(tokenizer.decode(drawn[0], skip_special_tokens=True))
    return texts


def quoted(prompt: str, text: str) -> list[str]:
    """Lines of Markdown: the prompt in bold, then its continuation, an empty line between paragraphs."""
    return f"**{prompt}**{text[len(prompt) :]}".replace("\n", "\n\n").split("\n")


def write_card(out: Path, model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerFast, figures: Figures) -> None:
    """Write README.md, Hugging Face's model card, with ten samples of `model` (fp32, CPU, eval mode)."""
    settings, curve, config = figures.settings, figures.curve, model.config
    new_tokens = min(120, config.n_positions // 2)
    parameters = sum(weight.numel() for weight in model.parameters())
    megabytes = (out / "model.safetensors").stat().st_size / 1e6
    data = textwrap.fill(
        f"Fairy tales of Project Gutenberg, numbers {GUTENBERG}; boilerplate removed, one paragraph a line: "
        f"{figures.text_bytes / 1e6:.2f} MB, {figures.training_tokens + figures.held_out_tokens:,} tokens. A tenth is "
        "held out: of every ten consecutive blocks of about 8,000 characters, one drawn by the seed, so a tenth of "
        "each book. The tokenizer was trained on the other nine tenths alone. Some tales occur twice, in different "
        "translations, so a held-out block may have a cousin in the training text.",
        width=120,
    )
    passes = [step / curve.steps_an_epoch for step in curve.steps]
    training = textwrap.fill(
        f"`tools/train_storyteller.py` on {figures.hardware}: {curve.steps[-1]:,} steps of {settings.batch_size} "
        f"windows of {settings.context} tokens in {curve.seconds / 60:.1f} minutes, that is {passes[-1]:.1f} "
        f"passes over the training text. Kept: the weights after {passes[curve.best]:.1f} passes, where the held-out "
        f"loss was lowest. Optimiser of the blocks' matrices: {settings.optimizer}, of all else: adamw; peak rate "
        f"{settings.learning_rate:g}, linear decay to zero, weight decay {settings.weight_decay:g}, dropout "
        f"{settings.dropout:g}, weights averaged with decay {settings.ema_decay:g}, seed {settings.seed}.",
        width=120,
    )
    shape = f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, rotary {config.rotary_dim}"
    vocabulary = f"{config.vocab_size} entries, no prefix space; `<|endoftext|>` ({config.eos_token_id}) ends a tale"
    told = "\n\n".join(
        f"Seed {seed}:\n\n" + "\n".join(f"> {line}".rstrip() for line in quoted(prompt, text))
        for seed, (prompt, text) in enumerate(zip(PROMPTS, samples(model, tokenizer, new_tokens), strict=True))
    )
    (out / "README.md").write_text(
        f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# storyteller

A GPT-J of {parameters / 1e6:.1f} million parameters that tells fairy tales, small enough to live in a repository and
to answer at once on a CPU. It writes the style well and keeps no plot: use it to try things out, not to know things.

| | |
| --- | --- |
| architecture | `GPTJForCausalLM`: {shape} |
| context | {config.n_positions} tokens |
| tokenizer | byte-level BPE, {vocabulary} |
| weights | `model.safetensors`, fp16, {megabytes:.1f} MB |
| licence | weights: Apache-2.0; training text: public domain |

## Data

{data}

## Losses

Of the saved fp16 weights, without dropout, windows of {config.n_positions} tokens:

| | tokens | loss (nats per token) | perplexity |
| --- | --- | --- | --- |
| training | {figures.training_tokens:,} | {figures.training_loss:.4f} | {exp(figures.training_loss):.1f} |
| held out | {figures.held_out_tokens:,} | {figures.held_out_loss:.4f} | {exp(figures.held_out_loss):.1f} |

The held-out loss is {figures.bits_a_byte:.3f} bits per byte of text. It also chose
the settings and the moment to stop, so it flatters a little.

![loss curve](loss.png)

## Training

{training}

## Ten samples

Unselected: one for each of the seeds 0 to 9, drawn with temperature {TEMPERATURE}, top-p {TOP_P} and repetition
penalty {REPETITION_PENALTY} (without one it is prone to loops), {new_tokens} new tokens, in fp32 on a CPU with
torch {torch.__version__.split("+")[0]}. The prompt is in bold.

{told}
""",
        encoding="utf-8",
    )
