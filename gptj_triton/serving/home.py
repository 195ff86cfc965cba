"""Makes up for a user without a name, or without a home that can be written: containers and jobs often run so."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Mapping
from pathlib import Path


def missing_settings(environment: Mapping[str, str], spare: Path) -> dict[str, str]:
    """What the environment lacks for libraries that keep caches in the user's home; `spare` takes their files then."""
    found = dict[str, str]()
    entry = passwd_entry()
    if entry is None and not environment.get("LOGNAME"):
        found["LOGNAME"] = f"user{os.getuid()}"
    home = Path(environment.get("HOME") or (entry.pw_dir if entry else ""))
    if not home.is_absolute() or not os.path.isdir(home):  # Path.is_dir raises where another user's home is closed
        found["HOME"] = str(spare)
        home = spare
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache").absolute()
    if not may_be_written(cache):
        found["XDG_CACHE_HOME"] = str(spare / "cache")
        if not environment.get("HF_HOME"):  # which may have been filled before, and then be read only
            found["HF_HOME"] = str(cache / "huggingface")
    if not environment.get("TRITON_CACHE_DIR") and not may_be_written(home / ".triton" / "cache"):
        found["TRITON_CACHE_DIR"] = str(spare / "triton")
    if not environment.get("TORCHINDUCTOR_CACHE_DIR"):  # torch makes one for temporary files, and leaves it there
        found["TORCHINDUCTOR_CACHE_DIR"] = str(spare / "torchinductor")
    return found


def passwd_entry() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return None


def may_be_written(path: Path) -> bool:
    """Whether this user may write into the directory, or make it. It is tried: rights alone do not tell."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    try:
        with tempfile.TemporaryDirectory(dir=path):
            return True
    except OSError:
        return False
