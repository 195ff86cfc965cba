"""How every benchmark gives its result: one JSON object with a list of measurements, printed as the last line or
written to a file, and as CSV. Knows nothing of what was measured."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def make_result(benchmark: str, measurements: Sequence[Any], **facts: Any) -> Result:
    """`measurements` are instances of one dataclass; `facts` hold for all of them."""
    return {"benchmark": benchmark, **facts, "measurements": [dataclasses.asdict(each) for each in measurements]}


def write_json(result: Result, path: Path) -> None:
    """Writes `result`, for readers too. The directory is made where it is absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def write_csv(result: Result, path: Path) -> None:
    """Writes a line for each measurement below a line of names; there is one at least."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(result["measurements"][0]))
        writer.writeheader()
        writer.writerows(result["measurements"])
