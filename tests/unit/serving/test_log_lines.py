"""Lines of a server's processes as records: who wrote them, and which belong together."""

from __future__ import annotations

import json

from gptj_triton.serving.log_lines import Record, RecordReader

TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "/a/b.py", line 1, in <module>',
    "    raise ValueError(1)",
    "ValueError: 1",
]


def records(*lines: str) -> list[Record]:
    reader = RecordReader()
    return [record for line in lines for record in reader.feed(line)] + list(reader.flush())


def test_a_line_says_who_wrote_it_and_about_which_request() -> None:
    assert records(
        'I1126 17:42:28.016530 28900 http_server.cc:4713] "Started \\"HTTP\\"\\nat 1"',
        'E1126 17:42:28.016530 28900 infer.cc:1] "[request id: <id_unknown>] no"',
        "W1126 17:42:28.016530 28900 old.cc:1] without quotes",
        'I1126 17:42:28.016530 28900 log.py:31] "[request id: a b\\\\n] preprocessing: refused: top_p is 2"',
        'E1126 17:42:28.016530 28900 log.py:31] "fastertransformer: the engine ended"',
        'E1126 17:42:28.016530 28900 model.py:31] "a model of the user\'s own"',
        "2026-11-26 17:42:28,016 gptj_triton WARNING slow",
        "Error: Failed to initialize NVML",
    ) == [
        Record("info", "tritonserver", 'Started "HTTP"\nat 1'),
        Record("error", "tritonserver", "no"),
        Record("warning", "tritonserver", "without quotes"),
        Record("info", "preprocessing", "refused: top_p is 2", "a b\\n"),
        Record("error", "fastertransformer", "the engine ended"),
        Record("error", "stub", "a model of the user's own"),
        Record("warning", "engine", "slow"),
        Record("info", "other", "Error: Failed to initialize NVML"),
    ]


def test_a_table_is_one_record() -> None:
    lines = ["I1126 17:42:28.016530 28900 server.cc:1] ", "+---+", "| a |", "+---+", ""]
    [table, after] = records(*lines, "another line")
    assert json.loads(table.as_json())["message"] == "+---+\n| a |\n+---+"
    assert after.message == "another line"


def test_a_traceback_is_one_error_also_where_another_process_writes_into_it() -> None:
    header = "2026-11-26 17:42:28,016 gptj_triton INFO loaded"
    assert records(TRACEBACK[0], TRACEBACK[1], header, *TRACEBACK[2:], "after") == [
        Record("info", "engine", "loaded"),
        Record("error", "other", "\n".join(TRACEBACK)),
        Record("info", "other", "after"),
    ]


def test_tracebacks_that_follow_from_each_other_are_one_record() -> None:
    between = ["", "During handling of the above exception, another exception occurred:", ""]
    chain = [*TRACEBACK, *between, *TRACEBACK]
    assert records(*chain) == [Record("error", "other", "\n".join(chain))]


def test_a_traceback_of_the_engines_logging_belongs_to_its_line() -> None:
    line = "2026-11-26 17:42:28,016 gptj_triton ERROR a step failed"
    assert records(line, *TRACEBACK, line) == [
        Record("error", "engine", "\n".join(["a step failed", *TRACEBACK])),
        Record("error", "engine", "a step failed"),
    ]


def test_a_record_is_one_line_of_json_with_a_time_and_an_id_only_where_there_is_one() -> None:
    plain, about = Record("info", "x", "a\nb\n"), Record("info", "x", "é", "7")
    assert "\n" not in plain.as_json() + about.as_json()
    assert set(json.loads(plain.as_json())) == {"time", "level", "source", "message"}
    assert json.loads(about.as_json())["request_id"] == "7"
    assert json.loads(plain.as_json())["time"].endswith("Z")
