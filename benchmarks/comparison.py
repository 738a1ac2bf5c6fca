"""Two ways to do one thing, timed in turns: what a row of the table is made of."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from entropy_ddp.model.counting import OperationCounter

Size = Literal["tiny", "default", "full"]
Run = Callable[[], Any]
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the rows are run.

    Attributes:
        size: `tiny` takes seconds and measures nothing; `full` takes an hour.
        repeats: number of times that every variant is timed.
        device: where the models are.
    """

    size: Size = "default"
    repeats: int = 3
    device: torch.device = CPU

    def pick(self, tiny: Any, default: Any, full: Any) -> Any:
        """What belongs to this size."""
        return {"tiny": tiny, "default": default, "full": full}[self.size]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One line of the table.

    Attributes:
        part: what is measured.
        over: what is divided by what; the unit of a value that is no ratio.
        values: the value of every repetition; none where the second way did not run.
        target: what the median should not exceed; None for a value that is only told.
        at_least: whether the target is a lower bound instead.
        flops: the same ratio in operations of matrix products; None if not counted.
        cpu: the same ratios in CPU seconds of this process; empty if not measured.
        difference: largest difference of the two variants' results, relative to the
            larger of 1 and the result; None where they have no result in common.
        says: what it said then.
        details: shapes, seconds and whatever else belongs to the line.
    """

    part: str
    over: str
    values: list[float]
    says: str = ""
    target: float | None = None
    at_least: bool = False
    flops: float | None = None
    cpu: list[float] = field(default_factory=list)
    difference: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        """Median of the values; None without any."""
        return statistics.median(self.values) if self.values else None

    @property
    def met(self) -> bool | None:
        """Whether the median is within the target; None without one."""
        median, target = self.median, self.target
        if target is None or median is None:
            return None
        return median >= target if self.at_least else median <= target


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds and operations of two variants that ran in turns.

    Attributes:
        seconds: wall-clock seconds of each repetition, of the first and the second.
        cpu_seconds: the same in CPU seconds of this process.
        operations: operations in matrix products of one run of each.
        results: what the first run of each returned.
    """

    seconds: tuple[list[float], list[float]]
    cpu_seconds: tuple[list[float], list[float]]
    operations: tuple[int, int]
    results: tuple[Any, Any]

    def comparison(self, part: str, over: str, **fields: Any) -> Comparison:
        """The line of the table: each repetition's first over its second."""
        details = fields.pop("details", {})
        first, second = self.operations
        return Comparison(
            part=part,
            over=over,
            values=_ratios(self.seconds),
            flops=first / second if second else None,
            cpu=_ratios(self.cpu_seconds),
            details={
                "seconds": self.seconds,
                "cpu_seconds": self.cpu_seconds,
                "operations": self.operations,
            }
            | details,
            **fields,
        )


def _ratios(pair: tuple[list[float], list[float]]) -> list[float]:
    # A clock of CPU time can stand still during a run of a tiny size.
    return [a / max(b, 1e-9) for a, b in zip(*pair, strict=True)]


def time_in_turns(first: Run, second: Run, setting: Setting) -> Timings:
    """Run both once to warm up and to count operations, then in turns on the clock."""
    runs = (first, second)
    counted = [count_operations(run) for run in runs]
    gc.collect()
    clocks = []
    for repetition in range(setting.repeats):
        # Who comes first alternates: what a run leaves in the caches favours neither.
        order = (0, 1) if repetition % 2 else (1, 0)
        measured = {which: timed(runs[which], setting.device) for which in order}
        clocks.append([measured[0], measured[1]])
    wall = [[repetition[i][0] for repetition in clocks] for i in (0, 1)]
    cpu = [[repetition[i][1] for repetition in clocks] for i in (0, 1)]
    return Timings(
        seconds=(wall[0], wall[1]),
        cpu_seconds=(cpu[0], cpu[1]),
        operations=(counted[0][0], counted[1][0]),
        results=(counted[0][1], counted[1][1]),
    )


def timed(run: Run, device: torch.device) -> tuple[float, float]:
    """Wall-clock seconds and CPU seconds of one run."""
    synchronise(device)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    run()
    synchronise(device)
    return time.perf_counter() - begin, time.process_time() - begin_cpu


def synchronise(device: torch.device) -> None:
    """Wait for everything queued on this device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_operations(run: Run) -> tuple[int, Any]:
    """Floating-point operations of one run's matrix products, and what it returned."""
    with OperationCounter() as counter:
        result = run()
    return counter.get_total_flops(), result
