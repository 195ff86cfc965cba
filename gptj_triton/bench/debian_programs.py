"""nginx, HAProxy, Prometheus and others as Debian has them: the machine's own, or fetched from its package sources
and unpacked into build/debian, where they stay. Nothing is installed, and root is not needed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.install.debian import installed_version, unpack_all
from gptj_triton.project import PROJECT

FETCHED = PROJECT / "build" / "debian"
PACKAGES = {
    "usr/sbin/nginx": ("nginx", "libnginx-mod-http-js"),
    "usr/sbin/haproxy": ("haproxy",),
    "usr/bin/prometheus": ("prometheus",),
    "usr/bin/promtool": ("prometheus",),
    "usr/bin/prometheus-blackbox-exporter": ("prometheus-blackbox-exporter",),
    "usr/sbin/runc": ("runc",),
    # The system calls that container engines allow by default.
    "usr/share/containers/seccomp.json": ("golang-github-containers-common",),
}


@dataclass(frozen=True)
class DebianProgram:
    """A program below `root`, which is `/` where its packages are installed."""

    root: Path
    name: str  # its path in the package

    @property
    def path(self) -> Path:
        return self.root / self.name

    @property
    def environment(self) -> dict[str, str]:
        """The environment to run it with: that of this process, and where its libraries are."""
        if self.root == Path("/"):
            return dict(os.environ)
        folders = [str(each) for each in self.root.glob("usr/lib/*-linux-gnu")]
        return {**os.environ, "LD_LIBRARY_PATH": ":".join([*folders, os.environ.get("LD_LIBRARY_PATH", "")]).strip(":")}


def debian_program(name: str) -> DebianProgram:
    """`nginx` (with its module for JavaScript), or another one of PACKAGES.

    Raises InstallError where it is not installed and cannot be fetched."""
    found = next(path for path in PACKAGES if Path(path).name == name)
    packages = PACKAGES[found]
    if all(map(installed_version, packages)):
        return DebianProgram(Path("/"), found)
    place = FETCHED / packages[0]
    if not place.exists():
        FETCHED.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FETCHED) as work:
            files = unpack_all(packages, Path(work))
            with contextlib.suppress(OSError):  # another process was first
                files.rename(place)
    return DebianProgram(place, found)
