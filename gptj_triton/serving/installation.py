"""Finds tritonserver and the running Python's shared library, and makes a directory for both: `backends/` for
tritonserver and `lib/` for the loader. Knows neither models nor processes.

The stub (the process in which Triton runs a `model.py`) exists once for each Python version, and loads
`libpython3.X.so.1.0` by the loader's path, so both must be those of the interpreter that runs this file."""

from __future__ import annotations

import importlib.util
import os
import resource
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.install.interpreter import PYTHON, find_library, library_name
from gptj_triton.process.directory import RUN_VARIABLE
from gptj_triton.serving.errors import ServeError
from gptj_triton.serving.python_environment import find_programs
from gptj_triton.triton.stubs import STUB

BACKEND_LIBRARY = "libtriton_python.so"
FCHMOD, FSYNC = b"\0fchmod\0", b"\0fsync\0\0"  # names in a table of them, equally long


@dataclass(frozen=True)
class Triton:
    """One installed tritonserver and the parts of its Python backend."""

    binary: Path
    python_backend: Path  # directory with libtriton_python.so and triton_python_backend_utils.py
    stub: Path
    libraries: Path | None  # what the loader must find for it; None where the system has it


@dataclass(frozen=True)
class Stage:
    """A tritonserver, and where the backends and the loader's links for it were staged."""

    triton: Path
    backends: Path
    libraries: tuple[Path, ...]
    programs: Path

    @property
    def search_paths(self) -> dict[str, str]:
        """What goes first in the environment's search paths. The stub finds its packages through the `python3` on
        PATH."""
        return {"LD_LIBRARY_PATH": os.pathsep.join(map(str, self.libraries)), "PATH": str(self.programs)}

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with `search_paths` in front, and without the working directory in any of them,
        where an empty entry means it too. AIP_MODE is left out: with it Triton opens a port that asks for no key."""
        result = {name: value for name, value in os.environ.items() if name != "AIP_MODE"}
        for name, first in {**self.search_paths, "PYTHONPATH": ""}.items():
            others = [entry for entry in result.get(name, "").split(os.pathsep) if entry not in ("", ".")]
            result[name] = os.pathsep.join(filter(None, [first, *map(os.path.abspath, others)]))
        return result

    @property
    def shell_exports(self) -> list[str]:
        """The same as lines for a shell."""
        paths = self.search_paths.items()
        return [f'export {name}={shlex.quote(first)}"${{{name}:+:${name}}}"' for name, first in paths]


def wheel_package() -> Path | None:
    """The directory of nvidia-pytriton, found without importing it: its import takes seconds."""
    spec = importlib.util.find_spec("pytriton")
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]) if locations else None


def triton_at(binary: Path) -> Triton:
    """The tritonserver whose program is `binary`, in a directory laid out as /opt/tritonserver of NVIDIA's image: `bin`
    and `backends/python`, with one stub."""
    backend = binary.resolve().parents[1] / "backends" / "python"
    return Triton(binary, backend, backend / STUB, None)


def installed_tritons() -> Iterator[Triton]:
    """Every tritonserver there is: on PATH, a container's, the wheel's."""
    for binary in (shutil.which("tritonserver"), shutil.which("/opt/tritonserver/bin/tritonserver")):
        if binary is not None:
            yield triton_at(Path(binary))
    package = wheel_package()
    if package is not None:
        root = package / "tritonserver"
        stub = root / "python_backend_stubs" / PYTHON / STUB
        yield Triton(
            root / "bin" / "tritonserver", root / "backends" / "python", stub, package.parent / "nvidia_pytriton.libs"
        )


def find_triton(program: Path | None = None) -> Triton:
    """The tritonserver `program`, or else the first that there is; ServeError where there is none, or where it has no
    stub for this Python."""
    if program is not None and shutil.which(program.absolute()) is None:
        raise ServeError(f"--tritonserver {program}: no such program")
    triton = triton_at(program.absolute()) if program is not None else next(installed_tritons(), None)
    if triton is None:
        raise ServeError("no tritonserver on PATH, in /opt/tritonserver or as wheel: pip install nvidia-pytriton")
    if not triton.stub.is_file():
        raise ServeError(f"{triton.binary} comes without a stub for Python {PYTHON} (looked for {triton.stub})")
    # Its owner may have the right to run it and no other: Triton leaves it so when a stub ends unexpectedly.
    if os.access(triton.stub, os.R_OK) and f"libpython{PYTHON}.so".encode() not in triton.stub.read_bytes():
        raise ServeError(f"{triton.stub} is for another Python than {PYTHON}: make the environment with that Python")
    return triton


def find_python_library() -> Path:
    """`libpython3.X.so.1.0` of the running interpreter."""
    library = find_library()
    if library is None:
        raise ServeError(
            f"{sys.executable} has no {library_name(PYTHON)}, which Triton's stub loads: `make` fetches it for "
            f"the one of Debian and Ubuntu (or apt-get install libpython{PYTHON}); build others with --enable-shared"
        )
    return library


def stage_backends(root: Path, triton: Triton, fastertransformer: Path) -> Stage:
    """Fills `root` (made where absent) with `backends/python`, `backends/fastertransformer` and `lib`."""
    if not os.access(triton.stub, os.X_OK):
        raise ServeError(f"{triton.stub} may not be run by this user: chmod 755 it")
    python_library = find_python_library()
    python_backend, libraries = root / "backends" / "python", root / "lib"
    shutil.rmtree(root, ignore_errors=True)
    python_backend.mkdir(parents=True)
    libraries.mkdir()
    # A copy, because Triton refuses a backend library that a link leads out of the backend's directory.
    library = (triton.python_backend / BACKEND_LIBRARY).read_bytes()
    (python_backend / BACKEND_LIBRARY).write_bytes(with_private_regions(library))
    # A program of our own: Triton changes the mode of a stub that fails, and Python in a stub imports from the current
    # directory, so that must be an empty one. (A relative path of a model, the first argument, starts at Triton's own.)
    (root / "empty").mkdir()
    empty, stub = shlex.quote(str(root / "empty")), shlex.quote(str(triton.stub))
    change = f'case "$1" in /*) cd {empty} ;; esac'
    write_program(python_backend / STUB, f'{begin_stub()}; {change}; exec {stub} "$@"')
    utilities = "triton_python_backend_utils.py"
    (python_backend / utilities).symlink_to(triton.python_backend / utilities)
    (root / "backends" / "fastertransformer").symlink_to(fastertransformer.resolve())
    # Only this library, not its folder: the folder of some interpreters holds another libssl or libstdc++ as well.
    (libraries / python_library.name).symlink_to(python_library)
    search = [libraries]
    if triton.libraries is not None:
        # A link, because the loader gives colons, semicolons and dollar signs in a path a meaning.
        search.append(root / "triton")
        search[-1].symlink_to(triton.libraries)
    return Stage(triton.binary, root / "backends", tuple(search), find_programs(root / "python"))


def write_noted_stub(path: Path, stub: Path) -> None:
    """Writes a program that begins as every stub does and becomes `stub`, a model's own."""
    write_program(path, f'{begin_stub()}; exec {shlex.quote(str(stub))} "$@"')


def begin_stub() -> str:
    """What each stub does first, as a line for a shell: it takes a smaller stack than tritonserver's (limits.py), and
    notes its process id and the path of its model.py, its first argument, if a launcher watches (stub_watch.py)."""
    return f'ulimit -S -s {stack_limit()}; [ -z "${RUN_VARIABLE}" ] || echo "$1" > "${RUN_VARIABLE}/stubs/$$"'


def with_private_regions(library: bytes) -> bytes:
    """The Python backend's library with `fsync` in place of its only `fchmod`, by which Boost gives each new region of
    shared memory mode 0644, whatever the umask. `fsync` takes the same first argument and does nothing there.

    A library that does not import `fchmod` by that one name is left as it is."""
    return library.replace(FCHMOD, FSYNC) if library.count(FCHMOD) == 1 else library


def stack_limit() -> str:
    """The stack that this process's children may have, in KiB as a shell takes it."""
    soft = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft // 1024)


def write_program(path: Path, command: str) -> None:
    """Writes a program that is one line for a shell."""
    path.write_bytes(os.fsencode(f"#!/bin/sh\n{command}\n"))
    path.chmod(0o755)
