"""Which token ids would complete a bad word. Knows no sequences of the engine."""

from __future__ import annotations

from collections.abc import Callable

from gptj_triton.text.compile_cache import CompileCache


class BadWords:
    """Bad words, token sequences, by all but their last token: the head that must come before it."""

    def __init__(self, words: tuple[tuple[int, ...], ...]) -> None:
        """`words` have one token id or more each."""
        self._last_tokens: dict[int, dict[tuple[int, ...], list[int]]] = {}  # by the length of the head, then the head
        for word in dict.fromkeys(words):
            self._last_tokens.setdefault(len(word) - 1, {}).setdefault(word[:-1], []).append(word[-1])

    def banned(self, last: Callable[[int], list[int]]) -> list[int]:
        """The token ids that may not come next; `last(n)` gives the n token ids that came last."""
        return [
            token
            for length, last_tokens in self._last_tokens.items()
            for token in last_tokens.get(tuple(last(length)), ())
        ]


compile_bad_words: CompileCache[tuple[tuple[int, ...], ...], BadWords] = CompileCache(BadWords)
