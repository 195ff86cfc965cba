"""Starts a program some of whose arguments nobody sees, for Linux on x86-64. Knows no program.

Every user of a machine may read the command line of every process, in /proc/PID/cmdline. So the program is started with
harmless words, and traced (ptrace(2)) until its first instruction. There its argument vector is moved down its stack,
and the true arguments are written between the vector's new place and its old one. The kernel goes on showing the words;
what was written is in the program's own memory alone, neither in /proc/PID/environ nor in what its children inherit.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

SHELL = "/bin/sh"
# sys/ptrace.h
PTRACE_TRACEME, PTRACE_GETREGS, PTRACE_SETREGS, PTRACE_DETACH = 0, 12, 13, 17
# struct user_regs_struct of x86-64, sys/user.h: 27 words, of which rsp is the twentieth
Registers = ctypes.c_uint64 * 27
STACK_POINTER = 19
WORD = 8  # bytes
LONGEST_VECTOR = 1 << 20  # bytes
STACK_ALIGNMENT = 16  # bytes, System V ABI for x86-64, 3.4.1


@dataclass(frozen=True)
class Hidden:
    """An argument of which the system shows `shown`, and the program gets `value`."""

    shown: str
    value: str = field(repr=False)


Argument = str | Hidden


def start(command: Sequence[Argument], prepare: Callable[[], None], **options: Any) -> subprocess.Popen[bytes]:
    """`subprocess.Popen` with a command that may have hidden arguments; `prepare` runs in the child.

    Raises OSError where an argument cannot be hidden; the program has not begun then. Only the calling thread can trace
    it."""
    hidden = {each.shown: each.value for each in command if isinstance(each, Hidden)}

    def prepare_and_stop() -> None:
        prepare()
        if hidden:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTRAP})  # by which it stops, once it is the program
            ptrace(PTRACE_TRACEME, 0)

    words = [each.shown if isinstance(each, Hidden) else each for each in command]
    try:
        process = subprocess.Popen(words, preexec_fn=prepare_and_stop, **options)
    except subprocess.SubprocessError:  # without a word of what failed in `prepare_and_stop`
        raise OSError("ptrace is refused") from None
    if hidden:
        try:
            put_in(process.pid, words[0], hidden)
            ptrace(PTRACE_DETACH, process.pid)
        except BaseException:
            end(process)
            raise
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a traced process and collects its status. `Popen.kill` looks first, and takes its stop for its end."""
    os.kill(process.pid, signal.SIGKILL)
    while os.WIFSTOPPED(status := os.waitpid(process.pid, 0)[1]):
        pass
    process.returncode = os.waitstatus_to_exitcode(status)
    process.communicate()


def plain(command: Sequence[Argument]) -> list[str]:
    """The command with all its arguments for everybody to see."""
    return [each.value if isinstance(each, Hidden) else each for each in command]


def why_not() -> str | None:
    """Why no argument can be hidden here, or None. It is tried, on a shell."""
    if platform.machine() != "x86_64":
        return f"not made for {platform.machine()}"
    probe: list[Argument] = [SHELL, "-c", 'echo "$0"', Hidden("shown", "hidden")]
    try:
        with start(probe, lambda: None, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            printed = process.communicate()[0]
    except OSError as error:
        return str(error)
    return None if printed == b"hidden\n" else f"{SHELL} printed {printed!r}"


def put_in(pid: int, program: str, hidden: dict[str, str]) -> None:
    """Gives the traced process `pid`, stopped before its first instruction, the true values of its arguments."""
    stopped = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    if stopped is None or stopped.si_code != os.CLD_TRAPPED or stopped.si_status != signal.SIGTRAP:
        raise OSError(f"{program} did not stop where its arguments can be changed")
    if not os.path.samefile(f"/proc/{pid}/exe", program):
        raise OSError(f"{program} is a script, and would hand its arguments on to another program")
    registers = Registers()
    ptrace(PTRACE_GETREGS, pid, ctypes.byref(registers))
    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        registers[STACK_POINTER] = move_vector(memory, registers[STACK_POINTER], hidden)
    finally:
        os.close(memory)
    ptrace(PTRACE_SETREGS, pid, ctypes.byref(registers))


def move_vector(memory: int, start: int, hidden: dict[str, str]) -> int:
    """Writes a copy of the vector at address `start` below it, with the true arguments; the copy's address.

    The vector of a new program is, in words: the number of arguments, the address of each, 0, the address of each
    variable of the environment, 0, and pairs (the auxiliary vector), of which the last begins with 0."""
    read = os.pread(memory, LONGEST_VECTOR, start)
    words = array("Q", read[: len(read) // WORD * WORD])
    environment = words[0] + 2
    pair = words.index(0, environment) + 1
    while words[pair] != 0:
        pair += 2
    vector, texts = words[: pair + 2], b""
    room = sum(len(os.fsencode(value)) + 1 for value in hidden.values())
    for place in range(1, environment - 1):
        value = hidden.get(os.fsdecode(read_text(memory, vector[place])))
        if value is not None:
            vector[place] = start - room + len(texts)
            texts += os.fsencode(value) + b"\0"
    if len(texts) != room:
        raise OSError("the arguments are not where the program looks for them")
    moved = (start - room - len(vector) * WORD) // STACK_ALIGNMENT * STACK_ALIGNMENT
    written = vector.tobytes().ljust(start - room - moved, b"\0") + texts
    if os.pwrite(memory, written, moved) != len(written):
        raise OSError("the stack has no room for the arguments")
    return moved


def read_text(memory: int, address: int) -> bytes:
    """The bytes at an address up to the first zero."""
    return os.pread(memory, LONGEST_VECTOR, address).partition(b"\0")[0]


def ptrace(request: int, pid: int, data: Any = None) -> None:
    """Raises OSError where the system refuses it: a container's profile (seccomp), or Yama."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    if libc.ptrace(request, pid, None, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")
