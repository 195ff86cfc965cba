"""Programs that are run, and the error where they or the machine cannot do what is needed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class InstallError(Exception):
    """Nothing can be installed here; the message is one line, and says why."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def run(*command: str | Path, folder: Path | None = None, variables: dict[str, str] | None = None) -> None:
    """Runs a program, with `variables` in its environment. Raises InstallError with its own words where it fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, cwd=folder, env={**os.environ, **(variables or {})}, capture_output=True, text=True
        )
    except OSError as error:
        raise InstallError(str(error)) from None
    if done.returncode:
        raise InstallError(done.stderr or done.stdout or f"{' '.join(words)} ended with status {done.returncode}")
