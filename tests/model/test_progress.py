"""Is progress told where it can be seen, in a terminal and in a log file?"""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as some
from jobs import run_attribution, run_audit, run_probe, run_sweep
from rich.console import Console
from tiny_runs import make_run

from entropy_ddp.distributed import World
from entropy_ddp.terminal.progress import (
    SECONDS_BETWEEN_LINES,
    Lines,
    Pace,
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


def test_responses_are_counted_and_their_tokens() -> None:
    """Both have a speed; the time left is that of the responses."""
    clock = Clock()
    pace = Pace(clock)
    assert pace.told("sample E", 0, 64, "responses", 0) == "0 of 64 responses"
    clock.now += 2.0
    at_first = pace.told("sample E", 0, 64, "responses", 300)
    assert at_first == "0 of 64 responses, 150 tokens/s"
    clock.now += 30.0
    found = pace.told("sample E", 16, 64, "responses", 3200)
    assert found == "16 of 64 responses, 0.5/s, 100 tokens/s, 0:01:36 left"


def test_what_is_not_known_is_not_told() -> None:
    """Without a total, or beyond it, neither a speed nor a time."""
    clock = Clock()
    pace = Pace(clock)
    assert pace.told("self-check", 0, 0, "tokens", 0) == ""
    clock.now += 9.0
    assert pace.told("self-check", 24, 0, "tokens", 0) == "24 tokens"
    assert pace.told("what if", 1241, 505, "tokens", 0) == "1,241 tokens"


def test_a_phase_that_begins_again_has_a_speed_of_its_own() -> None:
    """One masked step after the other, each under the same name."""
    clock = Clock()
    pace = Pace(clock)
    for _ in range(3):
        pace.told("what if", 0, 100, "tokens", 0)
        clock.now += 10.0
        found = pace.told("what if", 50, 100, "tokens", 0)
        assert found == "50 of 100 tokens, 5/s, 0:00:10 left"


CALLS = some.lists(
    some.tuples(
        some.sampled_from(("self-check", "sample E", "truth: E after the step")),
        some.integers(0, 3000),
        some.integers(0, 3000),
        some.integers(0, 10**6),
        some.floats(0, 1e6),
    ),
    max_size=12,
)


@given(calls=CALLS)
def test_no_sequence_of_calls_makes_a_false_claim(calls: Any) -> None:
    """Totals of 0, totals passed, sums made anew, no time between two calls."""
    clock = Clock()
    pace = Pace(clock)
    for name, done, total, tokens, seconds in calls:
        clock.now += seconds
        told = pace.told(name, done, total, "responses", tokens)
        assert not re.search(r"(?<!e)-", told)
        rates = re.findall(r"([\d.,e+-]+)(?: tokens)?/s", told)
        assert all(float(rate.replace(",", "")) > 0 for rate in rates)
        assert len(rates) <= (done > 0) + (tokens > 0)
        if " of " in told:
            of = told.split(" responses")[0].replace(",", "").split(" of ")
            assert 0 <= int(of[0]) <= int(of[1]) == total
        assert ("left" in told) <= (0 < done < total)


# A job, its settings, and a phase that must be among its.
RUNS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "probe": (run_probe, {}, "gradient dot: U along X"),
    "group by group": (
        run_probe,
        {"gradient_dot": {"variance_method": "backward"}},
        "gradient dot: groups of E",
    ),
    "same rollouts": (run_probe, {}, "gradient dot: groups"),
    "reference": (
        run_probe,
        {"update": {"kl_coefficient": 0.1}},
        "reference: U without the adapter",
    ),
    "audit": (run_audit, {}, "audit: reverse mode"),
    "sweep": (run_sweep, {"sweep": {"etas": [1e-3, 1e-2]}}, "sweep: eta = 0.01"),
    "attribute": (
        run_attribution,
        {"attribution": {"verify": True}},
        "what if: masked step",
    ),
}


@pytest.mark.parametrize("job", RUNS)
def test_every_phase_does_what_it_says_it_has_to_do(tmp_path: Path, job: str) -> None:
    """As many tokens as announced, in order, also where prompts are shared."""
    run, sections, phase = RUNS[job]
    tiny = make_run(tmp_path / "run", "qwen2")
    in_twos = ref.random_rows(7, groups=5, responses=2, vocabulary=17)
    tiny = replace(tiny, E=tiny.U if job == "same rollouts" else in_twos)
    told: list[tuple[str, int, int]] = []
    run(
        tiny.config(**sections), World(), None,
        lambda *progress: told.append(progress[:3]),
    )  # fmt: skip
    finished: list[tuple[str, int, int]] = []
    for name, done, total in told:
        if not done:
            finished.append((name, done, total))
        before = finished.pop()
        assert before[0] == name and before[1] <= done and before[2] == total
        finished.append((name, done, total))
    wrong = [row for row in finished if row[2] and row[1] != row[2]]
    assert wrong == []
    assert phase in {name for name, _, _ in finished}


def test_a_terminal_shows_speed_and_leaves_nothing() -> None:
    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=True, color_system=None)
    with phase_progress(console) as tell:
        tell("truth: E after the step", 0, 300)
        tell("truth: E after the step", 150, 300)
        tell("slope: E along the step", 300, 300)
        console.print("a table")
    text = file.getvalue()
    assert "300 of 300 tokens" in text
    erased = text.rindex("\x1b[2K")
    assert text.rindex("a table") < erased and text.rindex("slope: E") < erased
