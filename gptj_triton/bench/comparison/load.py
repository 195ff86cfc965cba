"""Drives a JSON service with Triton's perf_analyzer and reads what came of each request.

perf_analyzer's OpenAI client sends any JSON to any path and notes when each part of an answer came, server-sent events
included; nothing else of OpenAI's protocol is used. Knows nothing of how the services work.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_triton.bench.perf_analyzer import PerfAnalyzer, PerfError
from gptj_triton.client.events import EventReader


@dataclass(frozen=True)
class Exchange:
    """A request and its answer. Times are seconds of one clock."""

    prompt: str
    text: str
    sent: float
    first: float  # when the first part of the answer came: all of it, unless it is streamed
    last: float


def drive(
    analyzer: PerfAnalyzer, url: str, bodies: Sequence[dict[str, Any]], clients: int, timeout: float
) -> list[Exchange]:
    """Sends each of `bodies` once to `url`, `http://HOST:PORT/PATH`, never more than `clients` at a time.

    Raises PerfError when one fails, or all take longer than `timeout` seconds."""
    host, _, path = url.removeprefix("http://").partition("/")
    with tempfile.TemporaryDirectory() as folder:
        inputs, report = Path(folder, "inputs.json"), Path(folder, "report.json")
        inputs.write_text(json.dumps({"data": [{"payload": [body]} for body in bodies]}))
        service = ["--service-kind=openai", f"--endpoint={path}", "-u", f"http://{host}", "-m", "any"]
        load = ["--async", f"--input-data={inputs}", f"--request-count={len(bodies)}"]
        load += [f"--concurrency-range={clients}", f"--profile-export-file={report}"]
        analyzer.run([*service, *load], timeout)
        exchanges = read_report(report.read_text())
    missing = {body["text_input"] for body in bodies} - {exchange.prompt for exchange in exchanges}
    if missing or len(exchanges) != len(bodies):
        raise PerfError(f"{url}: {len(exchanges)} answers to {len(bodies)} requests, {len(missing)} prompts unanswered")
    return exchanges


def read_report(report: str) -> list[Exchange]:
    """What perf_analyzer exports as JSON. Raises PerfError for an answer that is an error."""
    exchanges = []
    for request in json.loads(report)["experiments"][0]["requests"]:
        arrivals = [arrived / 1e9 for arrived in request["response_timestamps"]]
        body = json.loads(request["request_inputs"]["payload"])
        text = read_text("".join(output["response"] for output in request["response_outputs"]))
        exchanges.append(Exchange(body["text_input"], text, request["timestamp"] / 1e9, arrivals[0], arrivals[-1]))
    return exchanges


def read_text(answer: str) -> str:
    """The text of an answer, one JSON object or several as server-sent events."""
    streamed = answer.startswith("data:")
    parts = EventReader().feed(answer.encode()) if streamed else [json.loads(answer)] if answer else []
    errors = [part for part in parts if "text_output" not in part]
    if errors or not parts:
        raise PerfError(f"an answer without a text: {errors[0] if errors else 'nothing'}")
    return "".join(part["text_output"] for part in parts)
