"""The percentiles that all benchmarks give."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PERCENTILES = (50, 90, 99)
Times = tuple[float, float, float]  # PERCENTILES, in milliseconds


def percentiles(seconds: Sequence[float]) -> Times:
    """PERCENTILES of `seconds` in milliseconds; zeros where there are none."""
    p50, p90, p99 = 1000 * np.percentile(seconds or [0.0], PERCENTILES)
    return float(p50), float(p90), float(p99)
