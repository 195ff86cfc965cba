"""An engine of a launcher outlives its server, and serves the next one's frontends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptj_triton.engine.config import EngineConfig
from gptj_triton.errors import ConfigError
from gptj_triton.process.client import EngineClient
from gptj_triton.process.directory import EngineDirectory
from tests.unit.process.frontends import LONG, SHORT, Mailbox, Reports, Server, has_ended, wait_until
from tests.unit.process.test_process import FRONTEND


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A process that is taken for a launcher, whose directory is `tmp_path`."""
    with subprocess.Popen(["sleep", "600"]) as process:
        (tmp_path / "launcher.pid").write_text(str(process.pid))
        monkeypatch.setenv("GPTJ_TRITON_RUN", str(tmp_path))
        yield process
        process.kill()


@pytest.mark.usefixtures("launcher")
def test_a_killed_servers_requests_are_cancelled_and_the_next_ones_frontend_meets_the_same_engine(
    config: EngineConfig, server: Server, open_frontend: Callable[..., EngineClient], mailbox: Mailbox, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", FRONTEND, config.to_json(), str(server.pid), "old", "40"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as old:
        assert old.stdout is not None
        engine = int(old.stdout.readline())
        server.kill()
        server.wait()
        time.sleep(1)
        assert not has_ended(engine), "the engine ended with the server"
        old.kill()
    wait_until(lambda: not (EngineDirectory.of(config, server.pid).path / "old.sock").exists(), "a dead one's files")
    with subprocess.Popen(["sleep", "600"]) as next_server:
        frontend = open_frontend("new", server_pid=next_server.pid)
        assert frontend.engine_info.engine_pid == engine
        reports = Reports(frontend)
        wait_until(lambda: reports.last.kv_cache_pages, "no report")
        assert reports.last.running_sequences == reports.last.waiting_sequences == 0
        frontend.submit([1, 2, 3], SHORT, mailbox.answers.put)
        assert len(mailbox.tokens()) == 5
        assert EngineDirectory.of(config, server.pid).path.parent == tmp_path / "engines"
        frontend.close()
        wait_until(lambda: has_ended(engine), "the engine outlived its last frontend's goodbye")
        assert not (tmp_path / "engines").exists()
        next_server.kill()


def test_an_engine_ends_when_its_launcher_and_the_server_have(
    launcher: Server, server: Server, open_frontend: Callable[..., EngineClient], mailbox: Mailbox
) -> None:
    frontend = open_frontend("only")
    engine = frontend.engine_info.engine_pid
    launcher.kill()
    launcher.wait()
    time.sleep(1)
    frontend.submit([1, 2, 3], SHORT, mailbox.answers.put)  # the server is about to end, and finishes what it has
    assert len(mailbox.tokens()) == 5
    frontend.submit([1], LONG, mailbox.answers.put)
    server.kill()
    server.wait()
    wait_until(lambda: has_ended(engine), "the engine outlived launcher and server")
    mailbox.take()


@pytest.mark.parametrize("given", ["", "no number"])
def test_a_run_that_no_launcher_made_is_named(
    config: EngineConfig, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("GPTJ_TRITON_RUN", str(tmp_path))
    if given:
        (tmp_path / "launcher.pid").write_text(given)
    with pytest.raises(ConfigError, match=r"environment variable GPTJ_TRITON_RUN is '.*', which no launcher made"):
        EngineClient(config, server.pid, "only")


def test_an_engine_of_other_settings_is_another_and_each_ends_with_its_own_frontends(
    open_frontend: Callable[..., EngineClient], mailbox: Mailbox
) -> None:
    first, stays = open_frontend("first"), open_frontend("stays")
    first.close()
    changed = open_frontend("first", step_tokens=8)
    old, new = stays.engine_info.engine_pid, changed.engine_info.engine_pid
    assert old != new
    for frontend in (stays, changed):
        frontend.submit([1, 2, 3], SHORT, mailbox.answers.put)
    assert mailbox.tokens() == mailbox.tokens()
    changed.close()
    wait_until(lambda: has_ended(new), "the engine outlived its last frontend")
    assert not has_ended(old)


def test_everything_belongs_to_this_user_alone_whatever_the_umask(
    config: EngineConfig, server: Server, open_frontend: Callable[..., EngineClient]
) -> None:
    before = os.umask(0)
    try:
        open_frontend("only")
        directory = EngineDirectory.of(config, server.pid).path
        for path in (directory.parent, directory, *directory.iterdir()):
            assert path.is_symlink() or path.stat().st_mode & 0o077 == 0, path
    finally:
        os.umask(before)
