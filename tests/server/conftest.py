"""A real server for the tests of this directory: tools/serve.py on free ports, and nothing of it may be left behind.

`server` is one for the whole session; `launch` starts further ones for tests of the launcher itself."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from gptj_triton.api_key import http_header
from gptj_triton.bench import local_server
from gptj_triton.bench.holding.readings import read_metrics

PROJECT = Path(__file__).resolve().parents[2]
MARK = "GPTJ_TEST_LAUNCH"
READY_SECONDS = 100.0
STOP_SECONDS = 60.0
FREE_WITHIN = 2.0  # after a client left: usually 0.2, and what it asked for takes many times as long
SOON_SECONDS = 30.0  # for what takes a moment, on a machine that is busy with something else
CLOSE = {"Connection": "close"}  # a connection left open holds tritonserver up when it is to stop
Ports = tuple[int, int, int]  # HTTP, gRPC, metrics


@dataclass
class Server:
    """One run of serve.py. URLs are HOST:PORT, as tritonclient wants them."""

    folder: Path  # what it printed
    temporary: Path  # its directory for temporary files; short, for a socket's path has 107 bytes at most
    process: subprocess.Popen[bytes]
    ports: Ports
    owns_temporary: bool = True

    @property
    def http_url(self) -> str:
        return f"127.0.0.1:{self.ports[0]}"

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.ports[1]}"

    @property
    def metrics_url(self) -> str:
        return f"127.0.0.1:{self.ports[2]}"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def log(self) -> Path:
        """What it said on stderr."""
        return self.folder / "stderr"

    @property
    def last_line(self) -> str:
        return self.log.read_text(errors="replace").splitlines()[-1]

    @property
    def processes(self) -> list[psutil.Process]:
        """What runs on behalf of this launch, however it is related: the mark in the environment is inherited."""
        mark = str(self.folder)
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def processes_with(self, argument: str) -> list[psutil.Process]:
        """Those of these processes that have an argument which ends so; any may end between listing and looking."""
        found = []
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                if any(each.endswith(argument) for each in process.cmdline()):
                    found.append(process)
        return found

    @property
    def engines(self) -> list[psutil.Process]:
        return self.processes_with("gptj_triton.triton.engine_process")

    @property
    def tritonserver(self) -> psutil.Process | None:
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                if process.name() == "tritonserver":
                    return process
        return None

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = READY_SECONDS) -> None:
        """Fails with the end of the log when the condition stays false, or the launcher ends before it comes true."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                end = "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-20:])
                pytest.fail(f"no {what}; exit status {self.process.poll()}, log ends:\n{end}")
            time.sleep(0.02)

    def wait_until_ready(self) -> Server:
        self.wait_until(lambda: "READY" in self.stdout, "READY")
        assert self.tritonserver is not None
        return self

    def wait_until_loading(self) -> Server:
        self.wait_until(lambda: self.tritonserver, "tritonserver")
        return self

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """The exit status, once it has ended."""
        return self.process.wait(timeout=seconds)

    def stop(self, signal_number: int = signal.SIGINT) -> int:
        """Asks it to stop unless it has ended, waits, and returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.wait()

    def leftovers(self) -> list[str]:
        """Names of all that the launch left behind: processes, shared memory, sockets, temporary files."""
        paths = [*Path("/dev/shm").glob(f"gptj_{self.pid}_*"), *self.temporary.iterdir()]
        return [*map(str, self.processes), *map(str, paths)]

    def close(self) -> None:
        """Stops it, and fails when it does not stop or anything is left behind."""
        try:
            self.stop()
            leftovers = self.leftovers()
        finally:
            self.process.kill()  # where it did not stop in time; its server goes along
            if self.owns_temporary:
                shutil.rmtree(self.temporary)
        assert leftovers == []


def free_ports(count: int) -> list[int]:
    """Free ports that no other worker of pytest-xdist chooses: a server binds to its own seconds later."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    found: list[int] = []
    while len(found) < count:
        (port,) = local_server.free_ports(1)
        if port // 2 % workers == worker and port not in found:  # Linux chooses odd ones
            found.append(port)
    return found


def wait_until(condition: Callable[[], object], what: str, seconds: float = SOON_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.01)


def load(server: Server) -> dict[str, float]:
    """The engine's metrics, and those of its models, which are summed up."""
    found: dict[str, float] = {}
    for (name, _), value in read_metrics(server.metrics_url).items():
        if name.startswith("gptj_"):
            found[name] = found.get(name, 0.0) + value
    return found


def is_idle(server: Server) -> bool:
    now = load(server)
    return not (now["gptj_num_requests_active"] or now["gptj_kv_cache_used_pages"])


def wait_for_sequences(server: Server, count: int) -> None:
    wait_until(lambda: load(server)["gptj_num_requests_running"] == count, f"{count} running sequences")


def start(
    folder: Path,
    *arguments: str,
    ports: Ports | None = None,
    temporary: Path | None = None,
    directory: Path | None = None,
    changes: Mapping[str, str | None] | None = None,
    before: Sequence[str] = (),
    project: Path = PROJECT,
    python: Path = Path(sys.executable),
) -> Server:
    """Starts serve.py with further arguments, on free ports unless some are given, in the working `directory`.

    `changes` of the environment may be None, for a variable that is to be unset; `before` stands before the command.
    """
    owns_temporary = temporary is None
    temporary = temporary or Path(tempfile.mkdtemp(prefix="gptj-test-", dir="/tmp"))
    http, grpc, metrics = ports or free_ports(3)
    command = [*before, str(python), str(project / "tools" / "serve.py")]
    command += [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", *arguments]
    changed = {**os.environ, MARK: str(folder), "TMPDIR": str(temporary), **(changes or {})}
    environment = {name: value for name, value in changed.items() if value is not None}
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command, cwd=directory, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment
        )
    return Server(folder, temporary, process, (http, grpc, metrics), owns_temporary)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> None:
    """A shell has its background jobs ignore Ctrl-C, and programs that such a job starts would go on ignoring it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded model on a real tritonserver; afterwards nothing of it may be left."""
    # An idle connection that some test left open would hold tritonserver up until its exit timeout.
    launched = start(tmp_path_factory.mktemp("server"), "--", "--exit-timeout-secs=5")
    try:
        yield launched.wait_until_ready()
    finally:
        launched.close()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers as `start` does; they are stopped after the test, and nothing of them may be left."""
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:

        def launch_one(*arguments: str | Path, **keywords: object) -> Server:
            folder = tmp_path / f"launch{next(numbers)}"
            folder.mkdir()
            launched = start(folder, *map(str, arguments), **keywords)  # type: ignore[arg-type]
            stack.callback(launched.close)
            return launched

        yield launch_one


@pytest.fixture
def admin_key(tmp_path: Path) -> tuple[str, dict[str, str]]:
    """An option that opens Triton's administrative APIs, and the headers that a request to them brings then."""
    key = secrets.token_hex(16)
    file = tmp_path / "admin-key"
    file.touch(mode=0o600)
    file.write_text(key)
    return f"--open-admin-api={file}", {**CLOSE, **http_header(key)}


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short directory, for the test's own directories of temporary files."""
    with tempfile.TemporaryDirectory(prefix="gptj-test-", dir="/tmp") as folder:
        yield Path(folder)
