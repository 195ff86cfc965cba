"""What benchmarks share: streams are read as they are cut, percentiles, results as JSON and CSV, memory."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from gptj_triton.bench.machine import resident_mib, tree
from gptj_triton.bench.percentiles import percentiles
from gptj_triton.bench.results import make_result, write_csv, write_json
from gptj_triton.bench.streams import Stream, StreamFailedError
from gptj_triton.client.events import EventReader

EVENTS = 'data: {"text_output": "a\\n", "sequence_length": 5}\n\ndata: {"text_output": "é", "sequence_length": 7}\n\n'


@dataclass(frozen=True)
class Measurement:
    name: str
    value: float


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_are_read_however_they_are_cut(size: int) -> None:
    data, reader = EVENTS.encode(), EventReader()
    chunks = [data[begin : begin + size] for begin in range(0, len(data), size)]
    found = [event for chunk in chunks for event in reader.feed(chunk)]
    assert [event["text_output"] for event in found] == ["a\n", "é"]


def test_what_is_no_event_of_json_is_an_error() -> None:
    for wrong in (b"<html>\n\n", b"data: {\n\n"):
        with pytest.raises(ValueError, match="not an event"):
            EventReader().feed(wrong)


def test_a_stream_knows_when_each_piece_came_and_its_tokens() -> None:
    data = EVENTS.encode()
    assert Stream(0.0, [(1.0, data[:60]), (2.0, data[60:])]).arrivals(max_tokens=3) == [(1.0, 1), (2.0, 2)]


@pytest.mark.parametrize("data", [b"", b'data: {"error": "no"}\n\n'])
def test_a_stream_that_failed_is_an_error(data: bytes) -> None:
    with pytest.raises(StreamFailedError):
        Stream(0.0, [(1.0, data)]).arrivals(max_tokens=3)


def test_percentiles_are_in_milliseconds() -> None:
    assert percentiles([0.001 * i for i in range(101)]) == pytest.approx((50.0, 90.0, 99.0))
    assert percentiles([]) == (0.0, 0.0, 0.0)


def test_a_result_is_one_object_and_one_table(tmp_path: Path) -> None:
    result = make_result("something", [Measurement("a", 1.5), Measurement("b", 2.0)], machine="a machine")
    assert list(result) == ["benchmark", "machine", "measurements"]
    write_json(result, tmp_path / "new" / "result.json")
    write_csv(result, tmp_path / "new" / "result.csv")
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == result
    with (tmp_path / "new" / "result.csv").open() as table:
        assert list(csv.DictReader(table)) == [{"name": "a", "value": "1.5"}, {"name": "b", "value": "2.0"}]


def test_memory_that_processes_share_counts_once() -> None:
    """A child of fork shares all that it does not write."""
    script = (
        "import os, time; big = bytes(range(256)) * (1 << 18)\n"  # 64 MiB
        "child = os.fork(); print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == [b"\n", b"\n"]
        processes = tree(process.pid)
        assert len(processes) == 2
        assert 64 < resident_mib(processes) < 100
        assert sum(psutil.Process(each.pid).memory_info().rss for each in processes) > 128 << 20
    finally:
        for each in tree(process.pid)[::-1]:
            each.kill()
        process.communicate()


def test_memory_of_this_process_is_there() -> None:
    assert resident_mib([psutil.Process(os.getpid())]) > 10
