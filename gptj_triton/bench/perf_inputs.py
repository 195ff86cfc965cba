"""The prompts of perf_inputs.json, which every benchmark but the comparison sends. Knows their place and form."""

from __future__ import annotations

import functools
import json
from pathlib import Path

INPUTS = Path(__file__).with_suffix(".json")  # in perf_analyzer's form


@functools.cache
def shipped_prompts() -> list[str]:
    return [entry["text_input"][0] for entry in json.loads(INPUTS.read_text())["data"]]
