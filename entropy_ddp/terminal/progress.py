"""Progress on standard error: a bar in a terminal, a line now and then in a log file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

# Seconds between two lines where there is no terminal: a run of an hour fills no log.
SECONDS_BETWEEN_LINES = 30.0


class Bar:
    """Shows one phase at a time in a terminal; a new phase replaces the last one."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._shown: tuple[str, TaskID] | None = None

    def __call__(self, name: str, done: int, total: int, unit: str = "tokens") -> None:
        """Tell how far a phase is.

        Args:
            name: the phase.
            done: units done by this rank.
            total: units to do; 0 if not known.
            unit: what is counted.
        """
        if self._shown is None or self._shown[0] != name:
            if self._shown is not None:
                self._bars.remove_task(self._shown[1])
            self._shown = (name, self._bars.add_task(name, count=""))
        task = self._shown[1]
        speed = self._bars.tasks[0].speed
        count = f"{done:,}/{total:,} {unit}" if total else ""
        count += f", {speed:,.0f}/s" if speed else ""
        self._bars.update(task, completed=done, total=total or None, count=count)

    def tell(self, line: str) -> None:
        """Print a line that stays, above the bar."""
        _print_line(self._bars.console, line)


class Lines:
    """Writes where a phase is, if the last line is long ago."""

    def __init__(
        self, console: Console, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._clock = console, clock
        self._last = clock()
        self._phase = ("", self._last)

    def __call__(self, name: str, done: int, total: int, unit: str = "tokens") -> None:
        """Tell how far a phase is; arguments as of `Bar`."""
        now = self._clock()
        if self._phase[0] != name:
            self._phase = (name, now)
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        line = name
        spent = now - self._phase[1]
        if total:
            line += f": {done:,} of {total:,} {unit}"
        if done and spent > 0:
            left = timedelta(seconds=round(spent / done * (total - done)))
            line += f", {done / spent:,.0f}/s, {left} left"
        self._console.print(line, highlight=False, soft_wrap=True)

    def tell(self, line: str) -> None:
        """Print a line now."""
        _print_line(self._console, line)


def _print_line(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def phase_progress(
    console: Console | None,
) -> Iterator[Callable[..., None]]:
    """What phases tell their progress to.

    Args:
        console: standard error; None for nobody.
    """
    if console is None:
        yield lambda *_: None
        return
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield Bar(bars)
