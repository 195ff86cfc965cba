"""Token ids to text, with the tokenizer of the checkpoint that is served.

Works on bytes, because a token of a byte-level vocabulary may end inside a character. Knows the tokenizer, but neither
Triton nor how the tokens came about.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FinishedText:
    """What became of one sequence.

    `finish_reason`: "stop", "length" or what else the engine says; `num_output_tokens` counts the end id too.
    """

    text: str
    finish_reason: str
    num_output_tokens: int


@dataclass(frozen=True)
class TokenText:
    """The bytes of every token: `token_bytes[id]`, and in `special` the ids that stand for no text."""

    token_bytes: tuple[bytes, ...]
    special: frozenset[int]

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
        token_bytes = [b""] * (max(vocabulary.values()) + 1)
        for token, index in vocabulary.items():
            token_bytes[index] = token.encode("utf-8") if index in added else bytes(byte_of[letter] for letter in token)
        return cls(tuple(token_bytes), frozenset(index for index, token in added.items() if token.special))

    def prompt_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of a prompt exactly as it was sent, special tokens spelt out."""
        return b"".join(self._bytes(index) for index in ids)

    def new_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of generated tokens; special tokens stand for none."""
        return b"".join(self._bytes(index) for index in ids if index not in self.special)

    def finish(
        self,
        ids: Sequence[int],
        prompt_length: int,
        end_id: int,
        stop_words: Sequence[bytes] = (),
        reason: str | None = None,
        with_prompt: bool = False,
    ) -> FinishedText:
        """The text of one sequence.

        `ids`: prompt and new tokens; `reason`: the engine's finish reason, None where it gives none. The new text ends
        before the first end id and before the first stop word in it. A character cut off at the very end is left out;
        bytes elsewhere that are no UTF-8 become U+FFFD.
        """
        new = list(ids[prompt_length:])
        ended = end_id in new
        # An answer that the end id closed may be padded with more of them.
        kept = new[: new.index(end_id)] if ended else new
        text = self.new_bytes(kept)
        cut = min((at for at in map(text.find, stop_words) if at >= 0), default=None)
        if ended or cut is not None:
            reason = "stop"
        prompt = self.prompt_bytes(ids[:prompt_length]) if with_prompt else b""
        return FinishedText(without_cut_character(prompt + text[:cut]), reason or "length", len(kept) + ended)

    def _bytes(self, index: int) -> bytes:
        """The bytes of one token; none for an id that only the model has (GPT-J's vocabulary is padded)."""
        return self.token_bytes[index] if index < len(self.token_bytes) else b""


def without_cut_character(data: bytes) -> str:
    """`data` as text, without a character that is incomplete at its end."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def _byte_of_letter() -> dict[str, int]:
    """The byte behind each letter of the byte-level alphabet (Radford et al. 2019, GPT-2).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the letters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return letters
