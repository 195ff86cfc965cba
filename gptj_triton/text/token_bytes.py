"""The bytes that each token stands for, read from a byte-level BPE's `tokenizer.json`. Knows no sequences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gptj_triton.text.json_files import read_object


class NotByteLevelError(ValueError):
    """The tokens of a `tokenizer.json` do not stand for fixed bytes."""


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of every token, by its id: `spelt_out` for prompts, `new` for generated text, as `transformers` decodes
    it: special tokens stand for none. Ids without a token stand for no bytes.
    """

    spelt_out: list[bytes]
    new: list[bytes]

    @classmethod
    def read(cls, path: Path) -> TokenBytes:
        """Read a `tokenizer.json`; raises ConfigError when it cannot be read, NotByteLevelError when not byte-level."""
        raw = read_object(path)
        decoder = (raw.get("decoder") or {}).get("type")
        if decoder != "ByteLevel":
            raise NotByteLevelError(f"{path}: the decoder is {decoder}; it must be ByteLevel, as GPT-J's is")
        vocabulary: dict[str, int] = raw["model"]["vocab"]
        added = raw.get("added_tokens", [])
        alphabet = byte_alphabet()
        spelt_out = [b""] * (1 + max([*vocabulary.values(), *(token["id"] for token in added)], default=-1))
        for text, token_id in vocabulary.items():
            spelt_out[token_id] = _bytes_of(text, alphabet)
        for token in added:
            spelt_out[token["id"]] = token["content"].encode()
        new = spelt_out.copy()
        for token in added:
            new[token["id"]] = b"" if token["special"] else _bytes_of(token["content"], alphabet)
        return cls(spelt_out, new)


def load_token_bytes(tokenizer: Path | None, vocab_size: int) -> list[bytes]:
    """Bytes of every id below `vocab_size` in generated text.

    Returns an empty list when there is no `tokenizer.json`, or one that is not byte-level: stop strings are then
    refused.
    """
    if tokenizer is None:
        return []
    try:
        known = TokenBytes.read(tokenizer).new[:vocab_size]
    except NotByteLevelError:
        return []
    return known + [b""] * (vocab_size - len(known))


def byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte, mapped back to the byte.

    Printable Latin-1 stands for itself; the other bytes, in order, for the characters from U+0100 on (GPT-2,
    encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _bytes_of(text: str, alphabet: dict[str, int]) -> bytes:
    """The bytes behind a token; one that is not written in the alphabet means itself, as for `tokenizers`."""
    known = all(character in alphabet for character in text)
    return bytes(alphabet[character] for character in text) if known else text.encode()
