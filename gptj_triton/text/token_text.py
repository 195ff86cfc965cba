"""Token ids to text, whole or piece by piece, with the tokenizer of the checkpoint that is served.

Works on bytes, because a token of a byte-level vocabulary may end inside a character. Remembers nothing between the
pieces of a stream. Knows the tokenizer, but neither Triton nor how the tokens came about.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# A character that is cut off has at most this many bytes (UTF-8 has four).
CUT_CHARACTER = 3


@dataclass(frozen=True)
class FinishedText:
    """What became of one sequence, or what one more response of its stream adds.

    `finish_reason`: "stop", "length" or what else the engine says, "" while the sequence goes on; `num_output_tokens`
    counts all new tokens so far, the end id too.
    """

    text: str
    finish_reason: str
    num_output_tokens: int


@dataclass(frozen=True, eq=False)
class TokenText:
    """The bytes of every token: `token_bytes[id]`, and `new_token_bytes[id]` where special tokens stand for none.

    Both end in an entry without bytes, which serves ids that only the model has (GPT-J's vocabulary is padded).
    """

    token_bytes: NDArray[np.object_]
    new_token_bytes: NDArray[np.object_]

    @classmethod
    def load(cls, directory: Path) -> TokenText:
        """Read tokenizer.json; raises FileNotFoundError or ValueError naming what is wrong with it."""
        # Only here: Triton's auto-complete stage imports the model in a second process, which needs no tokenizer.
        from tokenizers import Tokenizer

        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; tokenizer_dir must name a directory that has it")
        tokenizer = Tokenizer.from_file(str(path))
        decoder = (json.loads(tokenizer.to_str())["decoder"] or {}).get("type")
        if decoder != "ByteLevel":
            raise ValueError(f"{path}: the decoder is {decoder}; it must be ByteLevel, as GPT-J's is")
        added = tokenizer.get_added_tokens_decoder()
        vocabulary = tokenizer.get_vocab()
        byte_of = _byte_of_letter()
        token_bytes = np.full(max(vocabulary.values()) + 2, b"", dtype=np.object_)
        for token, index in vocabulary.items():
            token_bytes[index] = token.encode() if index in added else _bytes_of_letters(token, byte_of)
        new_token_bytes = token_bytes.copy()
        new_token_bytes[[index for index, token in added.items() if token.special]] = b""
        return cls(token_bytes, new_token_bytes)

    def prompt_bytes(self, ids: ArrayLike) -> bytes:
        """The bytes of a prompt exactly as it was sent, special tokens spelt out."""
        return _joined(self.token_bytes, ids)

    def new_bytes(self, ids: ArrayLike) -> bytes:
        """The bytes of generated tokens; special tokens stand for none."""
        return _joined(self.new_token_bytes, ids)

    def finish(
        self,
        ids: Sequence[int] | NDArray[Any],
        prompt_length: int,
        end_id: int,
        stop_words: Sequence[bytes] = (),
        reason: str | None = None,
        with_prompt: bool = False,
    ) -> FinishedText:
        """The text of one sequence.

        `ids`: prompt and new tokens; `reason`: the engine's finish reason, None where it gives none. The new text ends
        before the first end id and before the stop word that is the first to be complete. A character cut off at the
        very end is left out; bytes elsewhere that are no UTF-8 become U+FFFD.
        """
        return self.piece(ids, prompt_length, prompt_length, end_id, stop_words, reason or "length", with_prompt)

    def piece(
        self,
        ids: Sequence[int] | NDArray[Any],
        prompt_length: int,
        previous_length: int,
        end_id: int,
        stop_words: Sequence[bytes] = (),
        reason: str = "",
        with_prompt: bool = False,
    ) -> FinishedText:
        """What one response of a stream adds to the text of a sequence.

        `ids`: prompt and new tokens so far, of which earlier responses had the first `previous_length`; `reason`: ""
        except in the last response. However a sequence is cut into responses, its pieces joined are the text of
        `finish`. So a piece ends with a whole character, and holds back what may become a stop word. The prompt comes
        with the first new token.
        """
        new = np.asarray(ids[prompt_length:], dtype=np.int64)
        end_ids = np.flatnonzero(new == end_id)
        # An answer that the end id closed may be padded with more of them.
        kept = new[: end_ids[0]] if end_ids.size else new
        before = previous_length - prompt_length
        # Stop words are looked for from the start, else the last few bytes before the piece are enough.
        start = 0 if stop_words else self._start_of_window(kept, before)
        head = self.new_bytes(kept[start:before])
        text = head + self.new_bytes(kept[before:])
        prompt = self.prompt_bytes(ids[:prompt_length]) if with_prompt else b""
        earlier = now = ""
        if before:
            earlier = visible(prompt, head, stop_words, ended=before > len(kept))
        if len(new) or reason:
            now = visible(prompt, text, stop_words, ended=bool(end_ids.size or reason))
        if reason and (end_ids.size or first_stop(text, stop_words) is not None):
            reason = "stop"
        return FinishedText(now[len(earlier) :], reason, len(kept) + bool(end_ids.size))

    def _start_of_window(self, new: NDArray[np.int64], stop: int) -> int:
        """From where on the tokens before `stop` have the bytes of a character that may be cut off there."""
        size, stop = 0, min(stop, len(new))
        while stop > 0 and size < CUT_CHARACTER:
            stop -= 1
            size += len(self.new_token_bytes[min(int(new[stop]), len(self.new_token_bytes) - 1)])
        return stop


def visible(prompt: bytes, new: bytes, stop_words: Sequence[bytes], ended: bool) -> str:
    """The text that may be shown of a prompt and the new bytes so far.

    As `new` grows, each is a prefix of the next: what could be the beginning of a stop word waits until `ended`.
    """
    cut = first_stop(new, stop_words)
    if cut is None:
        cut = len(new) - (0 if ended else held_back(new, stop_words))
    return without_cut_character(prompt + new[:cut])


def first_stop(data: bytes, stop_words: Sequence[bytes]) -> int | None:
    """Where the stop word begins that is the first to be complete; of those that end together, the longest."""
    found = [(at + len(word), at) for word in stop_words if (at := data.find(word)) >= 0]
    return min(found)[1] if found else None


def held_back(data: bytes, stop_words: Sequence[bytes]) -> int:
    """The size of the longest end of `data` that is the beginning of a stop word."""
    return max((_beginning_at_end(data, word) for word in stop_words), default=0)


def _beginning_at_end(data: bytes, word: bytes) -> int:
    at = max(0, len(data) - len(word) + 1)
    while (at := data.find(word[:1], at)) >= 0:
        if word.startswith(data[at:]):
            return len(data) - at
        at += 1
    return 0


def without_cut_character(data: bytes) -> str:
    """`data` as text, without a character that is incomplete at its end."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def _joined(table: NDArray[np.object_], ids: ArrayLike) -> bytes:
    """The bytes of `ids` end to end; ids beyond the table have those of its last entry."""
    return b"".join(table.take(np.asarray(ids, dtype=np.int64), mode="clip").tolist())


def _bytes_of_letters(token: str, byte_of: Mapping[str, int]) -> bytes:
    """The bytes behind a token of the vocabulary; one that is not written in the byte-level alphabet means itself."""
    known = all(letter in byte_of for letter in token)
    return bytes(byte_of[letter] for letter in token) if known else token.encode()


def _byte_of_letter() -> dict[str, int]:
    """The byte behind each letter of the byte-level alphabet (Radford et al. 2019, GPT-2).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the letters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return letters
