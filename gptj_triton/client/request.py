"""What a request to the server holds: the models to ask, the fields to give, and their values as tensors.

Only types are checked here; ranges are the server's.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import triton_to_np_dtype

from gptj_triton.client.errors import InvalidFieldError, ServerError
from gptj_triton.fields import BY_NAME, Field

MODEL = "ensemble"
STREAMING_MODEL = "ensemble_stream"
PROMPT = "text_input"
# What an answer holds, and each piece of one, whatever was asked for.
OUTPUTS = ("text_output", "finish_reason", "sequence_length")
# All that may be given besides the prompt. Whether an answer is streamed depends on the model.
FIELDS = {name: field for name, field in BY_NAME.items() if name not in (PROMPT, "stream")}
PYTHON_TYPES: dict[str, type] = {"BYTES": str, "INT32": int, "UINT64": int, "FP32": float, "BOOL": bool}


def python_type(field: Field) -> type:
    """The type of a value, or of each in a list."""
    return PYTHON_TYPES[field.dtype]


def check(values: dict[str, Any]) -> None:
    """Raise InvalidFieldError for a name that is no field, and for a value that its type cannot carry."""
    if unknown := sorted(set(values) - set(FIELDS)):
        raise InvalidFieldError(f"unknown field {', '.join(unknown)}: give some of {', '.join(FIELDS)}")
    for name, value in values.items():
        many = FIELDS[name].many
        if many and not isinstance(value, (list, tuple)):
            raise InvalidFieldError(f"{name}: {value!r} is not a list of strings")
        for item in value if many else [value]:
            _check_value(name, item)


def _check_value(name: str, value: Any) -> None:
    expected, dtype = python_type(FIELDS[name]), FIELDS[name].dtype
    accepted = (float, int) if expected is float else expected
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        raise InvalidFieldError(f"{name}: {value!r} is not of type {expected.__name__}")
    if expected is int:
        limits = np.iinfo(triton_to_np_dtype(dtype))
        if not limits.min <= value <= limits.max:
            raise InvalidFieldError(f"{name}: {value} is outside {limits.min} to {limits.max} ({dtype})")
    if expected is str:
        encoded(name, value)


def require_outputs(present: Container[str]) -> None:
    """Raises ServerError for an answer that lacks outputs, because another server or another model gave it."""
    if missing := [name for name in OUTPUTS if name not in present]:
        raise ServerError(f"not an answer of this project's server: it lacks {', '.join(missing)}", "")


def encoded(name: str, text: str) -> bytes:
    """`text` in UTF-8. Raises InvalidFieldError for lone surrogates, which stand for bytes of other encodings."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidFieldError(f"{name}: not valid UTF-8 at character {error.start}") from None


def tensors(prompts: list[str], values: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """The inputs of a request by name: a row for each prompt, [rows, 1], or [rows, N] for a list of N."""
    arrays = {PROMPT: np.array([[encoded(PROMPT, prompt)] for prompt in prompts], np.object_)}
    return arrays | {name: tensor(name, value, len(prompts)) for name, value in values.items()}


def tensor(name: str, value: Any, rows: int) -> NDArray[Any]:
    """`value` for every row: [rows, 1], or [rows, len(value)] for a list."""
    field = FIELDS[name]
    items = list(value) if field.many else [value]
    if field.dtype == "BYTES":
        items = [encoded(name, text) for text in items]
    return np.array([items] * rows, dtype=triton_to_np_dtype(field.dtype))
