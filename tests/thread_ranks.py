"""Several ranks in one process: threads that take turns, each until it needs the others.

Only one rank runs at a time, because derivatives in forward mode are counted for the
whole process; it hands over at every collective. Sums are taken in rank order.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entropy_ddp.distributed import World

SECONDS = 120.0


class Meeting:
    """Where the ranks meet: every collective is an exchange of one value each."""

    def __init__(self, world_size: int) -> None:
        self.turn = threading.Condition()
        self.world_size = world_size
        self.waiting: dict[int, Any] = {}
        self.met: list[Any] = []
        self.rounds = 0
        self.failures: list[BaseException] = []

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """The values of all ranks, in rank order."""
        self.waiting[rank] = value
        mine = self.rounds
        if len(self.waiting) == self.world_size:
            self.met = [self.waiting[number] for number in range(self.world_size)]
            self.waiting = {}
            self.rounds += 1
            self.turn.notify_all()
        arrived = self.turn.wait_for(
            lambda: self.rounds > mine or self.failures, timeout=SECONDS
        )
        if self.rounds <= mine:
            raise RuntimeError(
                "another rank failed" if arrived else "a rank is missing"
            )
        return self.met


@dataclass(kw_only=True)
class ThreadWorld(World):
    """A rank that is a thread."""

    meeting: Meeting

    def sum(self, tensor: Tensor, purpose: str) -> Tensor:
        """Sum over ranks, in place."""
        self._count(purpose, tensor)
        parts = self.meeting.exchange(self.rank, tensor.clone())
        return tensor.copy_(torch.stack(parts).sum(0))

    def max(self, value: float) -> float:
        """Largest over ranks."""
        self._count("scalars", torch.zeros(1, dtype=torch.float64))
        return max(self.meeting.exchange(self.rank, value))

    def gather_objects(self, value: Any) -> list[Any]:
        """A value from every rank."""
        self._count("objects", None)
        return list(self.meeting.exchange(self.rank, value))

    def exchange(self, sent: Tensor, to: list[int], sizes: list[int]) -> Tensor:
        """What every rank has for this one."""
        self._count("objects", sent)
        parts = self.meeting.exchange(self.rank, sent.split(to))
        found = [theirs[self.rank] for theirs in parts]
        assert [len(part) for part in found] == sizes
        return torch.cat(found)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module itself: gradients are summed by `sum`."""
        return module


def run_thread_ranks(world_size: int, body: Callable[[World], Any]) -> list[Any]:
    """What the body returns on every rank, in rank order; raises what a rank raised."""
    meeting = Meeting(world_size)
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        with meeting.turn:
            try:
                world = ThreadWorld(rank=rank, world_size=world_size, meeting=meeting)
                results[rank] = body(world)
            except BaseException as error:  # noqa: BLE001
                meeting.failures.append(error)
            finally:
                meeting.turn.notify_all()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    if meeting.failures:
        raise meeting.failures[0]
    return results
