"""The launcher's command line: what is refused, in one line, and what it stands for."""

from __future__ import annotations

import pytest

from gptj_triton.serving.errors import ServeError
from gptj_triton.serving.options import Options, check_ports_are_free, read_options, resolve_engine_python


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--http-port", "0"], ["--http-port", "0", "1 to 65535"]),
        (["--grpc-port", "65536"], ["--grpc-port", "65536", "1 to 65535"]),
        (["--metrics-port", "abc"], ["--metrics-port", "abc"]),
        (["--http-port", "8001"], ["--http-port 8001", "--grpc-port 8001", "differ"]),
        (["--device", "tpu"], ["--device", "tpu", "cuda"]),
        (["--data-type", "int8"], ["--data-type", "int8", "bf16"]),
        (["--tensor-para-size", "0"], ["--tensor-para-size", "0", "1 or more"]),
        (["--context-length", "0"], ["--context-length", "0", "1 or more"]),
        (["--stream-pieces-per-second", "0"], ["--stream-pieces-per-second", "0", "1 or more"]),
        (["--start-timeout", "0"], ["--start-timeout", "0", "1 or more"]),
        (["--print-command", "--tokenizer", "x"], ["--print-command", "--tokenizer"]),
        (["--print-command", "--context-length", "8"], ["--print-command", "--context-length"]),
        (["--print-command", "--streaming-ensemble"], ["--print-command", "--streaming-ensemble"]),
        (["--streaming-ensemble", "--backend-directory", "x"], ["--streaming-ensemble", "--backend-directory"]),
        (["--data-type", "fp8", "--backend-directory", "x"], ["--data-type fp8", "--backend-directory"]),
        (["--limit", "max_words"], ["--limit", "max_words", "1 or more"]),
        (["--limit", "words=3"], ["--limit", "no limit is named 'words'", "max_words"]),
        (["--limit=max_words=0"], ["--limit", "max_words is '0'", "1 or more"]),
        (["--print-command", "--limit=max_words=3"], ["--print-command", "--limit"]),
        (["--log-format", "xml"], ["--log-format", "xml", "json"]),
        (["--no-such"], ["--no-such"]),
        (["--mod", "x"], ["--mod"]),
        (["--", "--http-port=9000"], ["--http-port", "behind --"]),
        (["--", "--model-repository", "/x"], ["--model-repository", "behind --"]),
        (["--print-command", "--device", "cpu"], ["--print-command", "--device"]),
        (["--print-command", "--data-type", "fp16"], ["--print-command", "--data-type"]),
        (["--", "--exit-timeout-secs=soon"], ["--exit-timeout-secs", "soon"]),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(
    arguments: list[str], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read_options(arguments)
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert said.err.startswith("serve.py: ")
    assert said.err.count("\n") == 1
    for part in named:
        assert part in said.err


def test_what_stands_behind_the_dashes_is_for_tritonserver() -> None:
    options = read_options(["--device", "cpu", "--", "--log-verbose=1", "--", "--exit-timeout-secs", "7"])
    assert options.server_arguments == ("--log-verbose=1", "--", "--exit-timeout-secs", "7")
    assert options.device == "cpu"


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        ([], 5),
        (["--exit-timeout-secs=7"], 7),
        (["--exit-timeout-secs", "6"], 6),
        (["--exit-timeout=8"], 8),
        (["--exit-t", "9", "--log-verbose=1"], 9),
        (["--exit-timeout=8", "--exit-timeout-secs=4"], 4),
    ],
)
def test_the_exit_timeout_is_the_one_that_tritonserver_is_given(arguments: list[str], seconds: int) -> None:
    assert read_options(["--", *arguments]).exit_timeout == seconds


def test_the_url_names_the_host_as_given_and_the_address_is_one_to_bind_to() -> None:
    options = read_options(["--host", "localhost", "--http-port", "9000"])
    assert options.url == "http://localhost:9000"
    assert options.address == "127.0.0.1"
    assert read_options(["--host", "0.0.0.0"]).local_url == "http://127.0.0.1:8000"
    assert read_options(["--host", "::ffff:127.0.0.1"]).address == "127.0.0.1"


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_address_stands_in_brackets_where_a_port_follows(host: str) -> None:
    options = read_options(["--host", host, "--http-port", "9000"])
    assert options.url == options.local_url == "http://[::1]:9000"
    assert options.listening_arguments[:3] == [
        "--http-address=ipv6:::1",
        "--grpc-address=[::1]",
        "--metrics-address=ipv6:::1",
    ]
    assert read_options(["--host", "::"]).local_url == "http://[::1]:8000"


@pytest.mark.parametrize("host", ["fe80::1%lo", "fe80::1", "1:2", "", "a" * 64, "::1::"])
def test_what_is_no_address_is_refused(host: str) -> None:
    with pytest.raises(ServeError, match="--host "):
        check_ports_are_free(read_options(["--host", host]))


@pytest.mark.parametrize("host", ["2001:db8::1", "192.0.2.1"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(ServeError, match=f"--host {host}: this machine has no address {host}"):
        check_ports_are_free(read_options(["--host", host]))


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(ServeError, match=r"--host no-such-host\.invalid: "):
        _ = read_options(["--host", "no-such-host.invalid"]).address


def engine_python(program: str) -> Options:
    return read_options(["--engine-python", program])


def test_the_engines_python_is_looked_up_once_and_then_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert resolve_engine_python(engine_python("sh")) in ("/usr/bin/sh", "/bin/sh")
    with pytest.raises(ServeError, match="--engine-python no-such-python: no such program"):
        resolve_engine_python(engine_python("no-such-python"))


def test_the_default_python_is_left_to_the_path_of_the_stubs() -> None:
    assert resolve_engine_python(read_options([])) == "python3"


@pytest.mark.parametrize("argument", ["--model-control-mode=poll", "--load-model=a", "--strict-readiness=false"])
def test_what_would_spoil_ready_is_refused_with_the_reason(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_options(["--", argument])
    name = argument.partition("=")[0]
    assert f"serve.py: {name} stands behind --, but the launcher sets it: " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--drain-timeout=-1", "--drain-timeout=nan", "--max-restarts=-1"])
def test_numbers_out_of_range_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_options([option])
    assert option.partition("=")[0] in capsys.readouterr().err
