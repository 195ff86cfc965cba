"""Reads the JSON files of a checkpoint. Knows nothing of their keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptj_triton.errors import ConfigError
from gptj_triton.stand_ins import refuse_stand_in


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ConfigError, which names the file, where there is none."""
    refuse_stand_in(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; a checkpoint needs it") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return raw
