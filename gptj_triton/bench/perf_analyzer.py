"""Triton's own perf_analyzer, found and made to run. Knows neither models nor what is measured.

The program comes with the package tritonclient. The two libraries that most systems lack are in the package
nvidia-pytriton under other names, and are linked from there.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The name that perf_analyzer asks for, and the pattern of the same library among nvidia-pytriton's files.
LENT_LIBRARIES = {
    "libb64.so.0d": "nvidia_pytriton.libs/libb64-*.so.0d",
    "libcudart.so.12": "nvidia_pytriton.libs/libcudart-*.so.12*",
}
THIS_MACHINE = ("localhost", "::1", "127.0.0.1")  # the curl in perf_analyzer heeds an IPv4 address at the end alone


class PerfError(Exception):
    """No measurement could be made; the message says why in one line."""


@dataclass(frozen=True)
class PerfAnalyzer:
    """The program and the environment in which its libraries are found."""

    program: str
    environment: dict[str, str]

    def run(self, arguments: list[str], timeout: float) -> None:
        """Runs it for at most `timeout` seconds. Raises PerfError with its own words when it fails."""
        command = [self.program, *arguments]
        try:
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise PerfError(f"perf_analyzer did not finish within {timeout:g} s: {' '.join(arguments)}") from None
        if done.returncode:
            words = " ".join(done.stderr.split("Usage:")[0].split())  # its usage follows some errors
            raise PerfError(f"perf_analyzer ended with status {done.returncode}: {words}")


@contextlib.contextmanager
def find_perf_analyzer(search_path: str | None = None) -> Iterator[PerfAnalyzer]:
    """perf_analyzer, shown to run; looked for beside this Python and on PATH, or on `search_path` alone.

    Raises PerfError when it is not there or a library is missing."""
    if search_path is None:
        search_path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    program = shutil.which("perf_analyzer", path=search_path)
    if program is None:
        raise PerfError("perf_analyzer not found: it comes with tritonclient 2.51 (later wheels carry none)")
    with tempfile.TemporaryDirectory() as directory:
        for name, found in lent_libraries().items():
            Path(directory, name).symlink_to(found)
        path = os.pathsep.join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), directory]))
        analyzer = PerfAnalyzer(program, os.environ | {"LD_LIBRARY_PATH": path} | without_proxy())
        try:
            analyzer.run(["--version"], timeout=60)
        except PerfError as error:
            raise PerfError(
                f"{error} (libb64.so.0d is in Debian's libb64-0d, libcudart.so.12 in PyPI's nvidia-cuda-runtime-cu12)"
            ) from None
        yield analyzer


def without_proxy() -> dict[str, str]:
    """Variables by which curl and gRPC ask no proxy on the way to this machine, besides what they say now."""
    names = ("no_proxy", "NO_PROXY", "no_grpc_proxy")
    kept = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return dict.fromkeys(names, ",".join(filter(None, [kept, *THIS_MACHINE])))


def lent_libraries() -> dict[str, Path]:
    """The libraries of `LENT_LIBRARIES` that nvidia-pytriton holds, by the name perf_analyzer asks for."""
    try:
        files = importlib.metadata.files("nvidia-pytriton") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {
        name: Path(str(file.locate())).resolve()
        for name, pattern in LENT_LIBRARIES.items()
        for file in files
        if file.match(pattern)
    }
