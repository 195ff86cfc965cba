"""Asks a server for one token. The exit status is 0 where it answers, or is ready but full, else 1 with one line on
stderr."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import requests

from gptj_triton.api_key import ApiKeyError, read_key
from gptj_triton.client.client import DEFAULT_URLS, Client
from gptj_triton.client.errors import ClientError, UnavailableError

KEY_FILE_VARIABLE = "GPTJ_TRITON_API_KEY_FILE"
KEY_FILE = Path("/run/secrets/gptj-triton/api-keys")  # where a container has it, if it has one
READY_SECONDS = 5.0
PAUSE_SECONDS = 1.0  # within which `ready` says that an engine has ended


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        ask(options.url, options.timeout, find_key(options.api_key_file))
    except (ApiKeyError, ClientError) as error:
        print(f"healthcheck: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="healthcheck", description=__doc__, allow_abbrev=False)
    url = DEFAULT_URLS["generate"]
    result.add_argument("--url", default=url, metavar="HOST:PORT", help=f"default: {url}")
    key_help = (
        f"its first line is the API key (default: what {KEY_FILE_VARIABLE} names, else {KEY_FILE} if it is there)"
    )
    result.add_argument("--api-key-file", type=Path, metavar="FILE", help=key_help)
    timeout_help = "how long an answer may take (default: 20)"
    result.add_argument("--timeout", type=float, default=20.0, metavar="SECONDS", help=timeout_help)
    return result


def find_key(given: Path | None) -> str | None:
    """The key in the file that is given, that the environment names, or that lies where a container has it."""
    named = given or os.environ.get(KEY_FILE_VARIABLE)
    if named:
        return read_key(Path(named))
    return read_key(KEY_FILE) if KEY_FILE.exists() else None


def ask(url: str, timeout: float, key: str | None) -> None:
    """Raises ClientError where the server does not serve. One that refuses because it has enough to do does serve:
    to end it would only make that worse."""
    with Client(url, timeout=timeout, api_key=key) as client:
        try:
            client.generate("a", max_tokens=1)
        except UnavailableError:
            time.sleep(PAUSE_SECONDS)
            if not is_ready(url):
                raise


def is_ready(url: str) -> bool:
    try:
        answer = requests.get(f"http://{url}/v2/health/ready", timeout=READY_SECONDS)
        return bool(answer.ok)
    except requests.RequestException:
        return False
