"""The key that a server may demand: how it stands in a file, and in a request over HTTP and gRPC.

Triton looks gRPC's up under a name of its own (kRestrictedProtocolHeaderTemplate in its src/grpc/grpc_utils.h).
"""

from __future__ import annotations

import re
from pathlib import Path

NAME = "authorization"  # in lower case, as gRPC sends all names; over HTTP the case means nothing
ENVIRONMENT = "GPTJ_TRITON_API_KEY"  # where a client looks for it
GRPC_PREFIX = "triton-grpc-protocol-"
LONGEST = 1024  # characters; gRPC takes 8 KiB of metadata in all
KEY = re.compile(rf"[!-~]{{1,{LONGEST}}}")


class ApiKeyError(Exception):
    """A key cannot be used; the message is one line, and never shows the key."""


def read_key(path: Path) -> str:
    """The first line of a file, without blanks around it. Raises ApiKeyError for what is no key."""
    try:
        with path.open("rb") as file:
            line = file.readline(LONGEST + 1024)
    except OSError as error:
        raise ApiKeyError(f"{path}: {error.strerror}") from None
    return checked(line.strip(b" \t\r\n").decode("latin-1"), f"the first line of {path}")


def checked(key: str, source: str) -> str:
    """`key` itself. Raises ApiKeyError with its `source` for what is no key."""
    if KEY.fullmatch(key) is None:
        raise ApiKeyError(f"{source} is no key: it takes 1 to {LONGEST} visible ASCII characters without blanks")
    return key


def http_header(key: str) -> dict[str, str]:
    return {NAME: f"Bearer {key}"}


def grpc_metadata(key: str) -> dict[str, str]:
    return {GRPC_PREFIX + NAME: f"Bearer {key}"}
