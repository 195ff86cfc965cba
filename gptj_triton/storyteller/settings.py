"""The settings of one training run, and the command line that gives them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """One training run; every field is an option of the command line."""

    corpus: Path = field(metadata={"help": "UTF-8 text, one paragraph a line, an empty line between books"})
    out: Path = field(metadata={"help": "directory to write the checkpoint to"})
    device: str = option("auto", "auto, cpu or cuda")
    seed: int = option(0, "seed of the held-out choice, the initial weights and the order of the data")
    vocab_size: int = option(4096, "entries of the tokenizer, <|endoftext|> included")
    context: int = option(1024, "tokens of context (n_positions)")
    width: int = option(256, "n_embd")
    layers: int = option(6, "n_layer")
    heads: int = option(4, "n_head")
    rotary_dim: int = option(32, "rotated features of each head")
    dropout: float = option(0.1, "dropout of embeddings, attention and residuals")
    optimizer: str = option("muon", "optimiser of the blocks' matrices, muon or adamw; all else is AdamW's")
    learning_rate: float = option(1e-2, "peak learning rate")
    weight_decay: float = option(1.0, "decoupled weight decay of all matrices")
    ema_decay: float = option(0.99, "decay a step of the averaged weights, which are the ones kept")
    batch_size: int = option(16, "windows of context tokens in a step")
    epochs: int = option(20, "most passes over the training text")
    steps: int = option(0, "most optimiser steps (0: no limit)")
    hours: float = option(9.0, "most hours of training; a slow machine gets a shorter schedule")
    patience: int = option(4, "evaluations (one an epoch) without a lower held-out loss before it stops")


def parse_settings(argv: Sequence[str] | None, description: str) -> Settings:
    parser = argparse.ArgumentParser(description=description)
    for item in fields(Settings):
        flag = "--" + item.name.replace("_", "-")
        if item.default is MISSING:
            parser.add_argument(flag, type=Path, required=True, help=item.metadata["help"])
        else:
            text = f"{item.metadata['help']} (default: %(default)s)"
            parser.add_argument(flag, type=type(item.default), default=item.default, help=text)
    return Settings(**vars(parser.parse_args(argv)))
