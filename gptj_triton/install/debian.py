"""Files of Debian's and Ubuntu's packages, without root: apt fetches packages from the machine's own sources and checks
their signatures, dpkg unpacks them, and nothing is installed."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from gptj_triton.install.interpreter import Interpreter, library_name
from gptj_triton.install.programs import InstallError, run


def installed_version(package: str) -> str:
    """Version of an installed package; empty where it is not installed, or where there is no dpkg."""
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Version}", package]
    try:
        status, _, version = subprocess.run(query, capture_output=True, text=True).stdout.partition(" ")
    except OSError:
        return ""
    return version if status == "installed" else ""


def is_packaged(python: Interpreter) -> bool:
    """Whether the interpreter is Debian's or Ubuntu's own."""
    return python.prefix == "/usr" and bool(installed_version(f"libpython{python.version}-stdlib"))


def unpack_library(python: Interpreter, folder: Path) -> Path:
    """The shared library of a packaged Python, unpacked somewhere in `folder`: of the very version that is installed,
    or of the same 3.X where the archive no longer has that."""
    packages = [f"libpython{python.version}", f"libpython{python.version}t64"]  # the second is Ubuntu 24.04's name
    version = installed_version(f"libpython{python.version}-stdlib")
    return unpack([f"{package}={version}" for package in packages] + packages, library_name(python.version), folder)


def unpack_pip(folder: Path) -> Path:
    """The wheel of pip that the package python3-venv would install from, unpacked somewhere in `folder`."""
    return unpack(["python3-pip-whl"], "pip-*.whl", folder)


def unpack(packages: list[str], pattern: str, folder: Path) -> Path:
    """The file that matches `pattern` in the first of `packages` (`NAME` or `NAME=VERSION`) that can be fetched."""
    work = Path(tempfile.mkdtemp(dir=folder))
    # As if nothing were installed, so that a version which the archive has no longer is never chosen.
    apt = [*_apt(work), "-oDir::State::status=/dev/null"]
    errors = []
    for command in [["update"], *(["download", package] for package in packages)]:
        try:
            run(*apt, *command, folder=work)
        except InstallError as error:
            errors.append(error)  # a source that fails is no failure where another has the package
        for archive in work.glob("*.deb"):
            run("dpkg-deb", "--extract", archive, work / "files")
            return next((work / "files").rglob(pattern))
    raise InstallError(f"apt fetches no {packages[-1]}: {errors[0] if errors else ''}")


def unpack_all(packages: Iterable[str], folder: Path) -> Path:
    """A directory somewhere in `folder` with the files of `packages`, and of what they depend on and the machine lacks."""
    work = Path(tempfile.mkdtemp(dir=folder))
    apt = [*_apt(work), "-oDir::State::status=/var/lib/dpkg/status"]
    with contextlib.suppress(InstallError):  # a source that fails is no failure where another has the packages
        run(*apt, "update")
    run(*apt, "--yes", "--no-install-recommends", "--reinstall", "--download-only", "install", *packages)
    for archive in (work / "archives").glob("*.deb"):
        run("dpkg-deb", "--extract", archive, work / "files")
    return work / "files"


def _apt(work: Path) -> list[str]:
    """An apt with lists and downloads of its own in `work`: the machine's may be old or empty, and only root may renew
    them."""
    for kind in ("lists", "archives"):
        (work / kind / "partial").mkdir(parents=True)
    options = {
        "Dir::State": work,
        "Dir::Cache": work,
        "Debug::NoLocking": 1,
        "Acquire::Languages": "none",
        "Acquire::http::Timeout": 30,
        "Acquire::https::Timeout": 30,
    }
    return ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
