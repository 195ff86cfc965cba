"""Which options close which APIs, and which files hold a key."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gptj_triton.api_key import LONGEST, ApiKeyError, read_key
from gptj_triton.serving.access import Access, choose_access
from gptj_triton.serving.errors import ServeError
from gptj_triton.serving.hidden_arguments import plain
from gptj_triton.serving.limits import writes_files
from gptj_triton.serving.log import log
from gptj_triton.serving.options import read_options

ADMIN = "shared-memory,model-repository,trace,logging"
READING = "metadata,model-config,statistics"
KEY = "0123456789abcdef0123456789abcdef"


def key_file(folder: Path, key: str, name: str = "key") -> str:
    path = folder / name
    path.write_text(key)
    path.chmod(0o600)
    return str(path)


def closed(access: Access) -> dict[str, str]:
    """The key for each group of APIs, which is the same over HTTP and gRPC."""
    groups: dict[str, dict[str, str]] = {"http-restricted-api": {}, "grpc-restricted-protocol": {}}
    for argument in plain(access.arguments):
        option, _, value = argument.removeprefix("--").partition("=")
        apis, _, key = value.partition(":authorization=Bearer ")
        groups[option][apis] = key
    assert groups["http-restricted-api"] == groups["grpc-restricted-protocol"]
    return groups["http-restricted-api"]


def test_administration_is_closed_by_a_key_that_nobody_knows() -> None:
    first, second = (closed(choose_access(read_options([]))) for _ in range(2))
    assert list(first) == [ADMIN]
    assert first != second and len(first[ADMIN]) >= 32


def test_for_other_machines_reading_is_closed_too() -> None:
    assert list(closed(choose_access(read_options(["--host", "0.0.0.0"])))) == [f"{ADMIN},{READING}"]


def test_keys_of_files_open_their_parts(tmp_path: Path) -> None:
    api, admin = key_file(tmp_path, KEY), key_file(tmp_path, KEY[::-1] + "\r\nsecond line\n", "admin")
    assert closed(choose_access(read_options(["--open-admin-api", admin]))) == {ADMIN: KEY[::-1]}
    both = choose_access(read_options(["--open-admin-api", admin, "--api-key-file", api]))
    assert closed(both) == {ADMIN: KEY[::-1], f"inference,{READING}": KEY}
    assert KEY not in repr(both) and KEY[::-1] not in repr(both)


def test_one_key_for_both_is_refused(tmp_path: Path) -> None:
    file = key_file(tmp_path, KEY)
    with pytest.raises(ServeError, match="the same key"):
        choose_access(read_options(["--open-admin-api", file, "--api-key-file", file]))


@pytest.mark.parametrize("text", ["", "\n", "\nsecond", "two words", "höh", "a\0b", "\ufeffkey", "x" * (LONGEST + 1)])
def test_what_is_no_key_is_refused_without_being_shown(tmp_path: Path, text: str) -> None:
    path = key_file(tmp_path, text)
    with pytest.raises(ServeError) as caught:
        choose_access(read_options(["--api-key-file", path]))
    assert str(caught.value) == (
        f"--api-key-file: the first line of {path} is no key: it takes 1 to {LONGEST} visible ASCII characters "
        "without blanks"
    )


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=f"--open-admin-api: {tmp_path}/none: No such file"):
        choose_access(read_options(["--open-admin-api", f"{tmp_path}/none"]))
    with pytest.raises(ServeError, match="Is a directory"):
        choose_access(read_options(["--api-key-file", str(tmp_path)]))


def test_the_longest_key_is_taken(tmp_path: Path) -> None:
    assert read_key(Path(key_file(tmp_path, " " + "~" * LONGEST + " \n"))) == "~" * LONGEST
    with pytest.raises(ApiKeyError):
        read_key(Path("/dev/zero"))


def test_keys_that_others_may_know_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = key_file(tmp_path, "secret")
    Path(file).chmod(0o640)
    choose_access(read_options(["--api-key-file", file]))
    said = capsys.readouterr().err
    assert "other users may read or change it (mode 640)" in said
    assert "a key of 6 characters can be guessed" in said


@pytest.mark.parametrize(("mode", "warned"), [(0o440, False), (0o444, True), (0o460, True)])
def test_a_key_that_root_gave_to_our_group_is_not_warned_of(
    mode: int, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a Kubernetes Secret is mounted for a user who is not root."""
    file = key_file(tmp_path, KEY)
    Path(file).chmod(mode)
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    choose_access(read_options(["--api-key-file", file]))
    assert ("other users may read or change it" in capsys.readouterr().err) == warned


def test_open_text_for_other_machines_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    choose_access(read_options(["--host", "0.0.0.0"]))
    assert "serve.py: warning: --host 0.0.0.0: everybody who reaches this machine may ask" in capsys.readouterr().err


def test_a_warning_is_one_in_a_log_of_json_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log, "as_json", True)
    choose_access(read_options(["--host", "0.0.0.0"]))
    assert json.loads(capsys.readouterr().err)["level"] == "warning"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--http-restricted-api=trace:a=b", "the launcher sets it"),
        ("--grpc-restricted-protocol", "the launcher sets it"),
        ("--http-restr=trace:a=b", "the launcher sets it"),
        ("--allow-sagemaker=true", "asks for no key"),
        ("--allow-vertex", "asks for no key"),
    ],
)
def test_tritonservers_own_ways_past_the_keys_are_refused(
    argument: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read_options(["--", argument])
    assert words in capsys.readouterr().err


def test_files_of_the_users_are_not_limited() -> None:
    assert writes_files(["tritonserver", "--log-file=x"])
    assert writes_files(["tritonserver", "--trace-config", "file=x"])
    assert not writes_files(["tritonserver", "--log-verbose=1", "--model-repository=/trace"])
