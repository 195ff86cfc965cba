"""Errors that travel through an ensemble in a tensor, behind the pieces of their stream.

Triton 2.51 never releases a request of an ensemble of which one step sends an error while a response is still in a
later step: after an error its EnsembleContext::PrepareSteps counts no step down (mended in 2026). So a stream that has
begun ends with a last piece that names the error, and the last step makes an error of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

# The output that carries them: the finish reason, or an error in its place. Whoever asks for it and not for
# `finish_reason` is an ensemble; a client that names no outputs asks for both.
ENDING = "ending"
PREFIX = b"error "


def asks_to_carry(request: Any) -> bool:
    """Whether whoever sent the request to the frontend takes errors in a tensor."""
    wanted = request.requested_output_names()
    return ENDING in wanted and "finish_reason" not in wanted


def carry(error: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """A TritonError as the tensor ENDING."""
    return np.full(shape, PREFIX + f"{error.code().name} {error.message()}".encode(), np.object_)


def carried(reasons: NDArray[Any] | None) -> Any:
    """The TritonError that finish reasons carry; None if they are what they are called."""
    first = reasons.flat[0] if reasons is not None and reasons.size else b""
    if not first.startswith(PREFIX):
        return None
    name, _, message = first.removeprefix(PREFIX).decode(errors="replace").partition(" ")
    return pb_utils.TritonError(message, getattr(pb_utils.TritonError, name, pb_utils.TritonError.INTERNAL))
