"""What is done when memory runs out: smaller calls of the model, to the end of the run.

A call that failed for want of memory is made again with half as much in it. How much
one call may hold changes no result, so that only time is lost; the smaller limit stays,
as the next call would fail like this one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from entropy_ddp.errors import InputError, RunError

# Messages of allocators that accelerate's list does not have: the driver's own, which
# names no size; libraries that allocate for themselves; C++'s `new` in a backward pass.
_SHORTAGES = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
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


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    if isinstance(error, (InputError, RunError)):
        return False
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    message = str(error)
    known = should_reduce_batch_size(RuntimeError(message))
    return known or any(shortage in message for shortage in _SHORTAGES)


def unless_out_of_memory(
    call: Callable[[], Returned],
) -> tuple[Returned | None, str | None]:
    """What a call returns and None; or None and why there was not enough memory.

    Whatever the failed call held is free again when this returns.
    """
    try:
        return call(), None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    # Not within the handler: the exception holds the call's frames, and they its tensors.
    clear_device_cache(garbage_collection=True)
    return None, reason
