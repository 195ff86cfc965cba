"""Counts the pages of the KV cache: which are free, which are used, and which hold a prefix that others can share.

Counts pages; holds no tensors. A page is shared by all sequences that begin with the same tokens up to its end: equal
prompts, and the beams of one search. A page that nobody uses any more keeps its content until it is needed for another.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable

from gptj_triton.engine.sequence import Sequence


class PagePool:
    """`num_pages` pages of `page_size` tokens each.

    `copies` are (from, to) pages whose content must be copied before the next step writes to the cache.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.copies: list[tuple[int, int]] = []
        self._users = [0] * num_pages
        self._free = OrderedDict.fromkeys(range(num_pages))  # the one freed longest ago comes first
        self._page_of: dict[bytes, int] = {}  # a prefix's key → the page that ends it
        self._key_of: dict[int, bytes] = {}
        self._coming: set[bytes] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens take up."""
        return -(-num_tokens // self.page_size)

    def begin_step(self) -> None:
        """Pages that the step before computed can be shared from now on."""
        self._coming.clear()

    def attach_prefix(self, sequence: Sequence) -> None:
        """Give a sequence without pages the pages that already hold a prefix of it; its last token is always left."""
        assert not sequence.pages and sequence.num_cached == 0
        for index in range((sequence.num_tokens - 1) // self.page_size):
            page = self._page_of.get(self._key(sequence, index))
            if page is None:
                break
            self._use(page)
            sequence.pages.append(page)
        sequence.num_shared = len(sequence.pages)
        sequence.num_cached = len(sequence.pages) * self.page_size

    def is_coming(self, sequence: Sequence) -> bool:
        """True if this step computes the page that `sequence` needs next, so that it can be shared in the next step."""
        index = len(sequence.pages)
        return (index + 1) * self.page_size < sequence.num_tokens and self._key(sequence, index) in self._coming

    def grow(self, sequence: Sequence, num_tokens: int, kept: int = 0) -> bool:
        """Make room for the first `num_tokens` tokens of `sequence`: pages of its own wherever it is yet to write.

        Returns false, and takes nothing, when too few pages are free besides those `kept` for others.
        """
        first_written = sequence.num_cached // self.page_size
        shared = [i for i in range(first_written, len(sequence.pages)) if self._users[sequence.pages[i]] > 1]
        missing = self.pages_for(num_tokens) - len(sequence.pages)
        needed = missing + len(shared)
        if needed > 0 and needed > self.num_free - kept:
            return False
        for index in shared:
            page = sequence.pages[index]
            sequence.pages[index] = self._take()
            self.copies.append((page, sequence.pages[index]))
            self._leave(page)
        for _ in range(missing):
            sequence.pages.append(self._take())
        for index in range(first_written, min(num_tokens, sequence.num_settled) // self.page_size):
            self._coming.add(self._key(sequence, index))
        return True

    def computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Note that `num_tokens` more tokens of `sequence` have their K and V in its pages, or will have when the steps
        under way are done; full pages are shared once all of their tokens are known.
        """
        sequence.num_cached += num_tokens
        full = min(sequence.num_cached, sequence.num_settled) // self.page_size
        for index in range(sequence.num_shared, full):
            key, page = self._key(sequence, index), sequence.pages[index]
            if key not in self._page_of:
                self._page_of[key] = page
                self._key_of[page] = key
        sequence.num_shared = max(sequence.num_shared, full)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, a copy of `parent`, use the pages of it too."""
        for page in parent.pages:
            self._use(page)
        child.pages = list(parent.pages)
        child.num_cached, child.num_shared = parent.num_cached, parent.num_shared

    def release(self, sequence: Sequence) -> None:
        """Take the pages of `sequence` back; the first ones are kept longest, because more can share them."""
        for page in reversed(sequence.pages):
            self._leave(page)
        sequence.pages = []
        sequence.num_cached = sequence.num_shared = 0
        if sequence.keeps_pages:
            sequence.search_slot, sequence.page_keys = -1, []

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Assert that every page is free, or used by as many of `sequences` as is counted, and every key leads back."""
        users = Counter(page for sequence in sequences for page in sequence.pages)
        assert [users[page] for page in range(self.num_pages)] == self._users, "a page of the KV cache is miscounted"
        assert set(self._free) == {page for page in range(self.num_pages) if not users[page]}, "a page leaked"
        assert {key: page for page, key in self._key_of.items()} == self._page_of, "a shared prefix lost its page"

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """A digest of all tokens up to the end of page `index`."""
        keys = sequence.page_keys
        while len(keys) <= index:
            start = len(keys) * self.page_size
            tokens = array("I", sequence.tokens(start, start + self.page_size))
            keys.append(hashlib.blake2b((keys[-1] if keys else b"") + tokens.tobytes(), digest_size=16).digest())
        return keys[index]

    def _take(self) -> int:
        page, _ = self._free.popitem(last=False)
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
        self._users[page] = 1
        return page

    def _use(self, page: int) -> None:
        self._users[page] += 1
        self._free.pop(page, None)

    def _leave(self, page: int) -> None:
        self._users[page] -= 1
        if not self._users[page]:
            self._free[page] = None
