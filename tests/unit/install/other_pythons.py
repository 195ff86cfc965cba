"""Interpreters of this machine that Triton has no stub for: on PATH, and pyenv's, whose names on PATH need not run."""

from __future__ import annotations

import shutil
from pathlib import Path

from gptj_triton.install.interpreter import Interpreter, inspect

NAMES = [f"python3.{minor}" for minor in (7, 8, 9, 13, 14)]
PATHS = [
    *(path for name in NAMES if (path := shutil.which(name))),
    *(str(path) for name in NAMES for path in Path.home().glob(f".pyenv/versions/*/bin/{name}")),
]
OTHERS: list[Interpreter] = list(filter(None, map(inspect, PATHS)))
