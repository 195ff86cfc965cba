"""What tritonserver may use and what others may read, set in its process before it begins. Its stubs get their stack
back (installation.py) and its engine may write files of any size (triton/engine_process.py)."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Sequence
from pathlib import Path

from gptj_triton.serving.hidden_arguments import Argument, plain
from gptj_triton.serving.triton_options import is_or_abbreviates

MIB = 1 << 20
# Triton 2.51 parses JSON and lists chunks on the stack: 80 bytes a nested bracket, 16 a chunk. Each of its threads has
# as much; memory is taken only where it is used.
STACK_BYTES = 512 * MIB
# No region of shared memory may become longer, since none ever becomes shorter. A request that needs more is refused.
REGION_BYTES = 64 * MIB
# With these it writes files of its user's, which must not end there.
FILE_OPTIONS = ("log-file", "trace-file", "trace-config")


def limit_server(command: Sequence[Argument]) -> None:
    """Sets the limits of the calling process, which is to become tritonserver with this `command`."""
    os.umask(0o077)
    if not unused_memory_counts():
        set_soft_limit(resource.RLIMIT_STACK, STACK_BYTES)
    if not writes_files(plain(command)):
        set_soft_limit(resource.RLIMIT_FSIZE, REGION_BYTES)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that growing fails, with an error, and kills nobody


def unused_memory_counts() -> bool:
    """Whether memory counts that is only reserved: 170 threads' stacks would not fit then."""
    limits = [resource.getrlimit(which)[0] for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    try:
        overcommit = Path("/proc/sys/vm/overcommit_memory").read_text().strip()
    except OSError:
        overcommit = ""
    return overcommit == "2" or any(limit != resource.RLIM_INFINITY for limit in limits)


def writes_files(command: Sequence[str]) -> bool:
    return any(is_or_abbreviates(argument, FILE_OPTIONS) for argument in command)


def set_soft_limit(which: int, value: int) -> None:
    """As far as the hard limit allows."""
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
