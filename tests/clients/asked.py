"""What the clients of this folder ask for, and how they tell what they got. Needs the standard library alone."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROMPT = "Once upon a time"
PROMPTS = [PROMPT, "The wolf", "There was once a king"]
MAX_TOKENS = 24
STOP_WORD = "who"  # is in the answer to PROMPT
TOKENIZER = Path(__file__).resolve().parents[2] / "model_repository" / "fastertransformer" / "1" / "storyteller"
SECONDS = 120.0  # for one call; some clients wait for ever where something is not as they expect
# For `tell`, where a client asks a decoupled model by `infer`.
DECOUPLED = {"refused": "decoupled", "why": "Triton refuses `infer` to a decoupled model"}


@dataclass(frozen=True)
class Told:
    """What came of one call. `refused`: words of the error with which it is known to fail, and `why`."""

    way: str
    check: str
    got: str | list[str] | None = None
    pieces: int | None = None
    error: str = ""
    refused: str = ""
    why: str = ""


def read_arguments() -> argparse.Namespace:
    """Where the server is, and its models: for whole answers, and for streams. These may be the same one."""
    parser = argparse.ArgumentParser()  # without options: one of the clients reads the command line, too
    for name in ("http", "grpc", "model", "streaming_model"):
        parser.add_argument(name)
    return parser.parse_args()


def tell(
    way: str, check: str, call: Callable[[], str | list[str] | Iterable[str]], refused: str = "", why: str = ""
) -> None:
    """Prints what `call` returns: a text, a list of texts for several prompts, or an iterator over pieces."""
    told = [Told(way, check, error=f"no answer within {SECONDS:g} s", refused=refused, why=why)]

    def ask() -> None:
        try:
            got = call()
            pieces = None
            if not isinstance(got, str | list):
                parts = list(got)
                got, pieces = "".join(parts), len(parts)
            told.append(Told(way, check, got, pieces, refused=refused, why=why))
        except Exception as error:
            told.append(Told(way, check, error=f"{type(error).__name__}: {error}", refused=refused, why=why))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    print(json.dumps(asdict(told[-1])), flush=True)


def measure(way: str, command: list[str], report: str, requests: Callable[[Any], float], **known: str) -> None:
    """Runs a load generator, and tells how many requests it counted in the JSON file that it wrote; it makes 4."""

    def run() -> str:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            found = sorted(Path(folder).rglob(report))
            if done.returncode or not found:
                raise RuntimeError(f"status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
            return f"{requests(json.loads(found[0].read_text())):g} requests"

    tell(way, "measured", run, **known)


def end() -> None:
    """Ends this process at once, whatever threads wait for."""
    sys.stdout.flush()
    os._exit(0)
