"""What is removed of a run, and what is not: a lock says whether the run is still alive."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptj_triton.serving.run_directory import run_directory

HOLDER = """
import sys
from gptj_triton.serving.run_directory import run_directory
with run_directory() as run:
    run.note_server(2**22 + 1)
    print(run.path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory for temporary files, with a short path."""
    with tempfile.TemporaryDirectory(prefix="gptj-test-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def start_holder() -> tuple[subprocess.Popen[bytes], Path]:
    """Another launcher, and its directory."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    return holder, Path(os.fsdecode(holder.stdout.readline()).strip())


def test_a_run_ends_with_nothing_left(temporary: Path) -> None:
    with run_directory() as run:
        assert run.path.stat().st_mode & 0o777 == 0o700
        region = Path("/dev/shm") / f"{run.region_prefix}x"
        region.touch()
    assert list(temporary.iterdir()) == []
    assert not region.exists()


def test_a_living_run_stays_and_a_killed_one_goes(temporary: Path) -> None:
    (killed, gone), (living, stays) = start_holder(), start_holder()
    with killed, living:
        sockets = temporary / f"gptj-engine-{2**22 + 1}"
        sockets.mkdir()
        killed.kill()
        killed.wait()
        region = Path("/dev/shm") / f"{gone.name.replace('gptj-triton-', 'gptj_')}_x"
        region.touch()
        with run_directory():
            assert not gone.exists() and not sockets.exists() and not region.exists()
            assert stays.exists()
        living.communicate()
    assert list(temporary.iterdir()) == []


def test_a_server_that_outlives_its_launcher_keeps_the_directory(temporary: Path) -> None:
    with run_directory() as run, subprocess.Popen(["sleep", "600"], stdin=run.lock) as server:
        run.lock.close()  # as if this launcher were gone
        with run_directory():
            assert run.path.exists()
        server.kill()
        server.wait()
        with run_directory():
            assert not run.path.exists()


def test_nothing_of_others_is_removed(temporary: Path) -> None:
    (temporary / "gptj-triton-mine").mkdir()
    (temporary / "gptj-triton-mine" / "lock").touch()
    (temporary / "gptj-triton-12_0123abcd").mkdir()  # without a lock
    (temporary / "gptj-triton-34_0123abcd").write_text("a file")
    before = set(temporary.rglob("*"))
    with run_directory():
        pass
    assert set(temporary.rglob("*")) == before
