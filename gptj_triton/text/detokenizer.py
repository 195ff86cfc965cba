"""Token ids to text, whole or piece by piece, with the tokenizer of the checkpoint that is served.

Works on bytes, because a token of a byte-level vocabulary may end inside a character. Remembers nothing of a stream
between its pieces. Knows the tokenizer, but neither Triton nor how the tokens came about.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptj_triton.text.json_files import read_object
from gptj_triton.text.stop_sequences import StopState, compile_stop_strings
from gptj_triton.text.token_bytes import TokenBytes

# A character that is cut off has at most this many bytes (UTF-8 has four).
CUT_CHARACTER = 3


@dataclass(frozen=True)
class Piece:
    """What one response adds to the text of a sequence; the only response has all of it.

    `finish_reason`: "stop", "length" or the engine's own word, "" while the sequence goes on; `num_output_tokens`
    counts the new tokens that earlier responses did not have, the end id too.
    """

    text: str
    finish_reason: str
    num_output_tokens: int


@dataclass(frozen=True, eq=False)
class Detokenizer:
    """The bytes of every token: `prompt_table[id]`, and `new_table[id]` where special tokens stand for none.

    Both end in an entry without bytes, which serves ids that only the model has (GPT-J's vocabulary is padded).
    `vocab_size` counts these too; None where there is no config.json to say so.
    """

    prompt_table: NDArray[np.object_]
    new_table: NDArray[np.object_]
    vocab_size: int | None

    @classmethod
    def load(cls, directory: Path) -> Detokenizer:
        """Read tokenizer.json and, where there is one, config.json.

        Raises FileNotFoundError, ConfigError or NotByteLevelError saying what is wrong.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; tokenizer_dir must name a directory that has it")
        tokens = TokenBytes.read(path)
        prompt, new = (np.array([*table, b""], dtype=np.object_) for table in (tokens.spelt_out, tokens.new))
        config = directory / "config.json"
        known = read_object(config).get("vocab_size") if config.is_file() else None
        return cls(prompt, new, None if known is None else max(known, len(tokens.new)))

    def prompt_bytes(self, ids: ArrayLike) -> bytes:
        """The bytes of a prompt exactly as it was sent, special tokens spelt out."""
        return _joined(self.prompt_table, ids)

    def new_bytes(self, ids: ArrayLike) -> bytes:
        """The bytes of generated tokens; special tokens stand for none."""
        return _joined(self.new_table, ids)

    def piece(
        self,
        ids: Sequence[int] | NDArray[Any],
        prompt_length: int,
        previous_length: int,
        end_ids: Iterable[int],
        stop_words: Sequence[bytes] = (),
        reason: str = "",
        with_prompt: bool = False,
    ) -> Piece:
        """The text that one response adds: new text up to the first of the end ids and the first stop word to be
        complete.

        `ids`: prompt and new tokens so far; earlier responses had the first `previous_length`, or only the prompt;
        `reason`: the finish reason in the last response, "" before. Pieces joined are the same text however the tokens
        are cut into responses: a piece ends with a whole character, and holds back what may become a stop word. A
        character cut off at the very end is left out; bytes elsewhere that are no UTF-8 become U+FFFD. The prompt comes
        with the first new token.

        Time depends on the new tokens and the longest stop word, not on the text: an engine ends a sequence with the
        token that completes a stop word, so that earlier tokens, but for the last one, have completed none.
        """
        stops = compile_stop_strings(tuple(stop_words))
        new = np.asarray(ids[prompt_length:], dtype=np.int64)
        ends = [place for end_id in end_ids for place in np.flatnonzero(new == end_id)[:1].tolist()]
        # An answer that an end id closed may be padded with more of them.
        kept = new[: min(ends)] if ends else new
        before = previous_length - prompt_length
        start = self._start_of_window(kept, before, stops.longest)
        # The prompt's last character may go on in the new text.
        prompt = self.prompt_bytes(ids[:prompt_length]) if with_prompt and not start else b""
        head = self.new_bytes(kept[start:before])
        data = head + self.new_bytes(kept[before:])
        state, read = earlier_state, earlier_read = stops.feed(stops.start, head)
        if not state.complete:
            state, read = stops.feed(state, data[read:])
            read += earlier_read
        text = shown = ""
        if before:
            shown = _visible(prompt + head, len(prompt) + earlier_read, earlier_state, ended=before > len(kept))
        if len(new) or reason:
            text = _visible(prompt + data, len(prompt) + read, state, ended=bool(ends or reason))
        if reason and (ends or state.complete):
            reason = "stop"
        counted = len(kept) + bool(ends)
        return Piece(text[len(shown) :], reason, counted - min(before, counted))

    def _start_of_window(self, new: NDArray[np.int64], before: int, longest_stop: int) -> int:
        """From where on the first `before` tokens tell what was held back of them, and if the last completes a stop.

        These are the last token and, before it, all but one byte of a stop word and a character that is cut off.
        """
        start = min(before, len(new)) - 1
        size = max(longest_stop - 1, 0) + CUT_CHARACTER
        while start > 0 and size > 0:
            start -= 1
            size -= len(self.new_table[min(int(new[start]), len(self.new_table) - 1)])
        return max(start, 0)


def _visible(data: bytes, read: int, state: StopState, ended: bool) -> str:
    """The text that may be shown of `data`, whose first `read` bytes led to `state`.

    As the text grows, each is a prefix of the next: what could be the beginning of a stop word waits until `ended`.
    """
    waiting = 0 if ended else state.depth
    return without_cut_character(data[: read - (state.complete or waiting)])


def without_cut_character(data: bytes) -> str:
    """`data` as text, without a character that is incomplete at its end."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def _joined(table: NDArray[np.object_], ids: ArrayLike) -> bytes:
    """The bytes of `ids` end to end; ids beyond the table have those of its last entry."""
    return b"".join(table.take(np.asarray(ids, dtype=np.int64), mode="clip").tolist())
