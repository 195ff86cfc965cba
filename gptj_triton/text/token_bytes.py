"""The bytes that each token stands for, read from a byte-level BPE's `tokenizer.json`. Knows no sequences."""

from __future__ import annotations

import json
from pathlib import Path

from gptj_triton.checkpoint.files import find_checkpoint_files
from gptj_triton.errors import ConfigError


def byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte, mapped back to the byte.

    Printable Latin-1 stands for itself; the other bytes, in order, for the characters from U+0100 on (GPT-2,
    encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def load_token_bytes(checkpoint: Path, vocab_size: int) -> list[bytes]:
    """Bytes of every id below `vocab_size`; special tokens and ids without a token stand for no bytes.

    Returns an empty list when the checkpoint has no `tokenizer.json`, or one that is not byte-level: stop strings are
    then refused.
    """
    path = find_checkpoint_files(checkpoint).find("tokenizer.json")
    if path is None:
        return []
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not _is_byte_level(raw.get("decoder")):
        return []
    alphabet = byte_alphabet()
    table = [b""] * vocab_size
    for text, token in raw["model"]["vocab"].items():
        if token < vocab_size:
            known = all(character in alphabet for character in text)
            # A token that is not written in the alphabet means its own letters, as for the decoder of `tokenizers`.
            table[token] = bytes(alphabet[character] for character in text) if known else text.encode()
    for added in raw.get("added_tokens", []):
        if added["id"] < vocab_size:
            table[added["id"]] = b"" if added["special"] else added["content"].encode()
    return table


def _is_byte_level(decoder: dict[str, object] | None) -> bool:
    return decoder is not None and decoder.get("type") == "ByteLevel"
