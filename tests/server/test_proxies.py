"""Real nginx and real HAProxy, with the files of deploy/proxy, before real servers: what passes, what ends there, and
what a client sees when a server cannot answer."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import socket
import statistics
import subprocess
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from gptj_triton.bench.debian_programs import debian_program
from gptj_triton.bench.proxies import DEPLOY, PROXIES, SERVERS, Behind
from tests.server.conftest import CLOSE, PROJECT, Server, free_ports, is_idle, load, start, wait_until
from tests.server.proxied import GENERATE, KEY, STREAM, Running, end, running

LONG = {"text_input": "Once upon a time", "max_tokens": 900, "min_tokens": 900}
SERVER_KEY = "the-key-of-the-servers"
PIECES, PIECE_SECONDS = 20, 0.02
HALF_SECONDS = 15.0  # both files say 10
PIECE_DELAY = 0.02  # usually 0.0003, on a machine that does other things too


def behind(server: Server) -> Behind:
    return Behind(server.http_url, server.metrics_url)


def nobody() -> Behind:
    port, metrics = free_ports(2)
    return Behind(f"127.0.0.1:{port}", f"127.0.0.1:{metrics}")


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that wants a key and computes a single sequence, while two wait."""
    folder = tmp_path_factory.mktemp("small")
    repository = shutil.copytree(PROJECT / "model_repository", folder / "repository")
    for name in ("fastertransformer", "fastertransformer_stream"):
        with (repository / name / "config.pbtxt").open("a") as config:
            for parameter, value in {"max_sequences": 1, "max_waiting_requests": 1}.items():
                config.write(f'parameters {{ key: "{parameter}" value: {{ string_value: "{value}" }} }}\n')
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_text(SERVER_KEY)
    options = ("--model-repository", str(repository), "--api-key-file", str(key), "--", "--exit-timeout-secs=5")
    launched = start(folder, *options)
    try:
        yield launched.wait_until_ready()
    finally:
        launched.close()


@pytest.fixture(scope="module", params=PROXIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def proxy(
    name: str, server: Server, small_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """Before a server, a small one, and none."""
    servers = [nobody(), behind(server), behind(small_server)]
    folder = tmp_path_factory.mktemp(name)
    with running(name, servers, folder, server_key=SERVER_KEY, rate=1000) as started:
        wait_until(lambda: started.ask("/v2/health/ready", method="GET").ok, "ready server")
        yield started


@pytest.fixture(scope="module", autouse=True)
def half_request(proxy: Running) -> Iterator[tuple[socket.socket, float]]:
    with proxy.connect() as connection:
        connection.sendall(b"POST /v2/models/ensemble/generate HTTP/1.1\r\nHost: a\r\nX-Half: ")
        yield connection, time.monotonic()


def test_the_files_are_valid(name: str, proxy: Running, tmp_path: Path) -> None:
    if name == "haproxy":  # as committed, with a certificate
        for file in DEPLOY.glob("haproxy*"):
            shutil.copy(file, tmp_path)
        shutil.copy(proxy.proxy.certificate.with_suffix(".pem"), tmp_path)
        program = debian_program(name)
        command = [str(program.path), "-c", "-f", str(tmp_path / "haproxy.cfg")]
        done = subprocess.run(command, env=program.environment, capture_output=True, text=True)
    else:
        command = [*proxy.proxy.command[:-1], proxy.proxy.command[-1].replace("/pid;", "/test-pid;"), "-t"]
        done = subprocess.run(command, env=proxy.proxy.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower(), done.stderr


@pytest.mark.parametrize("path", [GENERATE, "/v2/models/ensemble/versions/1/generate", STREAM])
@pytest.mark.parametrize("chunked", [False, True], ids=("length", "chunks"))
def test_a_request_passes(proxy: Running, path: str, chunked: bool) -> None:
    body = b'{"text_input": "Once upon a time", "max_tokens": 3}'
    for _ in range(4):
        response = proxy.ask(path, data=iter([body[:9], body[9:]]) if chunked else body)
        assert response.status_code == 200, response.text
        assert '"finish_reason":"length"' in response.text


def test_health_passes_without_a_key(proxy: Running) -> None:
    for path in ("/v2/health/live", "/v2/health/ready"):
        response = requests.get(f"https://{proxy.proxy.address}{path}", verify=str(proxy.proxy.certificate), timeout=30)
        assert response.status_code == 200


def test_an_id_goes_through_and_into_the_log_and_a_key_does_not(proxy: Running) -> None:
    assert proxy.ask(json={"text_input": "a"}, headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
    made = set()
    for unplain in ('not "plain"', 'mine-2, not "plain"'):
        made.add(proxy.ask(json={"text_input": "a"}, headers={"X-Request-Id": unplain}).headers["X-Request-Id"])
    assert all(re.fullmatch("[A-Za-z0-9._:-]{11,}", each) for each in made), made
    wait_until(lambda: {"mine-1", *made} <= {line["id"] for line in proxy.log()}, "lines of the log")
    line = next(line for line in proxy.log() if line["id"] == "mine-1")
    assert (line["status"], line["key"]) == (200, "alice")
    assert KEY not in proxy.proxy.log.read_text()


DEFLATE_BOMB = zlib.compress(b"[" * 10_000_000)
REFUSED: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "no such path": ("/v2/models", {"method": "GET"}, 404, "passes no such path"),
    "infer, as with classification": ("/v2/models/ensemble/infer", {"data": b"{}"}, 404, "passes no such path"),
    "another model": ("/v2/models/fastertransformer/generate", {"data": b"{}"}, 404, "passes no such path"),
    "load a model": ("/v2/repository/models/a/load", {"data": b"{}"}, 404, "passes no such path"),
    "shared memory": ("/v2/systemsharedmemory/status", {"method": "GET"}, 404, "passes no such path"),
    "metrics": ("/metrics", {"method": "GET"}, 404, "passes no such path"),
    "a path in disguise": ("/v2/models/ensemble/generate/../infer", {"data": b"{}"}, 404, "passes no such path"),
    "end of line in a path": ("/v2/models/ensemble/generate%0a", {"data": b"{}"}, 404, "passes no such path"),
    "GET": (GENERATE, {"method": "GET"}, 405, "must be POST"),
    "POST of health": ("/v2/health/ready", {"data": b"{}"}, 405, "GET"),
    "another key": (GENERATE, {"data": b"{}", "headers": {"Authorization": "Bearer other"}}, 401, "needs the header"),
    "the key in capitals": (
        GENERATE,
        {"data": b"{}", "headers": {"Authorization": f"Bearer {KEY.upper()}"}},
        401,
        "needs the header",
    ),
    "the servers' key": (GENERATE, {"headers": {"Authorization": f"Bearer {SERVER_KEY}"}}, 401, "needs the header"),
    "many brackets": (GENERATE, {"data": b"[" * 110_000}, 413, "65,536 bytes"),
    "many bytes": (GENERATE, {"data": b'{"text_input": "' + b"a" * 8_000_000}, 413, "65,536 bytes"),
    "many bytes in chunks": (GENERATE, {"data": iter([b"a" * 50_000] * 20)}, 413, "65,536 bytes"),
    "a deflate bomb": (GENERATE, {"data": DEFLATE_BOMB, "headers": {"Content-Encoding": "deflate"}}, 415, "compressed"),
    "gzip": (GENERATE, {"data": b"a", "headers": {"Content-Encoding": "gzip"}}, 415, "compressed"),
    "an encoding named 0": (GENERATE, {"data": b"a", "headers": {"Content-Encoding": "0"}}, 415, "compressed"),
    "many keys": (GENERATE, {"data": json.dumps({f"{i:x}": 0 for i in range(5000)})}, 400, "more than 128 keys"),
    "one key many times": (
        GENERATE,
        {"data": b'{"text_input":"a"' + b',"a":0' * 9000 + b"}"},
        400,
        "more than 128 keys",
    ),
    "keys after many strings": (
        GENERATE,
        {"data": b'{"a":["' + b'\\\\ ","' * 9000 + b'"]' + b',"a":0' * 128},
        400,
        "128 keys",
    ),
    "keys with quotes": (GENERATE, {"data": b"{" + b'"\\":\\\\" :0,' * 200 + b"}"}, 400, "more than 128 keys"),
    "many headers": (GENERATE, {"data": b"{}", "headers": {f"h{i}": "a" * 900 for i in range(40)}}, 431, "16 KiB"),
    "a large header": (GENERATE, {"data": b"{}", "headers": {"a": "a" * 40_000}}, 431, "16 KiB"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_ends_at_the_proxy(proxy: Running, case: str) -> None:
    path, options, status, words = REFUSED[case]
    if "chunks" in case:  # an iterator serves once
        options = {**options, "data": iter([b"a" * 50_000] * 20)}
    try:
        response = proxy.ask(path, **options)
    except requests.ConnectionError:  # it answered and closed while the body still came
        assert status == 413
        return
    assert (response.status_code, response.headers["Content-Type"]) == (status, "application/json"), response.text
    assert words in response.json()["error"]


def test_a_prompt_that_looks_like_keys_passes(proxy: Running) -> None:
    assert proxy.generate(text_input='{"a": 0, ' * 100, stop_words=["a:"] * 300).status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        "POST /v2/models/ensemble/generate HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4",
        "POST /v2/models/ensemble/generate HTTP/1.1\r\nContent-Length: -1",
        "POST /v2/models/ensemble/generate HTTP/1.1\r\nTransfer-Encoding: chunked, chunked",
        "POST /v2/models/ensemble/generate HTTP/1.1\r\nno header",
        "NONSENSE",
    ],
)
def test_what_is_no_http_ends_at_the_proxy(proxy: Running, head: str) -> None:
    status, body = proxy.send(head)
    assert status in (400, 501), body
    if Path(proxy.proxy.command[0]).name == "nginx":  # HAProxy has a page of its own for these
        assert "error" in json.loads(body)


def test_chunks_of_one_byte_end_at_the_proxy(proxy: Running) -> None:
    head = f"POST {GENERATE} HTTP/1.1\r\nTransfer-Encoding: chunked"
    status, body = proxy.send(head, b"1\r\na\r\n" * 100_000)
    assert (status, "65,536 bytes" in body) == (413, True), body


def test_keys_in_chunks_of_one_byte_end_at_the_proxy(proxy: Running) -> None:
    body = b"{" + b",".join(b'"%x":0' % number for number in range(5_000)) + b"}"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    status, answer = proxy.send(f"POST {GENERATE} HTTP/1.1\r\nTransfer-Encoding: chunked", chunks)
    assert status in (400, 413), answer
    assert "more than 128 keys" in answer or "too many chunks" in answer


def test_plain_http_is_refused(proxy: Running) -> None:
    with contextlib.suppress(requests.ConnectionError):
        assert requests.get(f"http://{proxy.proxy.address}/v2/health/ready", timeout=30).status_code == 400


def test_old_tls_is_refused(proxy: Running) -> None:
    command = ["openssl", "s_client", "-connect", proxy.proxy.address, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode != 0


def test_what_a_server_gets(name: str, tmp_path: Path) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    with end(answer) as (one, received), running(name, [one] * SERVERS, tmp_path, server_key=SERVER_KEY) as proxy:
        wait_until(lambda: proxy.ask("/v2/health/ready", method="GET").ok, "ready server")
        headers = {"Inference-Header-Content-Length": "3", "Accept-Encoding": "gzip", "Expect": "100-continue"}
        response = proxy.ask(data=iter([b"a" * 30_000] * 2), headers={**headers, "X-Request-Id": "mine"})
        assert response.status_code == 200, response.text
    (request,) = received
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    sent = dict(line.split(": ", 1) for line in lines[1:])
    assert lines[0] == f"post {GENERATE} http/1.1"
    assert (sent["content-length"], len(body)) == ("60000", 60_000)
    assert (sent["authorization"], sent["x-request-id"]) == (f"bearer {SERVER_KEY}", "mine")
    assert not {*map(str.lower, headers), "transfer-encoding", "x-too-many-keys"} & set(sent)


def test_a_body_in_chunks_arrives_whole_or_is_refused(name: str, tmp_path: Path) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    body = bytes(range(256)) * 256
    headers = "".join(f"\r\nH{number}: {'a' * 1000}" for number in range(14))
    sizes = [len(body), 1000, 1, len(body)]
    with end(answer) as (one, received), running(name, [one] * SERVERS, tmp_path, rate=1000) as proxy:
        wait_until(lambda: proxy.ask("/v2/health/ready", method="GET").ok, "ready server")
        for size, more in zip(sizes, ["", "", headers, headers], strict=True):
            pieces = [body[start : start + size] for start in range(0, len(body), size)]
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
            head = f"POST {GENERATE} HTTP/1.1\r\nTransfer-Encoding: chunked{more}"
            status, text = proxy.send(head, chunks + b"0\r\n\r\n")
            if size == 1 and name == "nginx":
                assert (status, "too many chunks" in text) == (413, True), text
            else:
                assert (status, received.pop().partition(b"\r\n\r\n")[2] == body) == (200, True), text
        assert proxy.send(head, b"10001\r\n" + body + b"a\r\n0\r\n\r\n")[0] == 413
    assert received == []


def test_pieces_of_a_stream_come_as_they_are_sent(name: str, tmp_path: Path) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(PIECES):
            time.sleep(PIECE_SECONDS)
            piece = f"data: {time.monotonic()}\n\n".encode()
            connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        connection.sendall(b"0\r\n\r\n")

    delays = []
    with end(answer) as (one, _), running(name, [one] * SERVERS, tmp_path) as proxy:
        wait_until(lambda: proxy.ask("/v2/health/ready", method="GET").ok, "ready server")
        for line in proxy.ask(STREAM, json={}, stream=True).iter_lines(chunk_size=None):
            if line:
                delays.append(time.monotonic() - float(line.removeprefix(b"data: ")))
    assert len(delays) == PIECES
    print(f"{name}: a piece is late by {statistics.median(delays) * 1000:.2f} ms (median)")
    assert statistics.median(delays) < PIECE_DELAY


def test_a_client_that_leaves_ends_its_request(proxy: Running, server: Server, small_server: Server) -> None:
    before = [load(each)["gptj_request_success_total"] for each in (server, small_server)]
    response = proxy.ask(STREAM, json=LONG, stream=True)
    next(response.iter_lines())
    wait_until(lambda: not (is_idle(server) and is_idle(small_server)), "running request")
    response.close()
    left = time.monotonic()
    wait_until(lambda: is_idle(server) and is_idle(small_server), "end of the request", seconds=4)
    assert time.monotonic() - left < 4
    wait_until(lambda: before != [load(each)["gptj_request_success_total"] for each in (server, small_server)], "count")


def test_metrics_are_inside(proxy: Running) -> None:
    own = {"nginx": "status", "haproxy": "metrics"}
    name = Path(proxy.proxy.command[0]).name
    assert requests.get(f"http://{proxy.proxy.inside}/{own[name]}", timeout=30).status_code == 200
    page = requests.get(f"http://{proxy.proxy.inside}/servers/2/metrics", timeout=30)
    assert "gptj_num_requests_running" in page.text


def test_too_many_requests_and_connections(name: str, server: Server, tmp_path: Path) -> None:
    with running(name, [behind(server)] * SERVERS, tmp_path, rate=1, connections=4) as proxy:
        wait_until(lambda: proxy.ask("/v2/health/ready", method="GET").ok, "ready server")
        streams = [requests.post(**_post(proxy), json=LONG, stream=True) for _ in range(6)]
        assert {each.status_code for each in streams} == {200, 429}
        for each in streams:
            each.close()
        wait_until(lambda: is_idle(server), "end of the streams")
        answers = [proxy.generate(top_p=3) for _ in range(15)]
    refused = [each for each in answers if each.status_code == 429]
    assert len(refused) >= 2 and {each.status_code for each in answers} == {400, 429}
    for each in [*refused, *(each for each in streams if each.status_code == 429)]:
        assert each.headers["Retry-After"] == "1"
    assert "too many requests with this key" in refused[0].json()["error"]


def _post(proxy: Running) -> dict[str, Any]:
    return {
        "url": f"https://{proxy.proxy.address}{STREAM}",
        "headers": {"Authorization": f"Bearer {KEY}"},
        "verify": str(proxy.proxy.certificate),
        "timeout": 60,
    }


@contextlib.contextmanager
def full(server: Server) -> Iterator[None]:
    """As long as the block lasts, the small server has no place left."""
    url, headers = f"http://{server.http_url}{STREAM}", {**CLOSE, "Authorization": f"Bearer {SERVER_KEY}"}
    with ThreadPoolExecutor(2) as pool:
        sent = []
        for count in (1, 2):
            sent.append(pool.submit(requests.post, url, json=LONG, headers=headers, stream=True, timeout=60))
            taken = functools.partial(_has_taken, server, count)
            wait_until(taken, f"{count} requests that are taken")
        yield
        for each in sent:  # the second begins when the first has ended
            each.result().close()


def _has_taken(server: Server, count: int) -> bool:
    return load(server)["gptj_num_requests_active"] == count


def test_a_full_server_is_503_and_another_takes_its_requests(
    name: str, proxy: Running, server: Server, small_server: Server, tmp_path: Path
) -> None:
    with running(name, [behind(small_server)] * SERVERS, tmp_path, server_key=SERVER_KEY) as alone:
        wait_until(lambda: alone.ask("/v2/health/ready", method="GET").ok, "ready server")
        with full(small_server):
            for path in (GENERATE, STREAM):
                response = alone.generate(path)
                assert (response.status_code, response.headers["Retry-After"]) == (503, "1"), response.text
                assert response.headers["Content-Type"] == "application/json"
                assert (
                    "UNAVAILABLE: " in response.json()["error"] and "max_waiting_requests" in response.json()["error"]
                )
                assert {proxy.generate(path).status_code for _ in range(6)} == {200}
    wait_until(lambda: is_idle(server) and is_idle(small_server), "end of all requests")


def test_an_error_of_a_model_keeps_its_status_and_words(proxy: Running) -> None:
    for path in (GENERATE, STREAM):
        response = proxy.generate(path, top_p=3)
        assert (response.status_code, "top_p is 3" in response.text) == (400, True), response.text
    response = proxy.ask(data=b'{"a":')
    assert (response.status_code, "failed to parse" in response.text) == (500, True), response.text


def test_a_request_that_may_have_been_begun_is_not_sent_again(name: str, tmp_path: Path) -> None:
    with end(answers_nothing) as (one, received), running(name, [one] * SERVERS, tmp_path) as proxy:
        wait_until(lambda: proxy.ask("/v2/health/ready", method="GET").ok, "ready server")
        response = proxy.generate()
    assert (response.status_code, len(received)) == (502, 1)
    assert "it may have begun the request" in response.json()["error"]


def test_without_any_server(name: str, tmp_path: Path) -> None:
    with running(name, [nobody() for _ in range(SERVERS)], tmp_path) as proxy:
        # HAProxy takes a server for ready until it has asked it.
        wait_until(lambda: not proxy.ask("/v2/health/ready", method="GET").ok, "servers that are known to be away")
        for _ in range(3):
            for response in (proxy.generate(), proxy.ask("/v2/health/ready", method="GET")):
                assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
                assert response.json()["error"].startswith("UNAVAILABLE: ")


def test_the_proxy_is_ready_as_long_as_a_server_is(name: str, tmp_path: Path) -> None:
    with (
        end(answers_nothing, "400 Bad Request") as (unready, received),
        running(name, [unready] * SERVERS, tmp_path) as proxy,
    ):
        wait_until(lambda: not proxy.ask("/v2/health/ready", method="GET").ok, "server that is known to be unready")
        if name == "haproxy":  # nginx asks no server before it sends a request there
            assert proxy.generate().status_code == 503
            assert received == []


def answers_nothing(connection: socket.socket) -> None:
    """It closes the connection."""


def test_half_a_request_ends(proxy: Running, half_request: tuple[socket.socket, float]) -> None:
    connection, began = half_request
    connection.settimeout(max(1.0, began + HALF_SECONDS - time.monotonic()))
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass
