"""Is progress told where it can be seen, in a terminal and in a log file?"""

import io

from rich.console import Console

from entropy_ddp.terminal.progress import (
    SECONDS_BETWEEN_LINES,
    Lines,
    phase_progress,
)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_short_run_fills_no_log() -> None:
    console, clock = Console(file=io.StringIO(), width=100), Clock()
    tell = Lines(console, clock)
    for done in range(10):
        clock.now += SECONDS_BETWEEN_LINES / 11
        tell("truth: E after the step", done, 10)
    assert console.file.getvalue() == ""


def test_a_long_run_says_how_far_it_is() -> None:
    """What is done, how fast, and the time that the rest takes at that speed."""
    console, clock = Console(file=io.StringIO(), width=100), Clock()
    tell = Lines(console, clock)
    tell("step", 0, 0)
    clock.now += 50.0
    tell("truth: E after the step", 0, 40_000)
    clock.now += 40.0
    tell("truth: E after the step", 10_000, 40_000)
    tell("truth: E after the step", 10_001, 40_000)
    first, second = console.file.getvalue().splitlines()
    assert first == "truth: E after the step: 0 of 40,000 tokens"
    expected = "10,000 of 40,000 tokens, 250/s, 0:02:00 left"
    assert second == f"truth: E after the step: {expected}"


def test_the_unit_is_named() -> None:
    console, clock = Console(file=io.StringIO(), width=100), Clock()
    tell = Lines(console, clock)
    tell("sample E", 0, 64, "responses")
    clock.now += 2 * SECONDS_BETWEEN_LINES
    tell("sample E", 16, 64, "responses")
    assert "16 of 64 responses" in console.file.getvalue()


def test_a_terminal_shows_speed_and_leaves_nothing() -> None:
    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=True, color_system=None)
    with phase_progress(console) as tell:
        tell("truth: E after the step", 0, 300)
        tell("truth: E after the step", 150, 300)
        tell("slope: E along the step", 300, 300)
        console.print("a table")
    text = file.getvalue()
    assert "300/300 tokens" in text
    erased = text.rindex("\x1b[2K")
    assert text.rindex("a table") < erased and text.rindex("slope: E") < erased
