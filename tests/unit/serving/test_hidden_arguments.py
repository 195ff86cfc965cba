"""Arguments that a program gets and nobody sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gptj_triton.serving import hidden_arguments
from gptj_triton.serving.hidden_arguments import Hidden, plain, start, why_not

WITHOUT_PTRACE = Path(__file__).parents[2] / "without_ptrace.py"
PYTHON = str(Path(sys.executable).resolve())
# Prints its arguments and waits for the end of its input; so do its environment and those of its children.
REPORT = (
    "import os, sys, subprocess; print(sys.argv[1:], flush=True); print(b'SECRET' in open('/proc/self/environ','rb')"
    ".read(), subprocess.check_output(['env']).count(b'SECRET'), flush=True); sys.stdin.read()"
)


def nothing() -> None:
    pass


def run(*arguments: str | Hidden) -> tuple[list[str], bytes]:
    """What a program prints that was started with these arguments, and its command line as others see it."""
    process = start(
        [PYTHON, "-c", REPORT, *arguments], nothing, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"A": "1"}
    )
    assert process.stdout is not None
    lines = [process.stdout.readline().decode().strip() for _ in range(2)]
    seen = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    process.communicate()
    assert process.returncode == 0
    return lines, seen


def test_the_program_gets_what_others_do_not_see() -> None:
    lines, seen = run(
        "a", Hidden("--key=(hidden)", "--key=SECRET of mine"), "", Hidden("(2)", "é SECRET " + "x" * 2000)
    )
    assert lines == [f"['a', '--key=SECRET of mine', '', 'é SECRET {'x' * 2000}']", "False 0"]
    assert seen.endswith(b"\0a\0--key=(hidden)\0\0(2)\0")
    assert b"SECRET" not in seen.partition(b"-c\0" + REPORT.encode())[2]


def test_a_command_without_hidden_arguments_is_not_traced() -> None:
    lines, _ = run("a")
    assert lines[0] == "['a']"


@pytest.mark.parametrize("length", range(1, 40, 3))
def test_arguments_of_any_length_leave_the_stack_aligned(length: int) -> None:
    process = start(["/bin/echo", Hidden("x", "y" * length)], nothing, stdout=subprocess.PIPE)
    assert process.communicate()[0] == b"y" * length + b"\n"
    assert process.returncode == 0


def test_a_large_environment_moves_along() -> None:
    environment = {f"NAME{number}": str(number) for number in range(2000)}
    process = start(["/usr/bin/env", Hidden("x", "LAST=SECRET")], nothing, stdout=subprocess.PIPE, env=environment)
    printed = process.communicate()[0].decode().split()
    assert printed == [*(f"{name}={value}" for name, value in environment.items()), "LAST=SECRET"]


def test_a_script_is_refused_because_it_would_hand_them_on(tmp_path: Path) -> None:
    script = tmp_path / "tritonserver"
    script.write_text(f'#!/bin/sh\ntouch {tmp_path}/run\nexec /bin/echo "$@"\n')
    script.chmod(0o755)
    with pytest.raises(OSError, match="tritonserver is a script"):
        start([str(script), Hidden("x", "SECRET")], nothing)
    assert not (tmp_path / "run").exists()


def test_a_program_that_cannot_get_them_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Popen.kill looks first whether it has ended, and takes the stop of a traced process for that."""
    before = psutil.Process().children()
    monkeypatch.setattr(hidden_arguments, "read_text", lambda memory, address: b"")
    with pytest.raises(OSError, match="not where the program looks"):
        start(["/bin/sleep", Hidden("x", "600")], nothing)
    assert psutil.Process().children() == before


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no/such"):
        start(["/no/such", Hidden("x", "SECRET")], nothing)


def test_neither_words_nor_errors_show_the_value() -> None:
    assert "SECRET" not in repr(Hidden("x", "SECRET"))
    assert plain(["a", Hidden("x", "y")]) == ["a", "y"]


def test_here_it_works() -> None:
    assert why_not() is None


def test_where_tracing_is_refused_that_is_said() -> None:
    code = "from gptj_triton.serving.hidden_arguments import why_not; print(why_not())"
    done = subprocess.run(
        [sys.executable, str(WITHOUT_PTRACE), sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "ptrace is refused\n"
