"""Text to token ids, with the tokenizer of the checkpoint that is served.

Knows the tokenizer and the checkpoint's config.json; knows neither Triton nor the fields of a request.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptj_triton.stand_ins import refuse_stand_in
from gptj_triton.text.end_ids import read_end_ids
from gptj_triton.text.json_files import read_object
from gptj_triton.text.tokenizer_files import pre_tokenizers, splits_special_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer


LONG_TOKEN = 8  # characters; a usual text has about half as many a token


@dataclass(frozen=True)
class PromptTokenizer:
    """A checkpoint's tokenizer and the limits of a prompt that its config.json sets.

    `words` is the tokenizer without the space that it may put before a text. `longest_token` is the most bytes that one
    token stands for, None where the tokenizer rewrites text first, so that the length of a text says nothing about its
    tokens.
    """

    tokenizer: Tokenizer
    words: Tokenizer
    context_length: int
    vocab_size: int
    end_ids: tuple[int, ...]
    longest_token: int | None

    @classmethod
    def load(cls, directory: Path) -> PromptTokenizer:
        """Read tokenizer.json, config.json and what stands beside them.

        Raises FileNotFoundError, ConfigError or ValueError naming the file and what is wrong with it.
        """
        # Only here: Triton's auto-complete stage imports the model in a second process, which needs no tokenizer.
        from tokenizers import Tokenizer

        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is no directory; tokenizer_dir must name one with tokenizer.json")
        for name in ("tokenizer.json", "config.json"):
            refuse_stand_in(directory / name)
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name} is missing; tokenizer_dir must name a directory with it")
        config = read_object(directory / "config.json")
        for key in ("n_positions", "vocab_size"):
            if not isinstance(config.get(key), int):
                raise ValueError(f"{directory}/config.json: {key} is {config.get(key)!r}; it must be a whole number")
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        # A tokenizer.json may carry the padding and truncation of its training run, which would quietly change prompts.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = splits_special_tokens(directory)
        return cls(
            tokenizer=tokenizer,
            words=_without_prefix_space(tokenizer),
            context_length=config["n_positions"],
            vocab_size=config["vocab_size"],
            end_ids=read_end_ids(directory / "config.json", config, config["vocab_size"]),
            longest_token=_longest_token(tokenizer),
        )

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt, as `transformers` gives them for the same tokenizer; some may be `vocab_size` or
        more, which the model lacks.
        """
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def surely_exceeds(self, text: str, tokens: int) -> bool:
        """Whether a long text has more than so many tokens beyond doubt; in doubt, false.

        To encode all of 260 kB takes a second. A text is cut here, and each cut may add as many tokens as the longest
        token has bytes; so what is twice as long is too long.
        """
        step, counted = LONG_TOKEN * tokens, 0
        if self.longest_token is None or len(text) <= step:
            return False
        for start in range(0, len(text), step):
            counted += len(self.encode(text[start : start + step]))
            if counted > 2 * tokens:
                return True
        return False

    def word_sequences(self, words: tuple[str, ...]) -> list[list[int]]:
        """The token sequences that spell each of `words`, with a space in front and without, each once.

        Byte-level BPE gives a word other tokens at the start of a text than behind a space, as most words are. A
        spelling with a token that the model lacks never comes, and is left out.
        """
        sequences: dict[tuple[int, ...], None] = {}
        for word in words:
            for spelling in (word,) if word.startswith(" ") else (word, " " + word):
                sequences[tuple(self.words.encode(spelling, add_special_tokens=False).ids)] = None
        return [list(ids) for ids in sequences if ids and max(ids) < self.vocab_size]


def _without_prefix_space(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, or one that puts no space before a text where this one does."""
    raw = json.loads(tokenizer.to_str())
    steps = [step for step in pre_tokenizers(raw) if step.get("add_prefix_space")]
    if not steps:
        return tokenizer
    for step in steps:
        step["add_prefix_space"] = False
    changed = type(tokenizer).from_str(json.dumps(raw))
    changed.encode_special_tokens = tokenizer.encode_special_tokens
    return changed


def _longest_token(tokenizer: Tokenizer) -> int | None:
    """The most bytes that one token of a byte-level vocabulary stands for; None where tokens may swallow more."""
    if tokenizer.normalizer is not None:
        return None
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    if any(token.lstrip or token.rstrip for token in added.values()):
        return None
    # In a byte-level vocabulary each character stands for one byte; added tokens are plain text.
    return max(len(text.encode("utf-8")) if text in added else len(text) for text in tokenizer.get_vocab())
