"""The parameters in a model's config.pbtxt. Knows Triton's JSON of it, not what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def read_model_parameters(model_config: Mapping[str, Any]) -> dict[str, str]:
    """The parameters, all strings, in the JSON that Triton makes of a config.pbtxt."""
    return {name: value.get("string_value", "") for name, value in model_config.get("parameters", {}).items()}
