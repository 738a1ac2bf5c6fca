"""Signals that ask this process to end, as an exception that unwinds it."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from entropy_ddp.files import remove_temporary

EXIT_INTERRUPTED = 1
# For the main thread to come back from a call into C, and to unwind.
GRACE_SECONDS = 3.0
# A terminal's Ctrl-C, a scheduler's or launcher's end, a terminal that was closed.
_WORDS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "terminated",
}
_IMPORTING = "<frozen importlib._bootstrap>"


class Interrupted(BaseException):
    """A signal asks this process to end; the message is one word.

    No `Exception`, so that nothing on the way takes it for a failure of its own.
    """


@contextmanager
def signals_raise(leave: Callable[[Interrupted], object]) -> Iterator[None]:
    """Let the first signal to end raise `Interrupted` in the main thread.

    Later ones are ignored, so that cleaning up is not cut short, except a second SIGINT:
    someone insists, and the process ends at once. A signal that was ignored before (under
    nohup, in a background job) stays so.

    Args:
        leave: ends the process where it cannot be unwound: at once while a module is
            imported, as libraries take the exception for a failure of their own and go
            on half made; after `GRACE_SECONDS`, in another thread, if the main one does
            not come back from a call into C or does not unwind.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised, over, leaving = False, threading.Event(), threading.Lock()

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if raised:
            if number == signal.SIGINT:
                os._exit(EXIT_INTERRUPTED)
            return
        raised = True
        interrupted = Interrupted(_WORDS[signal.Signals(number)])
        if _imports(frame):
            with leaving:
                over.set()
            leave(interrupted)
        raise interrupted

    earlier = {
        number: signal.signal(number, interrupt)
        for number in _WORDS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    # Python's own handlers wait for the main thread; a byte here does not.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def guard() -> None:
        # To the end, as nobody must write to a pipe that nobody reads.
        with open(reader, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] in _WORDS and not over.wait(GRACE_SECONDS):
                    with leaving:
                        if not over.is_set():
                            leave(Interrupted(_WORDS[signal.Signals(number[0])]))

    threading.Thread(target=guard, daemon=True).start()
    try:
        yield
    finally:
        # If the other thread leaves, this one goes no further.
        with leaving:
            over.set()
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False


def ignore_signals() -> None:
    """Let nothing cut short what says why this process ends."""
    if threading.current_thread() is threading.main_thread():
        for number in _WORDS:
            signal.signal(number, signal.SIG_IGN)


def end_at_once(code: int) -> NoReturn:
    """End this process without the interpreter's own end.

    That waits for threads, of a group that has lost a rank for ever, and takes seconds
    on a busy machine.
    """
    remove_temporary()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(code)
