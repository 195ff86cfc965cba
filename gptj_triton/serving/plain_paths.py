"""Other names for paths that cannot be told to Triton: its stubs read ASCII only, in any locale. Does not know what the
paths are for."""

from __future__ import annotations

import shlex
from pathlib import Path

from gptj_triton.checkpoint.files import SPLIT_DIRECTORY
from gptj_triton.process.temporary import is_plain
from gptj_triton.serving.installation import write_program


class PlainPaths:
    """Makes links and programs in the directory `folder`, whose own path is plain. A plain path stays as it is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._originals: dict[str, str] = {}

    def directory(self, path: Path, name: str) -> Path:
        """A path of the directory `path`, by a link `name`. What is looked for beside it is found there too."""
        if is_plain(path):
            return path
        link = self._folder / name
        # The reader of FasterTransformer's files knows these directories by name, and looks into their parent.
        is_split = SPLIT_DIRECTORY.fullmatch(path.name)
        link.symlink_to(path.parent if is_split else path)
        plain = link / path.name if is_split else link
        self._originals[str(plain)] = str(path)
        return plain

    def program(self, path: str, name: str) -> str:
        """A path that runs the program `path`."""
        if is_plain(Path(path)):
            return path
        write_program(self._folder / name, f'exec {shlex.quote(path)} "$@"')
        return str(self._folder / name)

    def in_users_words(self, message: str) -> str:
        """`message` with the paths that the user knows."""
        for plain, original in self._originals.items():
            message = message.replace(plain, original)
        return message
