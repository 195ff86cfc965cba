"""The health check of the image, against servers that answer in each way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gptj_triton.client import health

ANSWER = '{"text_output": "a", "finish_reason": "length", "sequence_length": 1}'
FULL = '{"error": "in ensemble \'ensemble\', UNAVAILABLE: full; send it again in a moment"}'
Start = Callable[[int, str, int], str]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a server that answers a request with a status and a body, and `ready` with a status; its HOST:PORT."""
    servers = list[ThreadingHTTPServer]()

    def start_one(status: int, body: str, ready: int) -> str:
        class Handler(BaseHTTPRequestHandler):
            def answer(self, status: int, body: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def do_GET(self) -> None:
                self.answer(ready, "")

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(status, body)

            def log_request(self, code: object = "-", size: object = "-") -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"127.0.0.1:{servers[-1].server_port}"

    yield start_one
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "ready", "exit_status"),
    [(200, ANSWER, 200, 0), (400, FULL, 200, 0), (400, FULL, 400, 1), (500, '{"error": "broken"}', 200, 1)],
    ids=["answers", "full", "down", "broken"],
)
def test_the_exit_status_says_whether_it_serves(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
    body: str,
    ready: int,
    exit_status: int,
) -> None:
    monkeypatch.setattr(health, "PAUSE_SECONDS", 0.0)
    assert health.main(["--url", start(status, body, ready)]) == exit_status
    assert capsys.readouterr().err.count("\n") == exit_status


def test_a_key_file_is_the_given_one_then_the_environments_then_the_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / name for name in ("given", "named", "usual")]
    monkeypatch.setattr(health, "KEY_FILE", files[2])
    assert health.find_key(None) is None
    for file in files:
        file.write_text(file.name)
    assert health.find_key(None) == "usual"
    monkeypatch.setenv(health.KEY_FILE_VARIABLE, str(files[1]))
    assert health.find_key(None) == "named"
    assert health.find_key(files[0]) == "given"


def test_a_key_file_that_is_missing_fails_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main(["--api-key-file", str(tmp_path / "none")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
