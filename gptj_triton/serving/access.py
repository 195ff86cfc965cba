"""Which of Triton's APIs ask for a key, over HTTP and gRPC alike, and which key that is. Does not start anything.

Triton compares one header for each group of APIs (its src/restricted_features.h), before it parses a request.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gptj_triton.api_key import NAME, ApiKeyError, http_header, read_key
from gptj_triton.serving.errors import ServeError
from gptj_triton.serving.hidden_arguments import Argument, Hidden, plain, why_not
from gptj_triton.serving.log import log
from gptj_triton.serving.options import Options

# All that Triton 2.51 knows but `health`, which probes ask.
ADMIN_APIS = ("shared-memory", "model-repository", "trace", "logging")
READING_APIS = ("metadata", "model-config", "statistics")
INFERENCE_API = "inference"
SHORT_KEY = 16  # characters: a shorter one may be guessed


@dataclass(frozen=True)
class Access:
    """Keys by what they open. Whoever has neither may ask for health and metrics, and for what no key closes."""

    admin_key: str = field(repr=False)  # the operator's, or one that nobody but this process knows
    api_key: str | None = field(repr=False)
    reading_needs_key: bool
    keys_are_the_users: bool  # some of them, so they must stay secret

    @property
    def admin_headers(self) -> dict[str, str]:
        """What opens everything but inference, in a request over HTTP."""
        return http_header(self.admin_key)

    @property
    def arguments(self) -> list[Hidden]:
        """tritonserver's options for all this."""
        return [
            closing(option, apis, key)
            for apis, key in self._closed()
            for option in ("http-restricted-api", "grpc-restricted-protocol")
        ]

    def _closed(self) -> Iterator[tuple[tuple[str, ...], str]]:
        reading = READING_APIS if self.reading_needs_key else ()
        if self.api_key is None:
            yield (*ADMIN_APIS, *reading), self.admin_key
        else:
            yield ADMIN_APIS, self.admin_key
            yield (INFERENCE_API, *reading), self.api_key


def closing(option: str, apis: tuple[str, ...], key: str) -> Hidden:
    """The option that closes `apis` but for those who have the key."""
    visible = f"--{option}={','.join(apis)}:{NAME}="
    return Hidden(f"{visible}(hidden)", visible + http_header(key)[NAME])


def choose_access(options: Options) -> Access:
    """What the user's options say. Raises ServeError for a file without a key."""
    operators = users_key("--open-admin-api", options.open_admin_api)
    api_key = users_key("--api-key-file", options.api_key_file)
    if operators is not None and operators == api_key:
        raise ServeError("--open-admin-api and --api-key-file hold the same key: every client would be an operator")
    open_to_others = not ipaddress.ip_address(options.address).is_loopback
    if open_to_others and api_key is None:
        words = "everybody who reaches this machine may ask for text (--api-key-file)"
        log.warn(f"--host {options.host}: {words}")
    return Access(
        admin_key=operators or secrets.token_urlsafe(32),
        api_key=api_key,
        reading_needs_key=open_to_others or api_key is not None,
        keys_are_the_users=operators is not None or api_key is not None,
    )


def users_key(option: str, path: Path | None) -> str | None:
    """The key in the file that an option names, if it was given; warns where others may come by it."""
    if path is None:
        return None
    try:
        key = read_key(path)
        about = path.stat()
    except (ApiKeyError, OSError) as error:
        raise ServeError(f"{option}: {error}") from None
    open_to = about.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if about.st_uid != os.geteuid():
        open_to &= ~stat.S_IRGRP  # by which we read it ourselves: a Kubernetes Secret belongs to root
    if stat.S_ISREG(about.st_mode) and open_to:
        log.warn(f"{option} {path}: other users may read or change it (mode {stat.S_IMODE(about.st_mode):03o})")
    if len(key) < SHORT_KEY:
        log.warn(f"{option} {path}: a key of {len(key)} characters can be guessed: take 32 random ones")
    return key


def command_with_keys(command: Sequence[Argument], access: Access) -> list[Argument]:
    """`command` and the options for `access`: hidden, or where the system does not let us, for other local users to
    see. Raises ServeError where the keys are the user's and could not be hidden."""
    whole = [*command, *access.arguments]
    reason = why_not()
    if reason is None:
        return whole
    if access.keys_are_the_users:
        raise ServeError(f"the keys would stand on tritonserver's command line, which all local users see: {reason}")
    log.warn(f"local users can see the key that closes Triton's administrative APIs: {reason}")
    return list(plain(whole))
