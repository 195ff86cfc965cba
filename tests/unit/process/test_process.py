"""Real engine processes behind real frontends: shared, killed, restarted, left, and never outliving their server."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.errors import ConfigError
from gptj_triton.process.client import Answer, EngineClient, Failed
from gptj_triton.process.directory import EngineDirectory, server_directory
from gptj_triton.process.messages import ClientRequest, Finished, TokenDelta
from gptj_triton.process.server import NOT_BEGUN, REPORT_INTERVAL
from gptj_triton.triton.cancel_reports import CancelReports
from tests.unit.process.frontends import (
    LONG,
    SHORT,
    Mailbox,
    ReportingClient,
    Server,
    has_ended,
    submit_when_ready,
    wait_until,
)

FRONTEND = """
import sys
from gptj_triton.process.client import EngineClient
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.sampling_params import SamplingParams
frontend = EngineClient(EngineConfig.from_json(sys.argv[1]), int(sys.argv[2]), sys.argv[3], model="z")
for _ in range(int(sys.argv[4])):
    frontend.submit([1, 2], SamplingParams(request_output_len=900, end_ids=(256,), min_length=900), lambda answer: None)
print(frontend.engine_info.engine_pid, flush=True)
sys.stdin.read()
frontend.close()
"""


def files_of(server: Server) -> Path:
    return server_directory(server.pid)


def test_two_frontends_share_one_engine_that_ends_after_the_last_one(
    open_frontend: Callable[..., ReportingClient], mailbox: Mailbox, server: Server
) -> None:
    first, second = open_frontend("first"), open_frontend("second")
    pid = first.engine_info.engine_pid
    assert second.engine_info.engine_pid == pid
    for frontend in (first, second):
        frontend.submit([1, 2, 3], SHORT, mailbox.answers.put)
    assert mailbox.tokens() == mailbox.tokens()

    number = second.submit([1, 2, 3], LONG, mailbox.answers.put)
    first.close()
    second.cancel(number)
    cancelled = mailbox.take()
    assert isinstance(cancelled, Finished)
    assert cancelled.results[0].finish_reason == "cancelled"
    assert len(cancelled.results[0].tokens) < 900
    assert not has_ended(pid), "the engine left while a frontend was there"

    second.submit([1], LONG, mailbox.answers.put)
    second.close()
    gone = mailbox.take()
    assert isinstance(gone, Failed)
    wait_until(lambda: has_ended(pid), "the engine outlived its last frontend")
    assert mailbox.answers.empty()
    assert not files_of(server).exists()


def test_a_streamed_request_gets_its_tokens_as_they_come_at_either_frontend(
    open_frontend: Callable[..., ReportingClient], mailbox: Mailbox
) -> None:
    params = SamplingParams(request_output_len=30, end_ids=(256,), min_length=30, is_return_log_probs=True)
    deltas: dict[str, list[TokenDelta]] = {"first": [], "second": []}
    for name, received in deltas.items():
        open_frontend(name).submit([1, 2, 3], params, mailbox.answers.put, received.append, stream=True)
    for _ in deltas:
        answer = mailbox.take()
        assert isinstance(answer, Finished)
        [result] = answer.results
    for received in deltas.values():
        assert len(received) > 5
        tokens = [token for delta in received for token in delta.tokens]
        assert tokens == result.tokens[: len(tokens)]
        assert [log_prob for delta in received for log_prob in delta.log_probs] == result.log_probs[: len(tokens)]


def test_a_timeout_ends_what_runs_with_what_there_is_and_refuses_what_waits(
    make_checkpoint: Callable[..., Path], open_frontend: Callable[..., ReportingClient], mailbox: Mailbox
) -> None:
    slow = str(make_checkpoint(n_layer=12))
    frontend = open_frontend("only", model_checkpoint_path=slow, kv_cache_gib=0.1, max_sequences=1)
    running: queue.Queue[Answer] = queue.Queue()
    started = time.monotonic()
    frontend.submit([1, 2], LONG, running.put, timeout=1.0)
    frontend.submit([1, 2], LONG, mailbox.answers.put, timeout=0.3)
    waited = mailbox.take()
    assert waited == Failed(NOT_BEGUN, refused="timeout")
    assert time.monotonic() - started >= 0.3
    frontend.submit([1, 2, 3], SHORT, mailbox.answers.put, timeout=100.0)
    assert len(mailbox.tokens()) == 5
    ran = running.get(timeout=60.0)
    assert isinstance(ran, Finished)
    assert ran.results[0].finish_reason == "timeout"
    assert 0 < len(ran.results[0].tokens) < 900
    assert time.monotonic() - started >= 1.0


def test_the_time_that_a_request_waits_for_an_engine_to_take_it_counts(
    open_frontend: Callable[..., ReportingClient], mailbox: Mailbox
) -> None:
    frontend = open_frontend("only")
    os.kill(frontend.engine_info.engine_pid, signal.SIGSTOP)
    frontend.submit([1, 2], SHORT, mailbox.answers.put, timeout=0.5)
    time.sleep(1.0)
    os.kill(frontend.engine_info.engine_pid, signal.SIGCONT)
    assert mailbox.take() == Failed(NOT_BEGUN, refused="timeout")


def test_what_waits_is_bounded_and_a_request_of_several_rows_is_taken_or_refused_as_a_whole(
    make_checkpoint: Callable[..., Path], open_frontend: Callable[..., ReportingClient]
) -> None:
    slow = str(make_checkpoint(n_layer=12))
    limits = {"max_sequences": 1, "max_waiting_requests": 3, "max_waiting_tokens": 4000}
    frontend = open_frontend("only", model_checkpoint_path=slow, kv_cache_gib=0.1, **limits)
    asked: dict[str, list[tuple[int, queue.Queue[Answer]]]] = {}

    def ask(name: str, rows: int) -> None:
        client = ClientRequest(len(asked), rows * 902)
        asked[name] = []
        for _ in range(rows):
            answers: queue.Queue[Answer] = queue.Queue()
            asked[name].append((frontend.submit([1, 2], LONG, answers.put, client=client), answers))

    ask("runs, though larger than what may wait", 6)
    reports = frontend.reports
    wait_until(lambda: reports.total.num_requests_running > 0, "it does not begin", seconds=60)
    ask("tokens", 1)
    refusal = asked["tokens"][0][1].get(timeout=60)
    assert isinstance(refusal, Failed) and refusal.refused == "queue_full"
    assert refusal.message.startswith("too much waits for the engine; please try again later: requests of 4510 tokens ")
    assert refusal.message.endswith("this one has 902, and at most 4000 may wait (max_waiting_tokens)")
    for number, _ in asked["runs, though larger than what may wait"][1:]:
        frontend.cancel(number)
    ask("waits", 2)
    ask("is larger than the room that is left", 3)
    ask("waits, too", 1)
    ask("is the third", 1)
    ask("is the fourth", 2)
    for name in ("is larger than the room that is left", "is the fourth"):
        for _, answers in asked[name]:
            refusal = answers.get(timeout=60)
            assert isinstance(refusal, Failed), name
    assert "3 requests wait, the most that may (max_waiting_requests)" in refusal.message
    for name in ("waits", "waits, too", "is the third"):
        for number, answers in asked[name]:
            frontend.cancel(number)
            assert isinstance(answers.get(timeout=60), Finished), name


def test_a_request_is_cancelled_by_whoever_has_its_handle_and_metrics_are_reported(
    server: Server, open_frontend: Callable[..., ReportingClient], mailbox: Mailbox
) -> None:
    frontend = open_frontend("first")
    reports = frontend.reports
    number = frontend.submit([1, 2], LONG, mailbox.answers.put)
    wait_until(lambda: reports.total.num_requests_running == 1, "no report")
    assert reports.total.kv_cache_used_pages > 0
    cancel_reports = CancelReports(files_of(server))
    assert cancel_reports.send([frontend.cancel_handle(number)]) == set()
    answer = mailbox.take()
    assert isinstance(answer, Finished) and answer.results[0].finish_reason == "cancelled"
    wait_until(lambda: reports.total.num_requests_running == 0, "no report of an idle engine")
    assert reports.total.kv_cache_used_pages == 0
    assert reports.total.generation_tokens_total == len(answer.results[0].tokens)
    cancel_reports.close()


def test_one_frontend_publishes_the_engine_s_metrics_and_the_next_one_when_it_leaves(
    open_frontend: Callable[..., ReportingClient], mailbox: Mailbox
) -> None:
    frontends = {name: open_frontend(name) for name in ("b", "c", "a")}
    everybody = list(frontends.values())

    def publishing() -> set[str]:
        return {name for name, frontend in frontends.items() if frontend.reports.publishes}

    def counted() -> int:
        return sum(frontend.reports.total.generation_tokens_total for frontend in everybody)

    def ask() -> None:
        """Every token of an answer is reported once."""
        before = counted()
        frontends["c"].submit([1, 2], SHORT, mailbox.answers.put)
        new = len(mailbox.tokens())
        wait_until(lambda: counted() >= before + new, "no report")
        time.sleep(2 * REPORT_INTERVAL)
        assert counted() == before + new

    wait_until(lambda: publishing() == {"a"}, "a frontend that publishes")
    ask()
    frontends.pop("a").close()
    wait_until(lambda: publishing() == {"b"}, "another frontend that publishes")
    ask()


def test_a_killed_engine_answers_each_request_once_with_an_error_and_a_new_one_serves(
    open_frontend: Callable[..., ReportingClient], mailbox: Mailbox
) -> None:
    frontends = [open_frontend("first"), open_frontend("second")]
    pid = frontends[0].engine_info.engine_pid
    for frontend in frontends * 8:
        frontend.submit([1, 2], LONG, mailbox.answers.put)
    reports = frontends[0].reports
    wait_until(lambda: reports.total.num_requests_running > 0, "no report")
    os.kill(pid, signal.SIGKILL)
    answers = [mailbox.take() for _ in range(16)]
    assert all(isinstance(answer, Failed) for answer in answers)
    for frontend in frontends:
        submit_when_ready(frontend, mailbox)
    assert mailbox.tokens() == mailbox.tokens()
    assert mailbox.answers.empty(), "a request was answered twice"
    assert reports.total.engine_restarts_total == 1
    assert frontends[0].engine_info.engine_pid == frontends[1].engine_info.engine_pid != pid


def test_a_frontend_that_was_killed_keeps_neither_the_engine_nor_its_requests_alive(
    config: EngineConfig,
    server: Server,
    open_frontend: Callable[..., ReportingClient],
    mailbox: Mailbox,
) -> None:
    command = [sys.executable, "-c", FRONTEND, config.to_json(), str(server.pid), "doomed", "40"]
    environment = os.environ
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe) as doomed:
        assert doomed.stdout is not None
        pid = int(doomed.stdout.readline())
        frontend = open_frontend("other")
        assert frontend.engine_info.engine_pid == pid
        reports = frontend.reports
        wait_until(lambda: reports.total.num_requests_waiting > 0, "no report")
        doomed.kill()
    # What the dead frontend asked for would take the engine most of a minute.
    wait_until(
        lambda: reports.total.num_requests_running == reports.total.num_requests_waiting == 0,
        "the engine works for a frontend that is dead",
        10,
    )
    frontend.submit(
        [1, 2, 3], SamplingParams(request_output_len=50, end_ids=(256,), min_length=50), mailbox.answers.put
    )
    assert len(mailbox.tokens()) == 50
    frontend.close()
    wait_until(lambda: has_ended(pid), "the engine waits for a frontend that is dead")
    assert not files_of(server).exists()


def test_the_engine_ends_when_its_server_is_killed(
    config: EngineConfig, open_frontend: Callable[..., ReportingClient], server: Server, mailbox: Mailbox
) -> None:
    frontend = open_frontend("only")
    pid = frontend.engine_info.engine_pid
    frontend.submit([1], LONG, mailbox.answers.put)
    server.kill()
    server.wait()
    wait_until(lambda: has_ended(pid), "the engine outlived its server")
    mailbox.take()


def test_the_engine_ends_when_its_server_dies_while_weights_load(config: EngineConfig, server: Server) -> None:
    directory = EngineDirectory.of(config, server.pid).path
    EngineDirectory.of(config, server.pid).make()
    os.mkfifo(directory / "config.json")  # reading the checkpoint hangs here
    hanging = EngineConfig(str(directory), device="cpu")
    command = [sys.executable, "-m", "gptj_triton.process.server", "--config", hanging.to_json()]
    command += ["--directory", str(directory), "--server-pid", str(server.pid)]
    command += ["--owner-pid", str(server.pid)]
    with subprocess.Popen(command) as loading:
        wait_until((directory / "engine.sock").exists, "the engine did not come up")
        time.sleep(0.1)
        assert loading.poll() is None
        server.kill()
        server.wait()
        assert loading.wait(30) == 0
    assert not files_of(server).exists()


def test_an_engine_whose_only_frontend_died_while_weights_load_is_there_for_the_next(
    config: EngineConfig,
    server: Server,
    tmp_path: Path,
    open_frontend: Callable[..., ReportingClient],
    mailbox: Mailbox,
) -> None:
    (tmp_path / "model.safetensors").symlink_to(config.checkpoint / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")  # reading the checkpoint hangs here
    hanging = msgspec.structs.replace(config, model_checkpoint_path=str(tmp_path))
    command = [sys.executable, "-c", FRONTEND, hanging.to_json(), str(server.pid), "doomed", "0"]
    with subprocess.Popen(command) as doomed:
        directory = EngineDirectory.of(hanging, server.pid).path
        wait_until((directory / "engine.sock").exists, "the engine did not come up")
        pid = int((directory / "engine.pid").read_text())
        doomed.kill()
    (tmp_path / "config.json").write_text((config.checkpoint / "config.json").read_text())
    frontend = open_frontend("next", model_checkpoint_path=str(tmp_path))
    assert frontend.engine_info.engine_pid == pid
    assert not (directory / "doomed.sock").exists()
    frontend.submit([1, 2, 3], SHORT, mailbox.answers.put)
    assert len(mailbox.tokens()) == 5
    frontend.close()
    wait_until(lambda: has_ended(pid), "the engine outlived its last frontend")
    assert not files_of(server).exists()


def test_a_checkpoint_that_cannot_be_loaded_is_the_reason_a_frontend_is_given(server: Server, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    config = EngineConfig(str(tmp_path), device="cpu", engine_python=sys.executable)
    with pytest.raises(ConfigError, match=r"config\.json: model_type is 'llama', expected 'gptj'"):
        EngineClient(config, server.pid, "only")
    assert not files_of(server).exists()


def test_an_interpreter_that_does_not_exist_is_named(server: Server, make_checkpoint: Callable[..., Path]) -> None:
    config = EngineConfig(str(make_checkpoint(n_layer=1)), device="cpu", engine_python="/nowhere/python3")
    with pytest.raises(ConfigError, match=r"cannot be started with /nowhere/python3: No such file"):
        EngineClient(config, server.pid, "only")
    assert not files_of(server).exists()


def test_a_stub_knows_its_server_by_its_arguments_when_its_parent_is_another() -> None:
    code = "from gptj_triton.triton.stubs import own_server_pid; print(own_server_pid())"
    arguments = [sys.executable, "-c", code, "three", "four", "4242"]  # the stub's fifth names the server
    printed = subprocess.run(arguments, env={}, capture_output=True, check=True).stdout
    assert printed.split() == [b"4242"]
