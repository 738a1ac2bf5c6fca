"""Progress on standard error: a bar in a terminal, a line now and then in a log file."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

# Seconds between two lines where there is no terminal: a run of an hour fills no log.
SECONDS_BETWEEN_LINES = 30.0
Clock = Callable[[], float]


class Pace:
    """What a phase has done, how fast it was so far, and how long the rest takes.

    Nothing is said that is not known: no speed before something is done, no time left
    without a total, no total that has been passed.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._phase, self._begin = "", clock()

    def told(self, name: str, done: int, total: int, unit: str, tokens: int) -> str:
        """Where the phase is, in words; arguments as of `Bar`."""
        now = self._clock()
        if name != self._phase or not done + tokens:
            # Of this name, another one has begun.
            self._phase, self._begin = name, now
        spent = now - self._begin
        known = 0 < total >= done
        parts = [f"{done:,} of {total:,} {unit}"] if known else []
        if done and not known:
            parts = [f"{done:,} {unit}"]
        if spent > 0:
            if done and known:
                parts.append(f"{_rate(done / spent)}/s")
            if tokens:
                parts.append(f"{_rate(tokens / spent)} tokens/s")
            if known and 0 < done < total:
                left = math.ceil(spent * ((total - done) / done))
                parts.append(f"{timedelta(seconds=left)} left")
        return ", ".join(parts)


def _rate(value: float) -> str:
    """Two digits at least: no rate reads as 0."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


class Bar:
    """Shows one phase at a time in a terminal; a new phase replaces the last one."""

    def __init__(self, bars: Progress, clock: Clock = time.monotonic) -> None:
        self._bars, self._pace = bars, Pace(clock)
        self._shown: tuple[str, TaskID] | None = None

    def __call__(
        self, name: str, done: int, total: int, unit: str = "tokens", tokens: int = 0
    ) -> None:
        """Tell how far a phase is.

        Args:
            done: units done by this rank.
            total: units to do; 0 if not known.
            unit: what is counted.
            tokens: tokens done, where something else is counted.
        """
        if self._shown is None or self._shown[0] != name:
            if self._shown is not None:
                self._bars.remove_task(self._shown[1])
            self._shown = (name, self._bars.add_task(name, count=""))
        self._bars.update(
            self._shown[1],
            completed=done,
            # Without a total the bar only moves.
            total=total if total >= done and total else None,
            count=self._pace.told(name, done, total, unit, tokens),
        )

    def tell(self, line: str) -> None:
        """Print a line that stays, above the bar."""
        _print_line(self._bars.console, line)


class Lines:
    """Writes where a phase is, if the last line is long ago."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._console, self._clock, self._pace = console, clock, Pace(clock)
        self._last = clock()

    def __call__(
        self, name: str, done: int, total: int, unit: str = "tokens", tokens: int = 0
    ) -> None:
        """Tell how far a phase is; arguments as of `Bar`."""
        where = self._pace.told(name, done, total, unit, tokens)
        now = self._clock()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        _print_line(self._console, f"{name}: {where}" if where else name)

    def tell(self, line: str) -> None:
        """Print a line now."""
        _print_line(self._console, line)


def _print_line(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def phase_progress(
    console: Console | None,
) -> Iterator[Callable[..., None]]:
    """What phases tell their progress to; without a console, to nobody."""
    if console is None:
        yield lambda *_: None
        return
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[count]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as bars:
        yield Bar(bars)
