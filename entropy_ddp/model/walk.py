"""A pass over a shard, microbatch by microbatch, in smaller ones where memory runs out."""

from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from entropy_ddp.data.batch import Shard
from entropy_ddp.data.microbatch import (
    Microbatch,
    PromptSharing,
    Row,
    make_microbatch,
    plan_microbatches,
)
from entropy_ddp.errors import RunError
from entropy_ddp.memory import Allowance, unless_out_of_memory


@dataclass(kw_only=True)
class Walk:
    """One pass over a shard.

    Attributes:
        shard: this rank's sequences; may be empty.
        budget: the configured number of padded tokens of a microbatch.
        fill: up to how many of them rows are put together.
        sharing: when responses to one prompt share a row; None for never.
        allowance: how many tokens fit, as far as is known; reduced where they do not.
        device: where the model is.
        num_extra: microbatches more than the configured budget would have made.
    """

    shard: Shard
    budget: int
    fill: int
    sharing: PromptSharing | None
    allowance: Allowance
    device: torch.device
    num_extra: int = 0

    def microbatches(
        self,
        attempt: Callable[[Microbatch], None],
        undo: Callable[[], bool] = lambda: False,
    ) -> Iterator[Microbatch]:
        """Each microbatch once the attempt at it has succeeded.

        Where memory runs out, what is left is cut anew with a smaller budget.

        Args:
            attempt: runs the model; what it leaves of a failure is overwritten by the
                next attempt, or undone.
            undo: called after an attempt that failed; says whether it had to undo the
                earlier ones too, which are then made again.

        Raises:
            RunError: memory runs out with a single sequence.
        """
        done: list[list[Row]] = []
        waiting = deque(self._plan(self.allowance.of(self.budget)))
        planned = len(waiting)
        if self.allowance.limit is not None:
            planned = len(self._plan(self.budget))
        while waiting:
            rows = waiting[0]
            microbatch, shortage = unless_out_of_memory(
                partial(self._attempted, rows, attempt)
            )
            if microbatch is not None:
                done.append(waiting.popleft())
                self.num_extra = len(done) + len(waiting) - planned
                yield microbatch
                continue
            self._reduce(rows, shortage)
            if undo():
                waiting.extend(done)
                done = []
            left = [p for rows in waiting for row in rows for p in row.sequences]
            waiting = deque(self._plan(self.allowance.of(self.budget), sorted(left)))

    def _plan(
        self, budget: int, places: Collection[int] | None = None
    ) -> list[list[Row]]:
        return plan_microbatches(self.shard, budget, self.sharing, places, self.fill)

    def _attempted(
        self, rows: list[Row], attempt: Callable[[Microbatch], None]
    ) -> Microbatch:
        microbatch = make_microbatch(self.shard, rows).to(self.device)
        attempt(microbatch)
        return microbatch

    def _reduce(self, rows: list[Row], shortage: str | None) -> None:
        """Allow half of what did not fit, or of the budget if that is smaller."""
        size = len(rows) * max(row.length for row in rows)
        places = [place for row in rows for place in row.sequences]
        if len(places) == 1:
            sequence = self.shard.sequences[places[0]]
            raise RunError(
                f"out of memory with a single sequence, line {sequence.index + 1} of "
                f"batch {self.shard.batch.split} ({size} tokens), after "
                f"{self.allowance.num_retries} smaller microbatches (configured: "
                f"{self.budget} tokens): {shortage}; free memory on this device, run "
                "fewer ranks on it, leave out sequences of this length, or set "
                "precision.model: bfloat16"
            )
        self.allowance.halve(min(size, self.allowance.of(self.budget)))
