"""The process group: its start, its end, and who started it."""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from entropy_ddp.distributed.failure import Watch
from entropy_ddp.distributed.world import World, interruptibly
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.interruption import Interrupted

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RANK_TIMEOUT_SECONDS = 300.0
COLLECTIVE_TIMEOUT_SECONDS = 1800.0
STANDARD_OUTPUT, STANDARD_ERROR = 1, 2  # file descriptors


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


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return not {"RANK", "WORLD_SIZE"}.isdisjoint(environment)


@contextmanager
def process_group(
    rank_timeout_seconds: float = RANK_TIMEOUT_SECONDS,
    *,
    timeout_seconds: float = COLLECTIVE_TIMEOUT_SECONDS,
    tell: Callable[[str], None] = _print_error,
) -> Iterator[World]:
    """The ranks of this run; a process group exactly when a launcher started them.

    NCCL carries CUDA tensors and gloo CPU tensors, so parameter buffers on the CPU and
    scalars are reduced by gloo on every machine.

    Args:
        rank_timeout_seconds: how long a rank may take to start, and how long it may give
            no sign of life; what ends the run then names it.
        timeout_seconds: how long a rank waits for the others in a collective.
        tell: prints why the run ends, where that is found out by the watch.

    Raises:
        InputError: the launcher's environment is there only in part.
        RunError: not all ranks have started in time.
    """
    if not is_launched(os.environ):
        yield World()
        return
    _require_all_variables()
    store, rank, world_size = _meet(rank_timeout_seconds)
    watch = Watch(store, rank, world_size, rank_timeout_seconds, tell)
    watch.start()
    timeout = timedelta(seconds=timeout_seconds)
    store.set_timeout(timeout)
    try:
        interruptibly(lambda: _start(store, rank, world_size, timeout))
    except (Exception, Interrupted) as error:  # noqa: BLE001
        message = str(error)
        watch.fail(message, 1, lambda: tell(message), is_suspect=True)
    yield World(
        rank=rank,
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", rank)),
        store=store,
        watch=watch,
        timeout_seconds=timeout_seconds,
    )
    watch.finish()
    # Not after a failure: tearing the group down can wait for ranks that are gone. The
    # wrapped modules hold the group and live in reference cycles; threads of a group
    # that outlives this line abort the process when the interpreter ends.
    gc.collect()
    dist.destroy_process_group()


def _require_all_variables() -> None:
    present = [name for name in LAUNCHER_VARIABLES if name in os.environ]
    if len(present) < len(LAUNCHER_VARIABLES):
        missing = [name for name in LAUNCHER_VARIABLES if name not in present]
        raise InputError(
            f"the launcher's environment has {', '.join(present)} but not "
            f"{', '.join(missing)}: start with torchrun or accelerate launch, or unset "
            "them to run as one process"
        )


def _meet(timeout_seconds: float) -> tuple[Any, int, int]:
    """The store of the ranks, the number of this rank, and the number of ranks."""
    timeout = timedelta(seconds=timeout_seconds)
    try:
        return interruptibly(
            lambda: next(iter(dist.rendezvous("env://", timeout=timeout)))
        )
    except RuntimeError as error:
        raise RunError(
            f"the ranks did not all start within {timeout_seconds:g} s "
            f"({str(error).splitlines()[0]}); do all machines reach MASTER_ADDR, "
            "MASTER_PORT, and did every rank start?"
        ) from error


def _start(store: Any, rank: int, world_size: int, timeout: timedelta) -> None:
    both = torch.cuda.is_available()
    with announced_as_errors():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if both else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )


@contextmanager
def announced_as_errors() -> Iterator[None]:
    """Send to standard error what a library writes to standard output by itself.

    Before torch 2.9 gloo tells of every connection there, where results are printed.
    """
    sys.stdout.flush()
    kept = os.dup(STANDARD_OUTPUT)
    try:
        os.dup2(STANDARD_ERROR, STANDARD_OUTPUT)
        yield
    finally:
        os.dup2(kept, STANDARD_OUTPUT)
        os.close(kept)
