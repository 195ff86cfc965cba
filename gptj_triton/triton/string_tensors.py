"""Reads Triton's string tensors in the stub's place, before a request reaches a model.

The stub hands every string tensor to triton_python_backend_utils.deserialize_bytes_tensor, which takes 1.6 µs a string
in Triton 2.51 and has no limit: a million strings hold up everybody for more than a second, and no model can refuse
them sooner (python_backend, src/pb_tensor.cc).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

LENGTH_BYTES = 4


def limit_strings(backend_utils: Any, most: int) -> None:
    """From now on tensors of more than `most` strings come to this process with empty strings, to be refused.

    `backend_utils`: the module triton_python_backend_utils, in which the stub looks the function up for each tensor.
    """
    backend_utils.deserialize_bytes_tensor = functools.partial(read_strings, most=most)


def read_strings(encoded: NDArray[np.uint8], most: int) -> NDArray[Any]:
    """The strings of a tensor, [strings] bytes objects: each comes behind its length, uint32 in little-endian order.

    Where there are more than `most`, none is read: the result takes any shape, and all its strings are empty.
    """
    data, offset = encoded.data, 0
    strings: list[bytes] = []
    while offset < len(data):
        if len(strings) == most:
            return np.empty(0, np.object_).view(_Unread)
        start = offset + LENGTH_BYTES
        offset = start + int.from_bytes(data[offset:start], "little")
        strings.append(bytes(data[start:offset]))
    array = np.empty(len(strings), np.object_)
    array[:] = strings
    return array


class _Unread(np.ndarray[Any, Any]):
    """Stands for the strings that were not read."""

    def reshape(self, shape: Any) -> NDArray[Any]:  # type: ignore[override]
        return np.broadcast_to(np.array(b"", np.object_), shape)
