"""What passes over the model cost: sequences, tokens, floating-point operations."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from entropy_ddp.data.batch import Shard
from entropy_ddp.data.microbatch import (
    Microbatch,
)


@dataclass(kw_only=True)
class PassCount:
    """What one kind of pass over one batch has cost.

    Attributes:
        sequences: sequences passed over, those without response tokens included.
        tokens: their response tokens.
        positions: tokens that went through the model, prompts and padding included.
        microbatches: forward passes of the model.
        operations: floating-point operations of matrix products and attention, of which
            causal attention is counted as the full square; None where a part of them
            was not counted.
    """

    sequences: int = 0
    tokens: int = 0
    positions: int = 0
    microbatches: int = 0
    operations: int | None = 0

    def add(self, other: "PassCount") -> None:
        """Add another count to this one."""
        for field in fields(self):
            own, more = getattr(self, field.name), getattr(other, field.name)
            is_known = own is not None and more is not None
            setattr(self, field.name, own + more if is_known else None)

    def add_microbatch(self, microbatch: Microbatch) -> None:
        """Count one forward pass."""
        self.microbatches += 1
        self.positions += microbatch.input_ids.numel()


@contextmanager
def counted(shard: Shard, count_operations: bool) -> Iterator[PassCount]:
    """The count of one pass over a shard, to which the pass adds its microbatches."""
    count = PassCount(sequences=len(shard.positions), tokens=shard.ragged.num_tokens)
    if not count_operations:
        count.operations = None
        yield count
        return
    with OperationCounter() as operations:
        yield count
    count.operations = operations.get_total_flops()


class _NoModules:
    """In place of the counter's module tracker.

    The tracker's hooks forbid `torch.autograd.grad` within a forward pass.
    """

    parents = ("Global",)

    def __enter__(self) -> None:
        """Nothing to hook."""

    def __exit__(self, *_: object) -> None:
        """Nothing to unhook."""


class OperationCounter(FlopCounterMode):
    """torch's counter, for passes that take gradients within a forward pass."""

    def __init__(self) -> None:
        super().__init__(
            display=False,
            custom_mapping={
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
                    _attention_backward
                ),
            },
        )
        self.mod_tracker: Any = _NoModules()


def _attention(query: torch.Size, key: torch.Size, *_: Any, **options: Any) -> int:
    """Q K^T and P V, shapes [batch, heads, length, width]."""
    batch, heads, rows, width = query
    return 4 * batch * heads * rows * key[-2] * width


def _attention_backward(
    gradient: torch.Size, query: torch.Size, key: torch.Size, *_: Any, **options: Any
) -> int:
    """Q K^T once more, and the gradients of both products."""
    return _attention(query, key) * 5 // 2
