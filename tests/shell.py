"""The environment of a user's new shell, for commands that tests run as a user runs them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# What a login shell sets, and what tells pip where packages are.
KEPT = ("HOME", "USER", "LANG", "TMPDIR", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
KEPT_PREFIXES = ("PIP_", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of Python, of a virtual environment, and of the tests themselves."""
    kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith(KEPT_PREFIXES)}
    own = {Path(sys.prefix, "bin"), Path(sys.executable).parent}
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return kept | {"PATH": os.pathsep.join(folder for folder in folders if Path(folder) not in own)}
