"""The virtual environment: which Python it is made with, and what is fetched that this Python lacks."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gptj_triton.install import debian, uv
from gptj_triton.install.interpreter import VERSIONS, Interpreter, describe, inspect
from gptj_triton.install.machine import check_machine
from gptj_triton.install.programs import InstallError, run

WHAT_HELPS = (
    "no Python that serves: install CPython 3.10, 3.11 or 3.12 with venv and its shared library (Debian 12: apt-get "
    "install python3-venv libpython3.11; Ubuntu 24.04: apt-get install python3-dev gcc python3-venv libpython3.12), "
    "then make PYTHON=python3.11 or the like"
)


def make_environment(folder: Path) -> None:
    """Makes `folder` a virtual environment in which Triton's stubs run, unless it is one. InstallError where the
    machine cannot serve, or where no Python is found or fetched."""
    present = inspect(folder / "bin" / "python")
    if present is not None and present.fits and present.library and present.has_pip:
        return
    warning = check_machine(folder.parent)
    if warning:
        say(warning)
    for python in fitting_pythons():
        try:
            create_complete(python, folder)
        except InstallError as error:
            say(f"{python.executable} cannot be used: {error}")
        else:
            return
    try:
        create_complete(fetch_python(folder.parent / ".python"), folder)
    except InstallError as error:
        raise InstallError(f"{WHAT_HELPS} ({error})") from None


def fitting_pythons() -> list[Interpreter]:
    """The Pythons of this machine that serve: first those that have all, then those whose missing parts can be
    fetched."""
    fitting = [python for python in installed_pythons() if not python.why_not]
    whole = [python for python in fitting if python.library and python.makes_pip]
    return whole + [python for python in fitting if python not in whole and debian.is_packaged(python)]


def installed_pythons() -> Iterator[Interpreter]:
    """The Python that runs this, then those on PATH."""
    yield describe()
    for version in VERSIONS:
        python = inspect(shutil.which(f"python{version}") or "")
        if python is not None:
            yield python


def fetch_python(folder: Path) -> Interpreter:
    """A Python in `folder`, for this project alone. The Python that runs this installs uv there, whatever its
    version."""
    own = describe()
    say(f"{own.executable} {own.why_not or 'has no shared library'}: uv fetches Python {VERSIONS[0]} into {folder}")
    create(own, folder / "uv")
    return uv.fetch_python(folder, folder / "uv" / "bin" / "python")


def create_complete(python: Interpreter, folder: Path) -> None:
    """Makes a virtual environment with pip and the shared library."""
    create(python, folder)
    if not python.library:
        say(f"{python.executable} has no shared library: apt fetches it into {folder / 'lib'}")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            shutil.copy(debian.unpack_library(python, Path(work)), folder / "lib")


def create(python: Interpreter, folder: Path) -> None:
    """Makes a virtual environment with pip."""
    if python.makes_pip:
        run(python.executable, "-m", "venv", "--clear", folder)
        return
    run(python.executable, "-m", "venv", "--clear", "--without-pip", folder)
    say(f"{python.executable} has no ensurepip: apt fetches pip into {folder}")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        wheel = debian.unpack_pip(Path(work))
        run(
            folder / "bin" / "python", "-m", "pip", "install", "--no-index", wheel, variables={"PYTHONPATH": str(wheel)}
        )


def say(message: str) -> None:
    print(f"make: {message}", file=sys.stderr, flush=True)
