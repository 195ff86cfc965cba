"""What is closed over HTTP and gRPC and to other users of the machine, with and without keys, on a real server."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import requests
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gptj_triton.api_key import grpc_metadata, http_header
from gptj_triton.client import Client, KeyRefusedError
from gptj_triton.serving.limits import REGION_BYTES
from tests.server.conftest import CLOSE, PROJECT, Server, start

NO_PTRACE = [sys.executable, str(PROJECT / "tests" / "without_ptrace.py")]
SECRET = "vierzig Raben"  # nothing of a request may stand in the log
GENERATE = json.dumps({"text_input": "Once upon a time", "max_tokens": 1})
ADMIN = [
    ("POST", "repository/index", ""),
    ("POST", "repository/models/ensemble/load", ""),
    ("POST", "repository/models/ensemble/unload", ""),
    ("GET", "logging", ""),
    ("POST", "logging", '{"log_verbose_level": 1}'),
    ("GET", "trace/setting", ""),
    ("GET", "models/ensemble/trace/setting", ""),
    ("POST", "trace/setting", '{"trace_level": ["TENSORS"]}'),
    ("GET", "systemsharedmemory/status", ""),
    ("POST", "systemsharedmemory/region/r/register", '{"key": "/gptj_test", "offset": 0, "byte_size": 8}'),
    ("POST", "systemsharedmemory/unregister", ""),
    ("GET", "cudasharedmemory/status", ""),
    ("POST", "cudasharedmemory/region/r/register", "{}"),
]
READING = [
    ("GET", "models/ensemble", ""),
    ("GET", "models/ensemble/config", ""),
    ("GET", "models/ensemble/stats", ""),
    ("GET", "models/stats", ""),
]
INFERENCE = [
    ("POST", "models/ensemble/generate", GENERATE),
    ("POST", "models/ensemble_stream/generate_stream", GENERATE),
    ("POST", "models/ensemble/infer", "{"),
    ("POST", "models/fastertransformer/infer", "{"),
]
HEALTH = [("GET", "health/ready", ""), ("GET", "health/live", ""), ("GET", "models/ensemble/ready", "")]
GRPC_ADMIN = [
    ("RepositoryIndex", service_pb2.RepositoryIndexRequest()),
    ("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name="ensemble")),
    ("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name="ensemble")),
    ("LogSettings", service_pb2.LogSettingsRequest()),
    ("TraceSetting", service_pb2.TraceSettingRequest()),
    ("SystemSharedMemoryStatus", service_pb2.SystemSharedMemoryStatusRequest()),
    ("SystemSharedMemoryRegister", service_pb2.SystemSharedMemoryRegisterRequest(name="r", key="/x", byte_size=8)),
    ("SystemSharedMemoryUnregister", service_pb2.SystemSharedMemoryUnregisterRequest()),
    ("CudaSharedMemoryStatus", service_pb2.CudaSharedMemoryStatusRequest()),
    ("CudaSharedMemoryRegister", service_pb2.CudaSharedMemoryRegisterRequest(name="r")),
    ("CudaSharedMemoryUnregister", service_pb2.CudaSharedMemoryUnregisterRequest()),
]
GRPC_READING = [
    ("ServerMetadata", service_pb2.ServerMetadataRequest()),
    ("ModelMetadata", service_pb2.ModelMetadataRequest(name="ensemble")),
    ("ModelConfig", service_pb2.ModelConfigRequest(name="ensemble")),
    ("ModelStatistics", service_pb2.ModelStatisticsRequest()),
]
GRPC_INFERENCE = [
    ("ModelInfer", service_pb2.ModelInferRequest(model_name="ensemble")),
    ("ModelStreamInfer", service_pb2.ModelInferRequest(model_name="ensemble_stream")),
]
GRPC_HEALTH = [
    ("ServerLive", service_pb2.ServerLiveRequest()),
    ("ServerReady", service_pb2.ServerReadyRequest()),
    ("ModelReady", service_pb2.ModelReadyRequest(name="ensemble")),
]


def status(server: Server, call: tuple[str, str, str], headers: dict[str, str] | None = None) -> int:
    method, path, body = call
    url = f"http://{server.http_url}/v2/{path}"
    answer = requests.request(method, url, data=body, headers={**CLOSE, **(headers or {})}, timeout=60)
    return int(answer.status_code)


def is_refused(server: Server, call: tuple[str, object], metadata: dict[str, str] | None = None) -> bool:
    """Whether gRPC asks for a key; any other answer or error means that it does not."""
    name, request = call
    with grpc.insecure_channel(server.grpc_url) as channel:
        method = getattr(service_pb2_grpc.GRPCInferenceServiceStub(channel), name)
        options = {"metadata": list((metadata or {}).items()), "timeout": 60}
        try:
            if name == "ModelStreamInfer":
                next(method(iter([request]), **options))
            else:
                method(request, **options)
        except grpc.RpcError as error:
            return "is restricted" in str(error.details())
    return False


def answers(server: Server) -> bool:
    return status(server, INFERENCE[0]) == 200


# Without any key, on loopback.


@pytest.mark.parametrize("call", ADMIN, ids=lambda call: f"{call[0]} {call[1]}")
def test_administration_over_http_is_forbidden(call: tuple[str, str, str], server: Server) -> None:
    assert status(server, call) == 403
    assert status(server, call, http_header("a-guess")) == 403


@pytest.mark.parametrize("call", GRPC_ADMIN, ids=lambda call: call[0])
def test_administration_over_grpc_is_refused(call: tuple[str, object], server: Server) -> None:
    assert is_refused(server, call)
    assert is_refused(server, call, grpc_metadata("a-guess"))


def test_what_clients_read_and_ask_stays_open_on_loopback(server: Server) -> None:
    assert {status(server, call) for call in (*READING, *HEALTH, *INFERENCE[:2])} == {200}
    assert not any(is_refused(server, call) for call in (*GRPC_READING, *GRPC_HEALTH, *GRPC_INFERENCE))


def test_a_region_of_another_process_cannot_be_read(server: Server) -> None:
    region = Path("/dev/shm/gptj_test_region")
    region.write_bytes(SECRET.encode())
    try:
        asked = json.dumps({"key": f"/{region.name}", "offset": 0, "byte_size": len(SECRET)})
        assert status(server, ("POST", "systemsharedmemory/region/r/register", asked)) == 403
        by_grpc = service_pb2.SystemSharedMemoryRegisterRequest(name="r", key=f"/{region.name}", byte_size=len(SECRET))
        assert is_refused(server, ("SystemSharedMemoryRegister", by_grpc))
        place = {"shared_memory_region": "r", "shared_memory_byte_size": len(SECRET)}
        tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "parameters": place}
        answer = requests.post(
            f"http://{server.http_url}/v2/models/ensemble/infer", json={"inputs": [tensor]}, headers=CLOSE, timeout=60
        )
        assert "Unable to find" in answer.json()["error"] and SECRET not in answer.text
    finally:
        region.unlink()


def test_bodies_that_overflow_an_ordinary_stack_or_its_shared_memory_are_answered(server: Server) -> None:
    url = f"http://{server.http_url}/v2/models/ensemble"
    head = b'{"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["'
    bomb = zlib.compress(head + b"a" * 100_000_000 + b'"]}]}', 9)
    for path, body, headers in [
        ("generate", b'{"text_input": "' + b"a" * 100_000_000 + b'"}', {}),
        ("infer", bomb, {"Content-Encoding": "deflate"}),
        ("generate", b'{"a": ' + b"[" * 5_000_000, {}),
    ]:
        answer = requests.post(f"{url}/{path}", data=body, headers={**CLOSE, **headers}, timeout=60)
        assert answer.status_code in (400, 500), answer.text
        assert answers(server)
    assert all(region.stat().st_size <= REGION_BYTES for region in regions(server))


def test_more_chunks_than_an_ordinary_stack_holds_are_answered(server: Server) -> None:
    chunks = (b" " for _ in range(550_000))
    url = f"http://{server.http_url}/v2/models/ensemble/generate"
    assert requests.post(url, data=chunks, headers=CLOSE, timeout=100).status_code == 500  # no JSON in it
    assert answers(server)


def regions(server: Server) -> list[Path]:
    return list(Path("/dev/shm").glob(f"gptj_{server.pid}_*"))


def as_nobody(*command: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, user=65534, group=65534, extra_groups=[], check=False)


def test_what_the_server_writes_is_its_users_alone(server: Server) -> None:
    assert len(regions(server)) == 4
    run = next(server.temporary.glob("gptj-triton-*"))
    for path in (*regions(server), *server.temporary.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    if os.geteuid() == 0:
        shutil.chown(server.temporary, 65534)  # as /tmp is, which everybody may enter
        assert as_nobody("ls", str(server.temporary)).returncode == 0
        assert as_nobody("ls", str(run)).returncode != 0
        for region in regions(server):
            assert as_nobody("cat", str(region)).stdout == b""
        shutil.chown(server.temporary, 0)


def test_no_text_of_a_request_stands_in_the_log(server: Server) -> None:
    url = f"http://{server.http_url}/v2/models/"
    for path, body in [
        ("ensemble/generate", {"text_input": SECRET, "max_tokens": 2}),
        ("ensemble/generate", {"text_input": SECRET, "max_tokens": -1}),
        ("ensemble/generate", {"text_input": SECRET * 5000}),
        ("ensemble/generate", {"text_input": "a", "stop_words": [SECRET, 3]}),
        ("ensemble/generate", {"text_input": "a", "temprature": SECRET}),
        ("ensemble_stream/generate_stream", {"text_input": SECRET, "top_p": 7}),
        ("ensemble/infer", {"inputs": [{"name": SECRET, "datatype": "BYTES", "shape": [1, 1], "data": [SECRET]}]}),
    ]:
        requests.post(url + path, json=body, headers=CLOSE, timeout=60)
    requests.post(f"{url}ensemble/generate", data=f'{{"text_input": "{SECRET}', headers=CLOSE, timeout=60)
    assert SECRET not in server.log.read_text(errors="replace")


# With a key for requests and another for administration, for all addresses, and Triton as talkative as it gets.


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    files = tuple(tmp_path_factory.mktemp("keys") / name for name in ("api", "admin"))
    for file in files:
        file.write_text(f"{secrets.token_urlsafe(24)}\nanything\n")
        file.chmod(0o600)
    return files[0], files[1]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, keys: tuple[Path, Path]) -> Iterator[Server]:
    options = ["--host", "0.0.0.0", "--api-key-file", str(keys[0]), "--open-admin-api", str(keys[1])]
    options += ["--", "--exit-timeout-secs=5", "--log-verbose=1"]
    changes = {"AIP_MODE": "PREDICTION", "AIP_HTTP_PORT": "1"}  # as Vertex AI sets it, for a port without keys
    launched = start(tmp_path_factory.mktemp("keyed"), *options, changes=changes)
    try:
        yield launched.wait_until_ready()
    finally:
        launched.close()


@pytest.fixture(scope="module")
def api_key(keys: tuple[Path, Path]) -> str:
    return keys[0].read_text().split()[0]


@pytest.fixture(scope="module")
def admin_key(keys: tuple[Path, Path]) -> str:
    return keys[1].read_text().split()[0]


def test_without_a_key_there_is_health_alone(keyed: Server) -> None:
    assert {status(keyed, call) for call in (*ADMIN, *READING, *INFERENCE)} == {403}
    assert {status(keyed, call) for call in HEALTH} == {200}
    assert all(is_refused(keyed, call) for call in (*GRPC_ADMIN, *GRPC_READING, *GRPC_INFERENCE))
    assert not any(is_refused(keyed, call) for call in GRPC_HEALTH)
    assert requests.get(f"http://{keyed.metrics_url}/metrics", headers=CLOSE, timeout=60).status_code == 200


def test_each_key_opens_its_own_part(keyed: Server, api_key: str, admin_key: str) -> None:
    api, admin = http_header(api_key), http_header(admin_key)
    assert {status(keyed, call, api) for call in (*READING, *INFERENCE[:2])} == {200}
    assert {status(keyed, call, api) for call in ADMIN} == {403}
    assert {status(keyed, call, admin) for call in (*READING, *INFERENCE)} == {403}
    assert status(keyed, ADMIN[0], admin) == status(keyed, ("GET", "logging", ""), admin) == 200
    api, admin = grpc_metadata(api_key), grpc_metadata(admin_key)
    assert not any(is_refused(keyed, call, api) for call in (*GRPC_READING, *GRPC_INFERENCE))
    assert all(is_refused(keyed, call, api) for call in GRPC_ADMIN)
    assert all(is_refused(keyed, call, admin) for call in (*GRPC_READING, *GRPC_INFERENCE))
    assert not any(is_refused(keyed, call, admin) for call in GRPC_ADMIN if "Unload" not in call[0])


def test_a_key_counts_letter_by_letter(keyed: Server, api_key: str) -> None:
    call = READING[0]
    assert status(keyed, call, {"AUTHORIZATION": f"Bearer {api_key}"}) == 200
    for wrong in (f"bearer {api_key}", api_key, f"Bearer {api_key}x", f"Bearer {api_key[:-1]}", "Bearer ", ""):
        assert status(keyed, call, {"Authorization": wrong}) == 403, wrong
    assert status(keyed, call, http_header(api_key.swapcase())) == 403


@pytest.mark.parametrize("protocol", ["generate", "http", "grpc"])
def test_our_client_brings_the_key(protocol: str, keyed: Server, api_key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTJ_TRITON_API_KEY", raising=False)
    url = keyed.grpc_url if protocol == "grpc" else keyed.http_url
    for wrong in (None, "another"):
        with Client(url, protocol, api_key=wrong) as client, pytest.raises(KeyRefusedError, match="--api-key-file"):
            client.generate("Once upon a time", max_tokens=1)
    with Client(url, protocol, api_key=api_key) as client:
        assert client.generate("Once upon a time", max_tokens=6).text == [" there was a king who had"]
    monkeypatch.setenv("GPTJ_TRITON_API_KEY", api_key)
    with Client(url, protocol) as client:
        assert client.generate("Once upon a time", max_tokens=1).text == [" there"]
        if protocol != "http":
            assert "".join(piece.text[0] for piece in client.stream("Once upon a time", max_tokens=2)) == " there was"
    monkeypatch.delenv("GPTJ_TRITON_API_KEY")
    if protocol != "http":
        with Client(url, protocol) as client, pytest.raises(KeyRefusedError):
            list(client.stream("Once upon a time", max_tokens=1))


def test_the_clients_command_takes_the_key_from_a_file(keyed: Server, keys: tuple[Path, Path]) -> None:
    command = [sys.executable, str(PROJECT / "tools" / "client.py"), "Once upon a time", "--max-tokens=6"]
    command += ["--url", keyed.http_url]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 1
    assert refused.stderr == (
        "client.py: the server demands an API key, or another one (--api-key-file, GPTJ_TRITON_API_KEY)\n"
    )
    done = subprocess.run([*command, "--api-key-file", str(keys[0])], capture_output=True, check=True, timeout=60)
    assert done.stdout == b" there was a king who had\n"


def test_no_key_can_be_seen_from_outside(keyed: Server, api_key: str, admin_key: str) -> None:
    secrets_ = [api_key.encode(), admin_key.encode()]
    assert keyed.tritonserver is not None
    command = b"\n".join(Path(f"/proc/{keyed.tritonserver.pid}/cmdline").read_bytes().split(b"\0"))
    assert len(re.findall(rb"-restricted-\w+=\S+:authorization=\(hidden\)\n", command)) == 4
    for process in keyed.processes:
        for name in ("cmdline", "environ"):
            content = Path(f"/proc/{process.pid}/{name}").read_bytes()
            assert not any(secret in content for secret in secrets_), (process, name)
    log = keyed.log.read_bytes()
    assert b"Process for ServerLive" in log  # as talkative as that
    assert not any(secret in log for secret in secrets_)


# Where a system does not let the launcher hide the keys.


def test_keys_that_cannot_be_hidden_stop_the_start(launch: Callable[..., Server], keys: tuple[Path, Path]) -> None:
    refused = launch("--api-key-file", keys[0], before=NO_PTRACE)
    assert refused.wait() == 1
    assert refused.last_line == (
        "serve.py: the keys would stand on tritonserver's command line, which all local users see: ptrace is refused"
    )


def test_without_keys_of_the_users_it_warns_and_serves(launch: Callable[..., Server]) -> None:
    # Nor does it need more memory than before where what is only reserved counts.
    server = launch(before=["prlimit", "--as=30000000000", *NO_PTRACE]).wait_until_ready()
    assert "local users can see the key that closes Triton's administrative APIs: ptrace is refused" in (
        server.log.read_text()
    )
    assert status(server, ADMIN[0]) == 403
    assert answers(server)
