"""Which pages of the KV cache are free and which sequence owns the others. Counts pages; holds no tensors."""

from __future__ import annotations

from collections.abc import Iterable

from gptj_engine.sequence import Sequence


class PagePool:
    """`num_pages` pages of `page_size` tokens each."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens take up."""
        return -(-num_tokens // self.page_size)

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give `sequence` the pages that its first `num_tokens` tokens need; false, and nothing taken, when too few are
        free.
        """
        missing = self.pages_for(num_tokens) - len(sequence.pages)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            sequence.pages.append(self._free.pop())
        return True

    def release(self, sequence: Sequence) -> None:
        """Take all pages of `sequence` back; what was computed for it is forgotten."""
        self._free.extend(reversed(sequence.pages))
        sequence.pages.clear()
        sequence.num_cached = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Assert that every page is free or owned by exactly one of `sequences`."""
        owned = [page for sequence in sequences for page in sequence.pages]
        assert sorted(owned + self._free) == list(range(self.num_pages)), (
            "a page of the KV cache leaked or has two owners"
        )
