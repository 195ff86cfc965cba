"""Builds and runs images with the real buildah and podman, as root. No registry is asked: the base is a Debian that
debootstrap makes. Images stay in build/container, so that only what changed is built again.

podman is given limits and a runtime that also suit a machine which is itself a container."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.bare.roots import System, delete_root, make_root, pip_paths, pip_settings
from tests.documents import PROJECT, copy_tree

WORK = PROJECT / "build" / "container"
STORE = ["--root", str(WORK / "images"), "--runroot", str(WORK / "run")]
PODMAN = ["podman", *STORE, "--runtime=runc", "--cgroup-manager=cgroupfs"]
BASE, IMAGE = "localhost/debian:12-slim", "localhost/gptj-triton:0.2.0-cpu"
PYTHON, HEALTHCHECK = "/opt/gptj-triton/.venv/bin/python", "/opt/gptj-triton/deploy/healthcheck"
UNKNOWN_USER = "12345:12345"
# As the documents say it, and stricter: no right that a program may have or gain, and no network but loopback.
STRICT = [
    *("--network=none", "--read-only", "--read-only-tmpfs=false", "--shm-size=64m"),
    *(f"--user={UNKNOWN_USER}", "--cap-drop=all", "--security-opt=no-new-privileges", "--stop-timeout=60"),
    *("--ulimit=nofile=1024:4096", "--ulimit=nproc=4096:4096"),
]


def need(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    assert os.getuid() == 0 and not missing, f"as root: apt-get install {' '.join(missing)}"


def run(*command: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def make_base() -> None:
    """Debian's smallest system as the image BASE, unless there is one."""
    if run(*PODMAN, "image", "exists", BASE).returncode == 0:
        return
    root = make_root(System("bookworm", ()))
    try:
        archive = root.folder.with_suffix(".tar")
        for command in (
            ["tar", "-C", str(root.folder), "-cf", str(archive), "."],
            [*PODMAN, "import", str(archive), BASE],
        ):
            done = run(*command)
            assert done.returncode == 0, done.stderr
    finally:
        delete_root(root)


def build(image: str, *arguments: str) -> None:
    """deploy/Containerfile of a clean copy of this tree. What pip is told on this machine, pip is told there too."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        copy_tree(copy)
        settings = Path(folder) / "pip.conf"
        values = [f"{name.removeprefix('PIP_').lower()} = {value}" for name, value in pip_settings().items()]
        settings.write_text("\n".join(["[global]", *values, ""]))
        cache = WORK / "pip-cache"
        cache.mkdir(parents=True, exist_ok=True)
        lent = [*((path, path) for path in pip_paths() if path.exists()), (settings, Path("/etc/pip.conf"))]
        volumes = [f"--volume={here}:{there}:ro" for here, there in lent]
        options = ["--isolation=chroot", "--pull-never", "--layers", "--format=docker", f"--build-arg=BASE={BASE}"]
        file = f"--file={copy}/deploy/Containerfile"
        volumes.append(f"--volume={cache}:/root/.cache/pip")
        done = run("buildah", *STORE, "bud", *options, *volumes, file, f"--tag={image}", *arguments, str(copy))
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@dataclass(frozen=True)
class Container:
    """A container by its name."""

    name: str

    def run(self, *command: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a command in it, as its user."""
        return run(*PODMAN, "exec", self.name, *command, timeout=timeout)

    def python(self, code: str) -> str:
        """What a program of its Python prints."""
        done = self.run(PYTHON, "-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def log(self) -> str:
        done = run(*PODMAN, "logs", self.name)
        return done.stdout + done.stderr

    def status(self) -> str:
        """`running`, or the exit status."""
        shown = "{{if .State.Running}}running{{else}}{{.State.ExitCode}}{{end}}"
        return run(*PODMAN, "inspect", "--format", shown, self.name).stdout.strip()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL after the 60 s of `--stop-timeout`."""
        done = run(*PODMAN, "stop", self.name)
        assert self.status() != "running", done.stderr

    def remove(self) -> None:
        run(*PODMAN, "rm", "--force", "--time=0", self.name)
