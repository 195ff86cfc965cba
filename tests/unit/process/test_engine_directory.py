"""Nobody else can take an engine's place, and an old number is no engine."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptj_triton.engine.config import EngineConfig
from gptj_triton.errors import ConfigError
from gptj_triton.process.cancel_handle import find_socket
from gptj_triton.process.client import EngineClient
from gptj_triton.process.directory import EngineDirectory, server_directory

NEVER = 1 << 23  # no process has such a number


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where the engines of a server without a launcher would be."""
    place = server_directory(NEVER)
    yield place
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["open to others", "link", "another user's", "file"])
def test_a_place_that_somebody_else_took_first_is_refused_by_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "link":
        place.symlink_to(tmp_path)
    elif kind == "file":
        place.write_text("")
    else:
        place.mkdir(mode=0o700)
        place.chmod(0o755 if kind == "open to others" else 0o700)
    if kind == "another user's":
        another = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: another)
    with pytest.raises(ConfigError, match=f"{place} belongs to another user, or others may use it; expected .*0700"):
        EngineClient(EngineConfig("/nowhere"), NEVER, "only")
    assert kind in ("file", "another user's") or list(place.iterdir()) == []


@pytest.mark.parametrize("which", ["server", "engine"])
def test_no_handle_leads_through_a_directory_that_others_can_write_to(tmp_path: Path, which: str) -> None:
    engine = tmp_path / "server" / "0123456789ab"
    engine.mkdir(parents=True, mode=0o700)
    engine.parent.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(engine / "engine.sock"))
        assert find_socket(engine.parent, engine.name) == engine / "engine.sock"
        open_one = engine if which == "engine" else engine.parent
        open_one.chmod(0o770)
        assert find_socket(engine.parent, engine.name) is None
        open_one.chmod(0o700)
        link = tmp_path / "link"
        link.symlink_to(engine.parent)
        assert find_socket(link, engine.name) is None


def test_a_process_that_got_the_number_of_an_engine_that_ended_is_none(place: Path) -> None:
    directory = EngineDirectory(place / "0123456789ab")
    directory.make()
    directory.pid_file.write_text(str(os.getpid()))
    assert directory.open_engine() is None
    for nonsense in ("", "x", str(NEVER)):
        directory.pid_file.write_text(nonsense)
        assert directory.open_engine() is None


def test_sockets_of_dead_frontends_are_removed_and_those_of_others_stay(place: Path) -> None:
    directory = EngineDirectory(place / "0123456789ab")
    directory.make()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory.frontend_socket("dead")))
    directory.ready_file("dead").touch()
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(directory.frontend_socket("alive")))
        alive.listen()
        directory.remove_dead_frontends()
        assert sorted(path.name for path in directory.path.iterdir()) == ["alive.sock", "lock"]
        directory.remove_if_unused()
        assert directory.path.exists()
        directory.remove_frontend_files("alive")
    directory.remove_if_unused()
    assert not place.exists()
