"""Progress of the current phase on standard error: one line, gone when done."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.text import Text


class _Speed(TextColumn):
    """Units per second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: RichTask) -> Text:
        return Text("" if not task.speed else f"{task.speed:,.0f}/s")


class PhaseProgress:
    """Shows one phase at a time; a phase of a new name replaces the last one."""

    def __init__(self, bars: Progress | None, lines: Console | None = None) -> None:
        self._bars = bars
        self._lines = lines
        self._name: str | None = None

    def tell(self, line: str) -> None:
        """Print a line on standard error, which stays."""
        if self._lines is not None:
            self._lines.print(line, markup=False, highlight=False, soft_wrap=True)

    def __call__(self, name: str, done: int, total: int) -> None:
        """Tell how far a phase is.

        Args:
            name: the phase.
            done: units done by this rank.
            total: units to do; 0 if not known.
        """
        if self._bars is None:
            return
        if name != self._name:
            for task in self._bars.task_ids:
                self._bars.remove_task(task)
            self._bars.add_task(name, total=total or None)
            self._name = name
        task = self._bars.task_ids[0]
        self._bars.update(task, completed=done, total=total or None)


@contextmanager
def phase_progress(console: Console | None) -> Iterator[PhaseProgress]:
    """Progress bars on this console; None, or a console that is no terminal: none."""
    if console is None:
        yield PhaseProgress(None)
        return
    if not console.is_terminal:
        yield PhaseProgress(None, Console(stderr=True))
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield PhaseProgress(bars, bars.console)
