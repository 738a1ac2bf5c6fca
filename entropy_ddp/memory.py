"""How much memory is free, and what is done when it runs out: smaller calls.

A call that failed for want of memory is made again with half as much in it. How much
one call may hold changes no result, so that only time is lost; the smaller limit stays,
as the next call would fail like this one.
"""

import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from entropy_ddp.errors import InputError, RunError, is_out_of_memory

# Where Linux tells of control groups, and the names of their first version.
OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_FIRST_VERSION = ("memory.limit_in_bytes", "memory.usage_in_bytes")
Returned = TypeVar("Returned")


@dataclass(kw_only=True)
class Allowance:
    """How much one call of the model may hold, in tokens or in sequences.

    Attributes:
        limit: the most that is known not to be too much; None as long as no call failed.
        num_retries: number of calls that failed and were made again with less.
    """

    limit: int | None = None
    num_retries: int = 0

    def of(self, configured: int) -> int:
        """What a call may hold where the configuration allows this much."""
        return configured if self.limit is None else min(configured, self.limit)

    def halve(self, used: int) -> None:
        """Allow half of what a call held that failed."""
        self.limit = max(1, used // 2)
        self.num_retries += 1


def is_shortage(error: Exception) -> bool:
    """Whether a call failed for want of memory, so that a smaller one may succeed."""
    if isinstance(error, (InputError, RunError)):
        return False
    if is_out_of_memory(error):
        return True
    # accelerate looks into the argument, which need not be text.
    message = RuntimeError(str(error))
    return isinstance(error, RuntimeError) and should_reduce_batch_size(message)


def unless_out_of_memory(
    call: Callable[[], Returned],
) -> tuple[Returned | None, str | None]:
    """What a call returns and None; or None and why there was not enough memory.

    Whatever the failed call held is free again when this returns.
    """
    try:
        return call(), None
    except Exception as error:
        if not is_shortage(error):
            raise
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    # Not within the handler: the exception holds the call's frames, and they its tensors.
    clear_device_cache(garbage_collection=True)
    return None, reason


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of the rank that needs most.

    Attributes:
        host_now: resident before the first pass: model, optimizer state, batches.
        host_more: what is needed beside it at the peak.
        host_free: what is free for this rank: ranks on one machine share.
        device_more, device_free: the same of its GPU; 0 without one.
    """

    host_now: int
    host_more: int
    host_free: int
    device_more: int = 0
    device_free: int = 0

    @property
    def fits(self) -> bool:
        """Whether what is needed is free."""
        return self.host_more <= self.host_free and self.device_more <= self.device_free

    @property
    def line(self) -> str:
        """The estimate in words."""
        peak = self.host_now + self.host_more
        line = (
            f"{gigabytes(peak)} a rank at the peak, {gigabytes(self.host_more)} more "
            f"than now ({gigabytes(self.host_free)} free)"
        )
        if not self.device_more:
            return line
        return (
            f"{line}; on the GPU {gigabytes(self.device_more)} more "
            f"({gigabytes(self.device_free)} free)"
        )


def gigabytes(size: int) -> str:
    """A size in bytes, as it is shown."""
    return f"{size / 1e9:.2f} GB"


def host_bytes() -> int:
    """Memory of this process that is resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


def peak_host_bytes() -> int:
    """The most memory of this process that was resident at any time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_host_bytes() -> int:
    """What this machine, or the control group of this process, has left to give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    meminfo = dict(line.split(":", 1) for line in lines)
    free = [int(meminfo["MemAvailable"].split()[0]) * 1024]
    free += [limit for limit in _free_in_groups() if limit is not None]
    return max(0, min(free))


def free_device_bytes(device: torch.device) -> int:
    """What the GPU has left, and what torch holds of it without using it."""
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + held


def _free_in_groups() -> Iterator[int | None]:
    """What each control group around this process has left; None without a limit."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        unified = number == "0" and not controllers
        if not unified and "memory" not in controllers.split(","):
            continue
        root = GROUPS if unified else GROUPS / "memory"
        names = ("memory.max", "memory.current") if unified else _FIRST_VERSION
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            yield _left(folder, names)
            if folder == root:
                break


def _left(folder: Path, names: tuple[str, str]) -> int | None:
    try:
        limit, used = ((folder / name).read_text().strip() for name in names)
        # The cache of files is given back when it is asked for.
        stat = dict(
            line.split() for line in (folder / "memory.stat").read_text().splitlines()
        )
    except (OSError, ValueError):
        return None
    if not limit.isdecimal():
        return None
    return int(limit) - int(used) + int(stat.get("inactive_file", 0))
