"""A kind of replica in a file: what `benchmark_gpu.py --json` wrote of a GPU, or `capacity.py --calibrate` of a CPU."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_triton.bench.capacity.replica import Settings
from gptj_triton.bench.capacity.step_times import FEATURES, FittedTimes, StepTimes, TableTimes
from gptj_triton.bench.random_checkpoint import GPTJ_6B
from gptj_triton.bench.results import Result
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.kv_cache import PAGE_SIZE

GPU_OWN_SECONDS = 0.003  # of a request outside the engine, as benchmark_concurrency.py measures it on two cores


@dataclass(frozen=True)
class ReplicaKind:
    """`result` is what the file holds."""

    times: StepTimes
    settings: Settings
    machine: str
    result: Result


def read(path: Path, changed: dict[str, int], own_seconds: float | None) -> ReplicaKind:
    """`changed` are fields of Settings that the file's, or the engine's own, are replaced by. ValueError names the
    file and what it lacks, OSError the file.
    """
    try:
        result = json.loads(path.read_text())
        kind = result.get("benchmark") if isinstance(result, dict) else None
        if kind == "gpu":
            times: StepTimes = TableTimes(result)
            settings = _gpu_settings(result, changed)
        elif kind == "steps":
            times = _fitted(result)
            settings = Settings(**result["settings"])
        else:
            raise ValueError(f"benchmark is {kind!r}, expected 'gpu' (benchmark_gpu.py) or 'steps' (--calibrate)")
    except (ValueError, KeyError, TypeError) as error:
        words = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {words}") from None
    if own_seconds is not None:
        settings = dataclasses.replace(settings, own_seconds=own_seconds)
    return ReplicaKind(times, dataclasses.replace(settings, **changed), result["machine"], result)


def written(times: FittedTimes, settings: Settings) -> dict[str, Any]:
    """The facts of a calibration that `read` reads."""
    return {
        "settings": dataclasses.asdict(settings),
        "coefficients": dict(zip(FEATURES, times.coefficients, strict=True)),
        "ratios": times.ratios,
        "error": times.error,
        "points": times.points,
    }


def _fitted(result: Result) -> FittedTimes:
    coefficients = [float(result["coefficients"][name]) for name in FEATURES]
    return FittedTimes(coefficients, result["ratios"], result["error"], result["points"])


def _gpu_settings(result: Result, changed: dict[str, int]) -> Settings:
    if "kv_cache_tokens" not in result and "num_pages" not in changed:
        raise ValueError("kv_cache_tokens is missing, and option --kv-cache-tokens is not given")
    config = EngineConfig("").for_device(is_gpu=True)
    return Settings(
        num_pages=result.get("kv_cache_tokens", 0) // PAGE_SIZE,
        page_size=PAGE_SIZE,
        context_length=GPTJ_6B.context_length,
        step_tokens=config.step_tokens,
        max_sequences=config.max_sequences,
        max_waiting_requests=config.max_waiting_requests,
        max_waiting_tokens=config.max_waiting_tokens,
        steps_ahead=1,
        own_seconds=GPU_OWN_SECONDS,
    )
