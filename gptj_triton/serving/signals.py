"""The signals that the launcher waits for, once it runs a server: they are blocked, so that none is lost or interrupts
a clean-up, and are read one by one."""

from __future__ import annotations

import signal
import time

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
    STOP_SIGNALS.add(signal.SIGHUP)
WATCHED_SIGNALS = {*STOP_SIGNALS, signal.SIGCHLD}


class StopRequestedError(Exception):
    """A signal to stop came; `signal_number` is which."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


def block_signals() -> None:
    """From here on `pause` and `sleep` read them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED_SIGNALS)


def unblock_signals() -> None:
    """For a child that runs another program."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED_SIGNALS)


def pause(seconds: float) -> bool:
    """Waits that long, or until a child ends, and returns whether one has; raises StopRequestedError where a signal to
    stop comes."""
    received = signal.sigtimedwait(WATCHED_SIGNALS, max(seconds, 0.0))
    if received is not None and received.si_signo in STOP_SIGNALS:
        raise StopRequestedError(received.si_signo)
    return received is not None


def sleep(seconds: float) -> None:
    """Waits that long, whatever children do; raises StopRequestedError where a signal to stop comes."""
    deadline = time.monotonic() + seconds
    while (remaining := deadline - time.monotonic()) > 0:
        pause(remaining)
