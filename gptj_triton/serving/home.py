"""Makes up for a user without a name, or without a home that can be written: containers and jobs often run so."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from pathlib import Path


def missing_settings(environment: Mapping[str, str], spare: Path) -> dict[str, str]:
    """What the environment lacks for libraries that keep caches in the user's home; `spare` takes their files then."""
    found = dict[str, str]()
    entry = passwd_entry()
    if entry is None and not environment.get("LOGNAME"):
        found["LOGNAME"] = f"user{os.getuid()}"
    home = Path(environment.get("HOME") or (entry.pw_dir if entry else ""))
    if not home.is_absolute() or not home.is_dir():
        found["HOME"] = str(spare)
        home = spare
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache").absolute()
    if not may_be_written(cache):
        found["XDG_CACHE_HOME"] = str(spare / "cache")
        if not environment.get("HF_HOME"):  # which may have been filled before, and then be read only
            found["HF_HOME"] = str(cache / "huggingface")
    if not environment.get("TRITON_CACHE_DIR") and not may_be_written(home / ".triton" / "cache"):
        found["TRITON_CACHE_DIR"] = str(spare / "triton")
    return found


def passwd_entry() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return None


def may_be_written(path: Path) -> bool:
    """Whether this user may write into the directory, or make it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)
