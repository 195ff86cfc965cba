"""The parameters of a request: all that came beside the tensors, and may be a field under a wrong name.

`generate` turns JSON keys that name no input into parameters, so a misspelt field shows here and nowhere else. But
Triton, its clients and proxies have parameters too: a forwarded header, a team's name. So what is like the name of a
field is refused, and all else is let through.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from gptj_triton.fields import BY_NAME, BY_TENSOR
from gptj_triton.limits import RequestLimits
from gptj_triton.triton.request_fields import FieldError

# What Triton itself reads, in its own namespace or over `generate`, where `id` and `timeout` stay among the parameters.
RESERVED_PARAMETERS = frozenset(
    {"id", "timeout", "priority", "sequence_id", "sequence_start", "sequence_end", "headers", "binary_data_output"}
)
RESERVED_PREFIX = "triton_"
# Fields by the names that people give them: here, on other servers, and as the tensors that only the engine takes.
NAMES = {name: name for name in BY_NAME}
NAMES |= {other: name for name, field in BY_NAME.items() for other in field.elsewhere}
SQUEEZED_NAMES = {name.replace("_", ""): field for name, field in NAMES.items()}
LONGEST_NAME = 60
# Of difflib's ratio: one letter in seven may be wrong. `team` is as near to `stream` as 0.8.
NEAR = 0.85


def read_parameters(parameters_json: str, limits: RequestLimits) -> dict[str, Any]:
    """The parameters in the JSON object that the Python backend's request.parameters() returns, "" for none.

    Raises InvalidRequestError for too many of them.
    """
    limits.check("max_parameter_bytes", len(parameters_json), "number of bytes of the request's parameters")
    parameters: dict[str, Any] = json.loads(parameters_json or "{}")
    limits.check("max_parameters", len(parameters), "number of parameters of the request")
    return parameters


def check_parameters(parameters: Mapping[str, Any]) -> list[str]:
    """The names of parameters that nobody here knows, quoted; FieldError for one like a field, or a wrong timeout."""
    unknown = []
    for name, value in parameters.items():
        if name == "timeout" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise FieldError(f"timeout is {value!r}; it must be a whole number of microseconds, 0 for no limit")
        if name in RESERVED_PARAMETERS or name.startswith(RESERVED_PREFIX):
            continue
        if name in BY_NAME:
            raise FieldError(f"{name} came as a request parameter; it must be sent as an input tensor")
        nearest = nearest_field(name) if len(name) <= LONGEST_NAME else None
        if nearest or name in BY_TENSOR:
            hint = f" (did you mean {nearest}?)" if nearest else ""
            raise FieldError(f"unknown field {name!r}{hint}; the fields are {', '.join(BY_NAME)}")
        unknown.append(repr(name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..."))
    return unknown


@functools.lru_cache(1024)
def nearest_field(name: str) -> str | None:
    """The field that `name` must mean: written in another way, known by that name elsewhere, or misspelt."""
    if name in BY_TENSOR and BY_TENSOR[name].name:
        return BY_TENSOR[name].name
    snake = re.sub(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])", "_", name).strip("_").lower()
    squeezed = snake.replace("_", "")
    if squeezed in SQUEEZED_NAMES:
        return SQUEEZED_NAMES[squeezed]
    # Few people misspell the first letter, and many names end alike: `send_id` is not `end_id`.
    candidates = [known for known in NAMES if known[:1] == snake[:1]]
    near = difflib.get_close_matches(snake, candidates, n=1, cutoff=NEAR)
    return NAMES[near[0]] if near else None
