"""A server whose engine computes nothing, to measure all but an engine. Knows nothing of requests."""

from __future__ import annotations

import contextlib
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptj_triton.bench.local_server import LocalServer, local_server

FAKE_ENGINE = Path(__file__).resolve().with_name("fake_engine.py")


@contextlib.contextmanager
def server_of_fakes(step_ms: float, arguments: Sequence[str] = ()) -> Iterator[LocalServer]:
    """Runs serve.py with `arguments` and an engine whose step takes `step_ms`. Raises ServerFailedError."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "engine")
        command = [sys.executable, str(FAKE_ENGINE), f"--step-ms={step_ms}"]
        script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        script.chmod(0o755)
        with local_server([f"--engine-python={script}", *arguments]) as server:
            yield server
