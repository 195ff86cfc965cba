"""What one Python interpreter is and has. As a program it describes the interpreter that runs it, as JSON."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from gptj_triton.project import PROJECT

# Those for which tritonserver 2.51 has a stub that loads their own library. This project's tests run on the first.
VERSIONS = ("3.11", "3.10", "3.12")
# For this one a package is compiled: geventhttpclient 2.0.2, the newest that tritonclient 2.51 takes, has no wheel.
COMPILING_VERSION = "3.12"
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


class Interpreter(NamedTuple):
    """One interpreter, by its own words."""

    executable: str
    version: str  # such as "3.11"
    abi: str  # such as "cpython-311-x86_64-linux-gnu": implementation, processor and C library
    prefix: str  # where it is installed, even if it runs in a virtual environment
    library: str | None  # path of its libpython3.X.so.1.0
    has_pip: bool
    makes_pip: bool  # has ensurepip, so that a virtual environment made with it has pip
    compiles: bool  # has the C compiler that it was made with, and its own headers

    @property
    def fits(self) -> bool:
        """Whether Triton has a stub for it."""
        return self.version in VERSIONS and self.abi == f"cpython-{self.version.replace('.', '')}-x86_64-linux-gnu"

    @property
    def why_not(self) -> str:
        """Why nothing can be installed for it, even where its library and pip are fetched; empty where all can."""
        if not self.fits:
            return f"is Python {self.version} ({self.abi}), which Triton has no stub for"
        if self.version == COMPILING_VERSION and not self.compiles:
            return f"is Python {self.version}, for which a package must be compiled, without compiler or headers"
        return ""


def library_name(version: str) -> str:
    return f"libpython{version}.so.1.0"


def find_library() -> Path | None:
    """`libpython3.X.so.1.0` of the running interpreter, not of another build that the loader may know. Last comes the
    one that `make` fetched into the virtual environment."""
    folders = [Path(sys.base_prefix) / "lib", Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")]
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    folders = [*folders, *(folder / multiarch for folder in folders), Path(sys.prefix) / "lib"]
    files = (folder / library_name(PYTHON) for folder in folders)
    # os.path, because LIBDIR may be a folder of another machine, on which this Python was built: here it is perhaps one
    # that cannot be read, and on that Path.is_file fails.
    return next((file for file in files if os.path.isfile(file)), None)


def describe() -> Interpreter:
    """The running interpreter."""
    library = find_library()
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    return Interpreter(
        executable=sys.executable,
        version=PYTHON,
        abi=sysconfig.get_config_var("SOABI") or "",
        prefix=sys.base_prefix,
        library=None if library is None else str(library),
        has_pip=importlib.util.find_spec("pip") is not None,
        makes_pip=importlib.util.find_spec("ensurepip") is not None,
        compiles=shutil.which(compiler) is not None and os.path.isfile(Path(sysconfig.get_path("include"), "Python.h")),
    )


def inspect(executable: str | Path) -> Interpreter | None:
    """The interpreter at a path; None where that does not run, or is too old to say."""
    command = [str(executable), "-m", "gptj_triton.install.interpreter"]
    try:
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, timeout=60)
        return Interpreter(**json.loads(done.stdout)) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    print(json.dumps(describe()._asdict()))
