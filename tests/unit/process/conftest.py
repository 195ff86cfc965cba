"""Frontends of a server that is none, and their engine processes."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from gptj_triton.engine.config import EngineConfig
from gptj_triton.process.client import EngineClient
from gptj_triton.process.directory import server_directory
from tests.unit.process.frontends import Mailbox, Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A frontend does not wait for the engine that it started: it may have to leave it to other frontends."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"))


@pytest.fixture
def config(make_checkpoint: Callable[..., Path]) -> EngineConfig:
    checkpoint = make_checkpoint(n_layer=1)
    return EngineConfig(str(checkpoint), device="cpu", engine_python=sys.executable, kv_cache_gib=0.01)


@pytest.fixture(autouse=True)
def _one_thread_in_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def server() -> Iterator[Server]:
    """A process that the engine takes for its server."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()
    shutil.rmtree(server_directory(process.pid), ignore_errors=True)


@pytest.fixture
def open_frontend(config: EngineConfig, server: Server) -> Iterator[Callable[..., EngineClient]]:
    """Opens frontends of this process to the engine of `config`, changed by keywords; all are closed at the end."""
    with contextlib.ExitStack() as stack:

        def open_one(name: str, server_pid: int = server.pid, **changes: Any) -> EngineClient:
            frontend = EngineClient(msgspec.structs.replace(config, **changes), server_pid, name)
            stack.callback(frontend.close)
            return frontend

        yield open_one
        stack.close()
        engines = [child for child in psutil.Process().children() if "sleep" not in child.name()]
        psutil.wait_procs(engines, timeout=30)


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox()
