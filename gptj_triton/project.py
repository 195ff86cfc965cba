"""Where the checkout of the project is, for commands that need more than this package."""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
REPOSITORY = PROJECT / "model_repository"
BACKEND = PROJECT / "backends" / "fastertransformer"
EMBEDDED_MODEL = REPOSITORY / "fastertransformer" / "1" / "storyteller"
