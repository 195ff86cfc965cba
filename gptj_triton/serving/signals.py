"""The signals that the launcher waits for, once it runs a server: they are blocked, so that none is lost or interrupts
a clean-up, and are read one by one."""

from __future__ import annotations

import signal

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
    """From here on `next_signal` reads them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED_SIGNALS)


def unblock_signals() -> None:
    """For a child that runs another program."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED_SIGNALS)


def next_signal(seconds: float) -> int | None:
    """The next of the watched signals, or None when none came in time."""
    received = signal.sigtimedwait(WATCHED_SIGNALS, max(seconds, 0.0))
    return None if received is None else received.si_signo


def pause(seconds: float) -> None:
    """Waits that long, less where a child ended; raises StopRequestedError where a signal to stop comes."""
    received = next_signal(seconds)
    if received in STOP_SIGNALS:
        raise StopRequestedError(received)
