"""A Python for this project alone, by the program uv of PyPI: for machines whose own Python does not fit."""

from __future__ import annotations

from pathlib import Path

from gptj_triton.install.interpreter import VERSIONS, Interpreter, inspect
from gptj_triton.install.programs import InstallError, run
from gptj_triton.project import PROJECT


def fetch_python(folder: Path, python_with_pip: Path) -> Interpreter:
    """The first of VERSIONS, installed in `folder` by a uv that is installed with `python_with_pip`."""
    run(python_with_pip, "-m", "pip", "install", "--quiet", "--constraint", PROJECT / "constraints.txt", "uv")
    settings = {"UV_PYTHON_INSTALL_DIR": str(folder), "UV_CACHE_DIR": str(folder / "cache")}
    install = ["python", "install", "--managed-python", "--no-bin", VERSIONS[0]]
    run(python_with_pip, "-m", "uv", *install, variables=settings)
    for executable in folder.glob(f"cpython-{VERSIONS[0]}.*/bin/python{VERSIONS[0]}"):
        python = inspect(executable)
        if python is not None and python.fits and python.library:
            return python
    raise InstallError(f"uv installed no Python {VERSIONS[0]} that fits in {folder}")
