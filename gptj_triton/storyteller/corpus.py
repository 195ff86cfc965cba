"""The corpus of fairy tales: its paragraphs, which of them are held out, and its tokenizer. Knows no model."""

from __future__ import annotations

import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
# The corpus does not mark where a tale ends, but most tales open with one of these.
TALE_OPENING = re.compile(
    r"Once (up)?on a time|There (was|were) once|There once (was|were|lived)|Once there (was|were|lived)"
    r"|(A long time|Long, long|Many years) ago"
)


def read_corpus(path: Path) -> list[str]:
    """The corpus as paragraphs, each with what follows it: a newline, or END_OF_TEXT where a tale or a book ends.

    Raises SystemExit with one line when the file is missing, empty or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"cannot read the corpus {path}: {error}") from None
    if not text:
        raise SystemExit(f"the corpus {path} is empty")
    lines = text.split("\n")
    followers = [*lines[1:], ""]
    ends = (not after or TALE_OPENING.match(after) for after in followers)
    return [line + (END_OF_TEXT if end else "\n") for line, end in zip(lines, ends, strict=True) if line]


def hold_out(paragraphs: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Split into training and held-out paragraphs: of every ten consecutive blocks of about 8,000 characters, one is
    held out, drawn by `seed`; so each book gives a tenth, in runs long enough to be read as text."""
    block_size = min(8000, sum(map(len, paragraphs)) // 50)
    blocks: list[list[str]] = [[]]
    size = 0
    for paragraph in paragraphs:
        blocks[-1].append(paragraph)
        size += len(paragraph)
        if size >= block_size:
            blocks.append([])
            size = 0
    draw = random.Random(seed)
    training: list[str] = []
    held_out: list[str] = []
    for start in range(0, len(blocks), 10):
        chosen = start + draw.randrange(10)
        for index in range(start, min(start + 10, len(blocks))):
            (held_out if index == chosen else training).extend(blocks[index])
    return training, held_out


def train_tokenizer(paragraphs: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE without a prefix space; all 256 bytes are in it, so any text round-trips.

    END_OF_TEXT is the last id.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((text.replace(END_OF_TEXT, "\n") for text in paragraphs), trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, paragraphs: list[str]) -> torch.Tensor:
    """The paragraphs as one stream of token ids, int64 [tokens]."""
    encodings = tokenizer.backend_tokenizer.encode_batch(paragraphs)
    return torch.tensor([token for encoding in encodings for token in encoding.ids])
