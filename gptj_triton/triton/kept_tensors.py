"""A cache of Triton's tensors that many messages have in common. Knows nothing of what they hold."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray


class KeptTensors:
    """Holds at most `limit` tensors, in memory that is shared with Triton; when it is full, it is emptied."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: dict[tuple[str, Hashable], Any] = {}

    def get(self, name: str, values: Hashable, make: Callable[[], NDArray[Any]]) -> Any:
        """The tensor that `make` makes of `values`."""
        found = self._kept.get((name, values))
        if found is None:
            if len(self._kept) >= self._limit:
                self._kept.clear()
            found = self._kept[name, values] = pb_utils.Tensor(name, make())
        return found

    def clear(self) -> None:
        """Give the memory back."""
        self._kept.clear()
