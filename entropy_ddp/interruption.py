"""Signals that ask this process to end, as an exception that unwinds it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED = 1
# A terminal's Ctrl-C, a scheduler's or launcher's end, a terminal that was closed.
_WORDS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "terminated",
}


class Interrupted(BaseException):
    """A signal asks this process to end; the message is one word.

    No `Exception`, so that nothing on the way takes it for a failure of its own.
    """


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let the first signal to end raise `Interrupted` in the main thread.

    Later ones are ignored, so that cleaning up is not cut short, except a second SIGINT:
    someone insists, and the process ends at once. A signal that was ignored before (under
    nohup, in a background job) stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if raised:
            if number == signal.SIGINT:
                os._exit(EXIT_INTERRUPTED)
            return
        raised = True
        raise Interrupted(_WORDS[signal.Signals(number)])

    earlier = {
        number: signal.signal(number, interrupt)
        for number in _WORDS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Let nothing cut short what says why this process ends."""
    if threading.current_thread() is threading.main_thread():
        for number in _WORDS:
            signal.signal(number, signal.SIG_IGN)
