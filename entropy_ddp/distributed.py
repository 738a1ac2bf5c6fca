"""The process group: start and stop, sums, gathers, and the count of both.

The only module that imports `torch.distributed`. A group is started exactly when a
launcher's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) is present; without
one, every function here works on the local value, so that callers have one path.

Failures are collective. The first rank to fail leaves its message in the store and
prints it; the others see that a message is there already and stay silent.
"""

import gc
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from entropy_ddp.errors import InputError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAILURE_KEY = "entropy_ddp/first_failure"
_TOLD_KEY = "entropy_ddp/failure_told"
_TELL_SECONDS = 8


@dataclass(kw_only=True)
class World:
    """All ranks of a run, as seen from one of them.

    Attributes:
        rank: number of this rank.
        world_size: number of ranks.
        local_rank: number of this rank on its machine; selects the GPU.
        store: the key-value store shared by the ranks; None without a group, and in
            a group that somebody else has started.
        group: the group of the collectives; None for the default one.
        collectives: number of collectives and bytes handed to them, by purpose.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    store: Any = None
    group: Any = None
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
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    def max(self, value: float) -> float:
        """Largest of a scalar over ranks."""
        tensor = torch.tensor([value], dtype=torch.float64)
        self._count("scalars", tensor)
        if self.is_grouped:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
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
        dist.all_gather_object(values, value, group=self.group)
        return values

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module inside DistributedDataParallel, or itself without a group.

        Parameters are not broadcast: whether ranks loaded the same ones is checked,
        not arranged.
        """
        if self.store is None:
            return module
        # Buffers must not be synchronised before each forward pass: ranks run different
        # numbers of them. torch 2.13 renames the option.
        known = inspect.signature(DistributedDataParallel).parameters
        renamed = "forward_sync_buffers"
        option = renamed if renamed in known else "broadcast_buffers"
        return DistributedDataParallel(module, init_sync=False, **{option: False})

    def close(self) -> None:
        """Leave a group of `joined_world`; the one it was joined from goes on."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def claim_failure(self, message: str) -> bool:
        """Whether this rank is the first to fail, and so the one to print."""
        if self.store is None:
            return True
        claim = f"rank {self.rank}: {message}"
        try:
            first = self.store.compare_set(_FAILURE_KEY, "", claim)
            if first.decode() == claim:
                return True
            # A launcher stops all ranks at the first that ends: not before the other's
            # message is out.
            self.store.wait([_TOLD_KEY], timedelta(seconds=_TELL_SECONDS))
        except (RuntimeError, ConnectionError):
            # The store lives on rank 0: it is gone because rank 0 failed and said so.
            pass
        return False

    def failure_told(self) -> None:
        """Let the ranks that failed later know that the message is out."""
        if self.store is not None:
            self.store.set(_TOLD_KEY, "1")

    def _count(self, purpose: str, tensor: Tensor | None) -> None:
        number, size = self.collectives.get(purpose, (0, 0))
        added = 0 if tensor is None else tensor.numel() * tensor.element_size()
        self.collectives[purpose] = (number + 1, size + added)


def joined_world() -> World:
    """The ranks of a process group that is there already, a trainer's for example.

    With a gloo group of its own: tensors on the CPU can then be reduced whatever the
    trainer's backend is, and its collectives are not mixed with these.
    """
    if not dist.is_available() or not dist.is_initialized():
        return World()
    return World(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=int(os.environ.get("LOCAL_RANK", dist.get_rank())),
        group=dist.new_group(backend="gloo"),
    )


def single_process_warning(environment: Mapping[str, str]) -> str | None:
    """A warning if several processes were asked for and this one runs alone.

    `accelerate launch --cpu --num_processes K` starts one process, and so does every
    task of a bare `srun` or `mpirun`, without the variables of a process group.
    """
    if "WORLD_SIZE" in environment:
        return None
    asked = "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment
    tasks = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    if asked or any(int(environment.get(name, "1")) > 1 for name in tasks):
        return (
            "several processes were asked for, but the launcher set no WORLD_SIZE: this "
            "process runs alone; start with torchrun, or with accelerate and the "
            "configuration in launch/"
        )
    return None


@contextmanager
def process_group(timeout_seconds: float = 1800.0) -> Iterator[World]:
    """The ranks of this run; a process group exactly when a launcher started them.

    NCCL carries CUDA tensors and gloo CPU tensors, so parameter buffers on the CPU and
    scalars are reduced by gloo on every machine.

    Raises:
        InputError: the launcher's environment is there only in part.
    """
    present = [name for name in LAUNCHER_VARIABLES if name in os.environ]
    if not {"RANK", "WORLD_SIZE"} & set(present):
        yield World()
        return
    if len(present) < len(LAUNCHER_VARIABLES):
        missing = [name for name in LAUNCHER_VARIABLES if name not in present]
        raise InputError(
            f"the launcher's environment has {', '.join(present)} but not "
            f"{', '.join(missing)}: start with torchrun or accelerate launch, or unset "
            "them to run as one process"
        )
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    world = World(rank=rank, world_size=world_size, local_rank=local_rank, store=store)
    yield world
    # Not after a failure: tearing the group down can wait for ranks that are gone. The
    # wrapped modules hold the group and live in reference cycles; threads of a group
    # that outlives this line abort the process when the interpreter ends.
    gc.collect()
    dist.destroy_process_group()
