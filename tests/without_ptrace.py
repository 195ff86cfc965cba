"""Runs a command whose processes may not trace each other, as in a container with a strict profile:
`without_ptrace.py COMMAND…`, on x86-64."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2  # linux/prctl.h, linux/seccomp.h
SYS_PTRACE = 101
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h: LD|W|ABS, JMP|JEQ|K, RET|K
ERRNO, ALLOW = 0x00050000, 0x7FFF0000
# struct sock_filter: operation, jumps, operand. The number of the system call is at offset 0.
PROGRAM = [
    (LOAD, 0, 0, 0),
    (JUMP_IF_EQUAL, 0, 1, SYS_PTRACE),
    (RETURN, 0, 0, ERRNO | errno.EPERM),
    (RETURN, 0, 0, ALLOW),
]

code = b"".join(struct.pack("HBBI", *line) for line in PROGRAM)
buffer = ctypes.create_string_buffer(code)
program = struct.pack("HxxxxxxQ", len(PROGRAM), ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)):
    if libc.prctl(*arguments) != 0:
        sys.exit(os.strerror(ctypes.get_errno()))
os.execvp(sys.argv[1], sys.argv[1:])
