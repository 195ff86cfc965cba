"""What the unit tests share: the steps' helper modules on the import path, and a checkpoint with a toy tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
sys.path[:0] = [str(REPOSITORY / step / "1") for step in ("preprocessing", "postprocessing")]

CORPUS = ["Once upon a time there was a tailor who had three sons. The youngest said: it is time, father!\n"] * 3


@pytest.fixture(scope="session")
def toy_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as preprocessing and postprocessing want it: byte-level BPE of 300 tokens, the last one special."""
    directory = tmp_path_factory.mktemp("toy_checkpoint")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=299, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"n_positions": 64, "vocab_size": 304, "eos_token_id": tokenizer.token_to_id("<|endoftext|>")}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
