"""Recognises what stands in a directory in place of a file whose content is elsewhere."""

from __future__ import annotations

from pathlib import Path

from gptj_triton.errors import ConfigError

# The first bytes of a pointer. Source: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_stand_in(path: Path) -> None:
    """Raise ConfigError, which says what to do, where `path` is a Git LFS pointer or a link to nothing.

    Whatever else is wrong with a file is said by whoever reads it.
    """
    if path.is_symlink() and not path.exists():
        raise ConfigError(
            f"{path} is a link to {path.readlink()}, which does not exist: copy the file itself, or its target too "
            "(the hub's cache keeps all files in its directory blobs)"
        )
    if not path.is_file():
        return  # a pipe could be read only once
    try:
        with path.open("rb") as file:
            start = file.read(len(GIT_LFS_POINTER))
    except OSError:
        return
    if start == GIT_LFS_POINTER:
        raise ConfigError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}")
