# /// script
# dependencies = ["tritonclient==2.51.0"]
# ///
"""perf_analyzer, in the last release of tritonclient that carries it: HTTP, gRPC, and gRPC's streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asked import DECOUPLED, end, measure, read_arguments

ARGUMENTS = read_arguments()
INPUTS = Path(__file__).resolve().parents[2] / "gptj_triton" / "bench" / "perf_inputs.json"
INFER = DECOUPLED if ARGUMENTS.model == ARGUMENTS.streaming_model else {}


def command(model: str, protocol: str, url: str, *options: str) -> list[str]:
    made = ["perf_analyzer", "-m", model, "-i", protocol, "-u", url, f"--input-data={INPUTS}", "--request-count=4"]
    return [*made, "--profile-export-file=report.json", *options]


def requests(report: Any) -> int:
    return sum(len(each["requests"]) for each in report["experiments"])


measure("`-i http`", command(ARGUMENTS.model, "http", ARGUMENTS.http), "report.json", requests, **INFER)
measure("`-i grpc`", command(ARGUMENTS.model, "grpc", ARGUMENTS.grpc), "report.json", requests, **INFER)
streaming = command(ARGUMENTS.streaming_model, "grpc", ARGUMENTS.grpc, "--streaming", "--async")
measure("`-i grpc --streaming`", streaming, "report.json", requests)
end()
