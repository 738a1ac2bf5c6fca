"""Memory that runs out when a microbatch has too many tokens, planted in a model.

The hooks are on the model's first block: when its output is made, most of a forward pass
is still to come, and when its gradient arrives, most of a backward pass is done.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

MESSAGES: dict[str, Callable[[], Exception]] = {
    "device": lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB."
    ),
    "driver": lambda: RuntimeError("CUDA error: out of memory\nCompile with ..."),
    "library": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when ..."),
    "host": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 8589934592 bytes."
    ),
    "python": lambda: MemoryError(),
}
# A run in which memory is short, and what is the same as in one where it is not.
SECTIONS: dict[str, Any] = {
    "compute": {"device": "cpu", "tokens_per_microbatch": 32},
    # Blocks so large that there is a backward pass that does not fit.
    "attribution": {"enabled": True, "verify": True, "blocks": 2},
}
NUMBERS = ("truth", "truth_all", "linear", "linear_all", "curvature", "attribution")


def close(found: Any, expected: Any, where: str, tolerance: float = 1e-10) -> None:
    """Equal, numbers up to rounding of what they are sums of."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            close(found[key], value, f"{where}.{key}", tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected)):
            close(one, other, f"{where}.{index}", tolerance)
    elif isinstance(expected, float):
        assert abs(found - expected) <= tolerance * max(1e-3, abs(expected)), where
    else:
        assert found == expected, where


@dataclass
class Shortage:
    """Planted shortages of one model.

    Attributes:
        limit: most tokens of a microbatch that fit.
        when: "forward" or "backward".
        kind: whose error it is, a key of `MESSAGES`.
        failed: sizes of the microbatches that did not fit.
        held: activations of failed attempts that were still there at a later attempt.
    """

    limit: int
    when: str = "forward"
    kind: str = "device"
    failed: list[int] = field(default_factory=list)
    held: int = 0
    _lost: list["weakref.ref[Tensor]"] = field(default_factory=list)

    def _fail(self, size: int) -> None:
        self.failed.append(size)
        raise MESSAGES[self.kind]()

    def after_block(self, block: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        size = hidden.shape[0] * hidden.shape[1]
        self.held += sum(lost() is not None for lost in self._lost)
        self._lost.clear()
        if size <= self.limit:
            return
        if self.when == "forward":
            self._lost.append(weakref.ref(hidden))
            self._fail(size)
        elif hidden.requires_grad:
            self._lost.append(weakref.ref(hidden))
            hidden.register_hook(lambda gradient: self._fail(size))


def first_block(model: nn.Module) -> nn.Module:
    """The first block of a transformer, adapters or not."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return lists[0][0]


@contextmanager
def planted(model: nn.Module, shortage: Shortage) -> Iterator[Shortage]:
    """The shortage, planted in a model for as long as the context lasts."""
    handle = first_block(model).register_forward_hook(shortage.after_block)
    # So that only what is held by somebody is there at the next attempt.
    gc.collect()
    try:
        yield shortage
    finally:
        handle.remove()
