"""The directory for temporary files, and which paths Triton can be told. Does not know what is written there."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

# Triton starts a stub by a line for a shell, and does not quote the paths in it.
PLAIN_PATH = re.compile(r"[A-Za-z0-9_./+,@%=-]+")
LONGEST_TEMPORARY = 44  # bytes; the path of a socket below it has 107 at most
OTHER_TEMPORARIES = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))


def temporary_directory() -> Path:
    """Python's directory for temporary files, TMPDIR or /tmp, where its path suits Triton and sockets; else another.

    Raises OSError where there is none.
    """
    given = Path(tempfile.gettempdir()).absolute()
    for path in (given, *OTHER_TEMPORARIES):
        if is_plain(path) and len(str(path)) <= LONGEST_TEMPORARY and may_hold_programs(path):
            return path
    raise OSError(
        f"TMPDIR {str(given)!r} needs a path of at most {LONGEST_TEMPORARY} letters, digits and _ . / + , @ % = - on a "
        f"file system that may hold programs, and {', '.join(map(str, OTHER_TEMPORARIES))} do not serve either"
    )


def is_plain(path: Path) -> bool:
    """Whether a path means itself in a line for a shell."""
    return PLAIN_PATH.fullmatch(str(path)) is not None


def may_hold_programs(path: Path) -> bool:
    """Whether this user may write files there, and run them."""
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK) and not os.statvfs(path).f_flag & os.ST_NOEXEC
