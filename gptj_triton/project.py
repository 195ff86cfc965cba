"""Where the checkout of this project is, for commands that need more than this package."""

from __future__ import annotations

from pathlib import Path


def find_checkout(package: Path, current: Path) -> Path:
    """The directory around `package` where that holds a model repository, as in a checkout installed with `pip install
    -e`; else the current directory."""
    return package.parent if (package.parent / "model_repository").is_dir() else current.absolute()


PROJECT = find_checkout(Path(__file__).resolve().parent, Path())  # the current directory may be gone
REPOSITORY = PROJECT / "model_repository"
BACKEND = PROJECT / "backends" / "fastertransformer"
EMBEDDED_MODEL = REPOSITORY / "fastertransformer" / "1" / "storyteller"


def require_checkout(project: Path = PROJECT) -> None:
    """Raises FileNotFoundError, in one line, where `project` is no checkout."""
    if not (project / "model_repository").is_dir() or not (project / "backends").is_dir():
        raise FileNotFoundError(f"{project} is no checkout of gptj-triton: run this command in one")
