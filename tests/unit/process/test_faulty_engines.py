"""Engines that stand still, hang, cannot start or die under one request; and one that is drained."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import zmq

from gptj_triton.bench.fake_server import FAKE_ENGINE
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.sampling_params import SamplingParams
from gptj_triton.errors import RequestRefusedError, UnavailableError
from gptj_triton.process import heartbeat
from gptj_triton.process.client import Failed
from gptj_triton.process.directory import EngineDirectory
from gptj_triton.process.heartbeat import SILENT_SECONDS, TICK_SECONDS, Heartbeat, HeartbeatWatch
from gptj_triton.process.messages import Drain, Finished, ToEngine
from gptj_triton.process.start import Attempts, EngineStarter, TooEarlyError
from gptj_triton.project import EMBEDDED_MODEL
from tests.unit.process.frontends import LONG, SHORT, Mailbox, ReportingClient, Server, submit_when_ready, wait_until


def push(directory: EngineDirectory, *messages: ToEngine) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(directory.engine_address)
        for message in messages:
            socket.send(msgspec.msgpack.encode(message))


def test_a_stopped_engine_answers_each_request_once_with_an_error_and_a_new_one_serves(
    config: EngineConfig, server: Server, open_frontend: Callable[..., ReportingClient], mailbox: Mailbox
) -> None:
    frontends = [open_frontend("first"), open_frontend("second")]
    ready = EngineDirectory.of(config, server.pid).ready_file("first")
    assert ready.exists()
    engine = frontends[0].engine_info.engine_pid
    os.kill(engine, signal.SIGSTOP)
    for frontend in frontends * 4:
        frontend.submit([1, 2], LONG, mailbox.answers.put)
    stopped = time.monotonic()
    answers = [mailbox.take() for _ in range(8)]
    assert time.monotonic() - stopped < SILENT_SECONDS + 2
    assert all(isinstance(answer, Failed) for answer in answers)
    assert not ready.exists()
    for frontend in frontends:
        submit_when_ready(frontend, mailbox)
    assert mailbox.tokens() == mailbox.tokens()
    assert mailbox.answers.empty()
    assert ready.exists()
    assert frontends[0].engine_info.engine_pid == frontends[1].engine_info.engine_pid != engine
    reports = frontends[0].reports
    wait_until(lambda: reports.total.kv_cache_pages, "no report")
    assert (reports.total.engine_restarts_total, reports.total.engine_hangs_total) == (1, 1)


def test_a_watch_tells_silence_and_a_step_that_hangs_from_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beating = Heartbeat(tmp_path / "heartbeat")
    watch = HeartbeatWatch(tmp_path / "heartbeat", step_timeout=2 * TICK_SECONDS)
    patient = HeartbeatWatch(tmp_path / "heartbeat", step_timeout=0.0)

    def look(times: int) -> tuple[str | None, str | None]:
        for _ in range(times):
            time.sleep(0.25)
            found = watch.look(), patient.look()
        return found

    assert look(4) == (None, None)
    for _ in range(4):
        beating.begin_step()
        assert look(1) == (None, None)
    said, nothing = look(3)
    assert said == "a step takes longer than 0.5 s (parameter step_timeout)" and nothing is None
    beating.rest()
    assert look(3) == (None, None)
    monkeypatch.setattr(time, "sleep", lambda seconds: signal.pause())  # of the thread that beats
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        pass
    looks = [patient.look() for _ in range(round(SILENT_SECONDS / TICK_SECONDS) + 1)]
    assert looks[-1] == "no sign of life for 3 s" and looks[0] is None


def test_a_step_that_hangs_ends_the_engine(
    tmp_path: Path, server: Server, open_frontend: Callable[..., ReportingClient], mailbox: Mailbox
) -> None:
    slow = tmp_path / "python"  # runs an engine whose second step takes long
    slow.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE_ENGINE} --step-ms 60000 "$@"\n')
    slow.chmod(0o700)
    model = str(EMBEDDED_MODEL)
    frontend = open_frontend("only", model_checkpoint_path=model, engine_python=str(slow), step_timeout=1.0)
    began = time.monotonic()
    frontend.submit([1, 2], SHORT, mailbox.answers.put)
    assert isinstance(mailbox.take(), Failed)
    assert 1 <= time.monotonic() - began < 5
    wait_until(lambda: frontend.reports.total.engine_hangs_total == 1, "no report")


def test_an_engine_that_is_stopped_when_a_frontend_joins_is_ended(
    open_frontend: Callable[..., ReportingClient], mailbox: Mailbox
) -> None:
    first = open_frontend("first")
    engine = first.engine_info.engine_pid
    first.submit([1, 2, 3], SHORT, mailbox.answers.put)
    mailbox.tokens()
    os.kill(engine, signal.SIGSTOP)
    first.close()
    joined = time.monotonic()
    second = open_frontend("second")
    assert time.monotonic() - joined < 30
    assert second.engine_info.engine_pid != engine


def test_an_engine_that_is_stopped_while_it_loads_is_ended_too(
    config: EngineConfig, server: Server, open_frontend: Callable[..., ReportingClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "SILENT_LOADING_SECONDS", 1.0)
    directory = EngineDirectory.of(config, server.pid)

    file = config.checkpoint / "config.json"
    kept = file.rename(file.with_name("kept"))
    os.mkfifo(file)  # reading the checkpoint hangs here

    def stop_and_mend() -> None:
        wait_until(lambda: os.path.lexists(directory.heartbeat), "no heartbeat")
        os.kill(int(directory.pid_file.read_text()), signal.SIGSTOP)
        kept.rename(file)

    thread = threading.Thread(target=stop_and_mend)
    thread.start()
    open_frontend("only")
    thread.join()


def test_an_engine_whose_checkpoint_is_away_for_a_while_comes_back(
    config: EngineConfig, server: Server, open_frontend: Callable[..., ReportingClient], mailbox: Mailbox
) -> None:
    frontends = [open_frontend("first"), open_frontend("second")]
    away = config.checkpoint.with_name("away")
    config.checkpoint.rename(away)
    os.kill(frontends[0].engine_info.engine_pid, signal.SIGKILL)
    attempts = EngineDirectory.of(config, server.pid).attempts_file
    wait_until(lambda: attempts.exists() and json.loads(attempts.read_text())["count"] >= 3, "third attempt", 60)
    for frontend in frontends:
        with pytest.raises(UnavailableError) as refused:
            frontend.submit([1, 2, 3], SHORT, mailbox.answers.put)
        assert "/" not in str(refused.value)
    away.rename(config.checkpoint)
    for frontend in frontends:
        submit_when_ready(frontend, mailbox)
    assert mailbox.tokens() == mailbox.tokens()
    assert not attempts.exists()


def test_attempts_become_rarer_and_all_frontends_count_together(tmp_path: Path, server: Server) -> None:
    config = EngineConfig(str(tmp_path), engine_python="false")
    directory = EngineDirectory.of(config, server.pid)
    starters = [EngineStarter(config, directory, server.pid, "module") for _ in range(2)]
    started: list[float] = []
    deadline = time.monotonic() + 4.5
    while time.monotonic() < deadline:
        for starter in starters:
            with contextlib.suppress(TooEarlyError):
                os.close(starter.find_or_start())
                started.append(time.monotonic())
                time.sleep(0.05)
    pauses = [later - earlier for earlier, later in itertools.pairwise(started)]
    assert len(pauses) == 3
    assert all(pause >= least for pause, least in zip(pauses, (0.5, 1.0, 2.0), strict=True))


def test_attempts_before_the_machine_was_started_again_hold_up_nothing(tmp_path: Path, server: Server) -> None:
    config = EngineConfig(str(tmp_path), engine_python="false")
    directory = EngineDirectory.of(config, server.pid)
    directory.make()
    directory.attempts_file.write_bytes(msgspec.json.encode(Attempts(3, time.monotonic() + 1e6)))
    os.close(EngineStarter(config, directory, server.pid, "module").find_or_start())


def test_a_request_under_which_the_engine_died_twice_is_refused_and_others_are_not(
    open_frontend: Callable[..., ReportingClient], mailbox: Mailbox
) -> None:
    frontend = open_frontend("only")
    harmless = SamplingParams(request_output_len=6, end_ids=(256,), min_length=6)
    for _ in range(2):
        submit_when_ready(frontend, mailbox)
        mailbox.tokens()
        os.kill(frontend.engine_info.engine_pid, signal.SIGSTOP)
        for prompt, params in (([7, 7], LONG), ([7, 7], LONG), ([8], harmless)):
            frontend.submit(prompt, params, mailbox.answers.put)
        os.kill(frontend.engine_info.engine_pid, signal.SIGKILL)
        assert all(isinstance(mailbox.take(), Failed) for _ in range(3))
        submit_when_ready(frontend, mailbox)
        mailbox.tokens()
        if _ == 0:  # a success clears its count
            frontend.submit([8], harmless, mailbox.answers.put)
            assert len(mailbox.tokens()) == 6
    with pytest.raises(RequestRefusedError, match=r"ended unexpectedly 2 times .*\(parameter refuse_after_deaths\)"):
        frontend.submit([7, 7], LONG, mailbox.answers.put)
    frontend.submit([8], harmless, mailbox.answers.put)
    assert len(mailbox.tokens()) == 6
    number = frontend.submit([7, 6], LONG, mailbox.answers.put)
    frontend.cancel(number)
    assert isinstance(mailbox.take(), Finished)


def test_a_drained_engine_finishes_what_it_can_and_cuts_the_rest_once(
    make_checkpoint: Callable[..., Path],
    config: EngineConfig,
    server: Server,
    open_frontend: Callable[..., ReportingClient],
) -> None:
    slow = msgspec.structs.replace(
        config, model_checkpoint_path=str(make_checkpoint(n_layer=12)), kv_cache_gib=0.1, max_sequences=2
    )
    changes = {"model_checkpoint_path": slow.model_checkpoint_path, "kv_cache_gib": 0.1, "max_sequences": 2}
    frontends = [open_frontend("first", **changes), open_frontend("second", **changes)]
    directory = EngineDirectory.of(slow, server.pid)
    first, others = Mailbox(), Mailbox()
    frontends[0].submit([1, 2, 3], LONG, first.answers.put)
    for frontend in frontends * 2:  # three of them wait
        frontend.submit([1, 2], LONG, others.answers.put)
    wait_until(lambda: any(each.reports.total.num_requests_active == 5 for each in frontends), "no report")
    push(directory, Drain(100.0))
    wait_until(lambda: not directory.ready_file("first").exists(), "the frontend does not know")
    for frontend in frontends:
        with pytest.raises(UnavailableError, match="the server is shutting down"):
            frontend.submit([1], SHORT, others.answers.put)
    assert len(first.tokens()) == 900
    push(directory, Drain(200.0), Drain(0.0))
    cut = [answer for answer in [others.take() for _ in range(4)] if answer == Failed("the server is shutting down")]
    assert len(cut) >= 2  # those that waited
    wait_until(directory.drained_file.exists, "no word of the end")
    assert json.loads(directory.drained_file.read_text()) == {"cut": len(cut)}
    with pytest.raises(queue.Empty):
        others.answers.get(timeout=0.3)


def test_draining_an_idle_engine_is_done_at_once(
    config: EngineConfig, server: Server, open_frontend: Callable[..., ReportingClient]
) -> None:
    open_frontend("only")
    directory = EngineDirectory.of(config, server.pid)
    push(directory, Drain(600.0))
    wait_until(directory.drained_file.exists, "no word of the end", 5)
    assert json.loads(directory.drained_file.read_text()) == {"cut": 0}


def test_nothing_but_messages_is_taken_for_one(
    config: EngineConfig, server: Server, open_frontend: Callable[..., ReportingClient], mailbox: Mailbox
) -> None:
    frontend = open_frontend("only")
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(EngineDirectory.of(config, server.pid).engine_address)
        for message in (b"", b"\xff" * 100, msgspec.msgpack.encode({"type": "hello"})):
            socket.send(message)
        frontend.submit([1, 2, 3], SHORT, mailbox.answers.put)
        assert len(mailbox.tokens()) == 5


def test_an_engine_that_works_has_counted_nothing_before(open_frontend: Callable[..., ReportingClient]) -> None:
    reports = open_frontend("only").reports
    wait_until(lambda: reports.total.kv_cache_pages, "no report")
    assert (reports.total.generation_tokens_total, reports.total.kv_cache_used_pages) == (0, 0)
