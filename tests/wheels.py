"""Wheels whose contents tests read or run, and do not install: what they depend on would be large, or contradict ours.
pip fetches them into build/wheels, where they stay."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from gptj_triton.project import PROJECT

FETCHED = PROJECT / "build" / "wheels"


def wheel(name: str, version: str) -> Path:
    """The file of a package without what it depends on."""
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    found = next(FETCHED.glob(pattern), None)
    if found is not None:
        return found
    FETCHED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FETCHED) as work:
        download = ["pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", work]
        subprocess.run([sys.executable, "-m", *download, f"{name}=={version}"], check=True, timeout=120)
        fetched = next(Path(work).glob(pattern))
        return fetched.rename(FETCHED / fetched.name)
