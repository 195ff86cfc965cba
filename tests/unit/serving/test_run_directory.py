"""What is removed of a run, and what is not: a lock says whether the run is still alive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptj_triton.pidfd import process_has_ended
from gptj_triton.serving.run_directory import run_directory

HOLDER = """
import os, subprocess, sys
from gptj_triton.process.directory import RUN_VARIABLE
from gptj_triton.serving.run_directory import run_directory
with run_directory() as run:
    left = subprocess.Popen(["sleep", "600"], env=os.environ | {RUN_VARIABLE: str(run.path)}, start_new_session=True)
    print(run.path, left.pid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory for temporary files, with a short path."""
    with tempfile.TemporaryDirectory(prefix="gptj-test-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def start_holder() -> tuple[subprocess.Popen[bytes], Path, int]:
    """Another launcher, its directory, and the id of a process of its run."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    path, pid = os.fsdecode(holder.stdout.readline()).split()
    return holder, Path(path), int(pid)


def test_a_run_ends_with_nothing_left(temporary: Path) -> None:
    with run_directory() as run:
        assert run.path.stat().st_mode & 0o777 == 0o700
        region = Path("/dev/shm") / f"{run.region_prefix}x"
        region.touch()
    assert list(temporary.iterdir()) == []
    assert not region.exists()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_living_run_stays_and_a_killed_one_goes(temporary: Path, stopped: bool) -> None:
    (killed, gone, ends), (living, stays, lives) = start_holder(), start_holder()
    with killed, living:
        if stopped:
            os.kill(ends, signal.SIGSTOP)
        killed.kill()
        killed.wait()
        region = Path("/dev/shm") / f"{gone.name.replace('gptj-triton-', 'gptj_')}_x"
        region.touch()
        with run_directory():
            assert not gone.exists() and not region.exists() and process_has_ended(ends)
            assert stays.exists() and not process_has_ended(lives)
        living.communicate()
    assert list(temporary.iterdir()) == []
    assert process_has_ended(lives)


def test_what_a_server_left_goes_before_the_next_and_an_engine_stays(temporary: Path) -> None:
    with run_directory() as run:
        engine = run.engines / "0123"
        engine.mkdir()
        for name in ("engine.sock", "engine.pid", "12.sock", "12.ready"):
            (engine / name).write_text("7")
        (run.stubs / "12").touch()
        region = Path("/dev/shm") / f"{run.region_prefix}x"
        region.touch()
        assert run.engine_pids() == {7}
        run.forget_server()
        assert {path.name for path in engine.iterdir()} == {"engine.sock", "engine.pid"}
        assert list(run.stubs.iterdir()) == [] and not region.exists()


def test_nothing_of_others_is_removed(temporary: Path) -> None:
    (temporary / "gptj-triton-mine").mkdir()
    (temporary / "gptj-triton-mine" / "lock").touch()
    (temporary / "gptj-triton-12_0123abcd").mkdir()  # without a lock
    (temporary / "gptj-triton-34_0123abcd").write_text("a file")
    before = set(temporary.rglob("*"))
    with run_directory():
        pass
    assert set(temporary.rglob("*")) == before
