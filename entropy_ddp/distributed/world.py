"""All ranks of a run, as seen from one of them: sums, gathers, and the count of both."""

import inspect
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from entropy_ddp.distributed.failure import Watch
from entropy_ddp.errors import InputError, RunError

T = TypeVar("T")


def interruptibly(call: Callable[[], T]) -> T:
    """Make a call that waits in C++, so that signals are seen in the meantime.

    Python sees a signal between two steps of its main thread only: the call is made in a
    thread of its own.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001
            outcome.set_exception(error)

    # Not an executor's thread, for which the interpreter waits at its end.
    threading.Thread(target=run, daemon=True).start()
    return outcome.result()


@dataclass(kw_only=True)
class World:
    """All ranks of a run, as seen from one of them.

    Attributes:
        local_rank: number of this rank on its machine; selects the GPU.
        store: the key-value store shared by the ranks; None without a group, and in
            one that somebody else has started.
        group: the group of the collectives; None for the default one.
        watch: this rank's watch over the others; None without a group.
        timeout_seconds: how long a rank waits for the others in a collective.
        collectives: number of collectives and bytes handed to them, by purpose.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    store: Any = None
    group: Any = None
    watch: Watch | None = None
    timeout_seconds: float = 1800.0
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes files."""
        return self.rank == 0

    @property
    def is_grouped(self) -> bool:
        """Whether there is a process group."""
        return self.store is not None or self.group is not None

    def sum(self, tensor: Tensor, purpose: str) -> Tensor:
        """Sum of a CPU tensor over ranks, in place."""
        self._count(purpose, tensor)
        if self.is_grouped:
            self._join(
                lambda: dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
            )
        return tensor

    def max(self, value: float) -> float:
        """Largest of a scalar over ranks."""
        tensor = torch.tensor([value], dtype=torch.float64)
        self._count("scalars", tensor)
        if self.is_grouped:
            self._join(
                lambda: dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
            )
        return float(tensor)

    def gather_rows(self, rows: Tensor, positions: Tensor, count: int) -> Tensor:
        """Per-sequence rows of all ranks, in file order, on every rank.

        Args:
            rows: this rank's rows, float64, [n, C]; n may be 0 and differ by rank.
            positions: their places in the result, [n].
            count: number of rows N of the result.

        Returns:
            All rows, [N, C].
        """
        # Every row has exactly one owner, so a sum of zero-filled buffers is a gather
        # that needs no sizes exchanged and no padding.
        gathered = rows.new_zeros(count, rows.shape[1])
        gathered[positions] = rows
        return self.sum(gathered, "scalars")

    def gather_objects(self, value: Any) -> list[Any]:
        """A small picklable value from every rank, in rank order, on every rank."""
        self._count("objects", None)
        if not self.is_grouped:
            return [value]
        values: list[Any] = [None] * self.world_size
        self._join(lambda: dist.all_gather_object(values, value, group=self.group))
        return values

    def exchange(self, sent: Tensor, to: list[int], sizes: list[int]) -> Tensor:
        """Elements for every rank, against those that they have for this one.

        Args:
            sent: what this rank has for each, one after the other, [sum of `to`].
            to: how many elements are for each rank.
            sizes: how many elements each rank has for this one.

        Returns:
            What each rank had for this one, in rank order, [sum of `sizes`].
        """
        self._count("objects", sent)
        if not self.is_grouped:
            return sent
        received = sent.new_empty(sum(sizes))
        self._join(
            lambda: dist.all_to_all_single(received, sent, sizes, to, group=self.group)
        )
        return received

    def from_all_ranks(self, collect: Callable[[], T]) -> list[T]:
        """What a call returns on every rank, in their order; what one refuses, all refuse.

        Raises:
            InputError: the first refusal.
        """
        found: tuple[T | None, str | None]
        try:
            found = collect(), None
        except InputError as error:
            found = None, str(error)
        results = []
        for result, refusal in self.gather_objects(found):
            if refusal is not None:
                raise InputError(refusal)
            results.append(result)
        return results

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module inside DistributedDataParallel, or itself without a group.

        Backward passes run within its `no_sync`, and the sum over ranks is taken once,
        of flat buffers, by `sum`. Parameters are not broadcast: whether ranks loaded the
        same ones is checked, not arranged.
        """
        if self.store is None:
            return module
        # Buckets to reduce in would be a second copy of all gradients, which nobody
        # fills: within no_sync gradients are no views of them, whatever
        # gradient_as_bucket_view says. The reducer must have one parameter, and gets
        # the smallest.
        trained = [p for p in module.parameters() if p.requires_grad]
        reduced = min(trained, key=lambda parameter: parameter.numel())
        ignored = [
            f"{owner}.{name}"
            for owner, part in module.named_modules()
            # Under each of its names, if it is tied.
            for name, parameter in part.named_parameters(recurse=False)
            if parameter.requires_grad and parameter is not reduced
        ]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            module, ignored
        )
        # Buffers must not be synchronised before each forward pass: ranks run different
        # numbers of them. torch 2.13 renames the option.
        known = inspect.signature(DistributedDataParallel).parameters
        renamed = "forward_sync_buffers"
        option = renamed if renamed in known else "broadcast_buffers"
        return DistributedDataParallel(module, init_sync=False, **{option: False})

    def close(self) -> None:
        """Leave the group of a joined world; the one it was joined from goes on."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def come_to_collective(self) -> None:
        """Let the watch know that this rank has come to one collective more."""
        if self.watch is not None:
            self.watch.collectives += 1

    @contextmanager
    def late_ranks_named(self) -> Iterator[None]:
        """Within the context, a collective that timed out names the ranks it waited for.

        Raises:
            RunError: they are behind this one.
        """
        begin = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            waited = time.monotonic() - begin
            late = self.watch.behind() if self.watch is not None else []
            if waited < 0.9 * self.timeout_seconds or not late:
                raise
            names = ", ".join(map(str, late))
            raise RunError(
                f"the ranks have waited {waited:.0f} s for rank {names}, which "
                "computes longer than that, or hangs"
            ) from error

    def _join(self, collective: Callable[[], T]) -> T:
        self.come_to_collective()
        with self.late_ranks_named():
            return interruptibly(collective)

    def _count(self, purpose: str, tensor: Tensor | None) -> None:
        number, size = self.collectives.get(purpose, (0, 0))
        added = 0 if tensor is None else tensor.numel() * tensor.element_size()
        self.collectives[purpose] = (number + 1, size + added)
