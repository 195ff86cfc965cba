"""Finds tritonserver and the running Python's shared library, and makes a directory for both: `backends/` for
tritonserver and `lib/` for the loader. Knows neither models nor processes.

The stub (the process in which Triton runs a `model.py`) exists once for each Python version, and loads
`libpython3.X.so.1.0` by the loader's path, so both must be those of the interpreter that runs this file."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptj_triton.install.interpreter import PYTHON, find_library, library_name
from gptj_triton.serving.errors import ServeError

STUB = "triton_python_backend_stub"


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

    @property
    def search_paths(self) -> dict[str, str]:
        """What goes first in the environment's search paths. The stub finds its packages through the `python3` on
        PATH, so that must be this environment's."""
        return {"LD_LIBRARY_PATH": os.pathsep.join(map(str, self.libraries)), "PATH": str(Path(sys.prefix) / "bin")}

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with `search_paths` in front."""
        result = dict(os.environ)
        for name, first in self.search_paths.items():
            result[name] = os.pathsep.join(filter(None, [first, result.get(name)]))
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


def installed_tritons() -> Iterator[Triton]:
    """Every tritonserver there is: on PATH, a container's, the wheel's."""
    for binary in (shutil.which("tritonserver"), shutil.which("/opt/tritonserver/bin/tritonserver")):
        if binary is not None:
            backend = Path(binary).resolve().parents[1] / "backends" / "python"
            yield Triton(Path(binary), backend, backend / STUB, None)
    package = wheel_package()
    if package is not None:
        root = package / "tritonserver"
        stub = root / "python_backend_stubs" / PYTHON / STUB
        yield Triton(
            root / "bin" / "tritonserver", root / "backends" / "python", stub, package.parent / "nvidia_pytriton.libs"
        )


def find_triton() -> Triton:
    """The first tritonserver there is; ServeError where there is none, or none with a stub for this Python."""
    triton = next(installed_tritons(), None)
    if triton is None:
        raise ServeError("no tritonserver on PATH, in /opt/tritonserver or as wheel: pip install nvidia-pytriton")
    if not triton.stub.is_file():
        raise ServeError(f"{triton.binary} comes without a stub for Python {PYTHON} (looked for {triton.stub})")
    if f"libpython{PYTHON}.so".encode() not in triton.stub.read_bytes():
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
    python_library = find_python_library()
    python_backend, libraries = root / "backends" / "python", root / "lib"
    shutil.rmtree(root, ignore_errors=True)
    python_backend.mkdir(parents=True)
    libraries.mkdir()
    # A copy, because Triton refuses a backend library that a link leads out of the backend's directory.
    shutil.copy(triton.python_backend / "libtriton_python.so", python_backend)
    (python_backend / STUB).symlink_to(triton.stub)
    utilities = "triton_python_backend_utils.py"
    (python_backend / utilities).symlink_to(triton.python_backend / utilities)
    (root / "backends" / "fastertransformer").symlink_to(fastertransformer.resolve())
    # Only this library, not its folder: the folder of some interpreters holds another libssl or libstdc++ as well.
    (libraries / python_library.name).symlink_to(python_library)
    return Stage(triton.binary, root / "backends", tuple(filter(None, (libraries, triton.libraries))))
