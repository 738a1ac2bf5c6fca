"""What a backward pass keeps of every position: measured, as it depends on the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass(kw_only=True)
class Saved:
    """Memory that was saved for a backward pass over rows of one shape.

    Attributes:
        shape: rows and padded length of the microbatch.
        sizes: bytes of each block of memory that grows with the positions, by address.
    """

    shape: tuple[int, int]
    sizes: dict[int, int] = field(default_factory=dict)

    @property
    def per_position(self) -> float:
        """Bytes for one position of the microbatch."""
        rows, length = self.shape
        return sum(self.sizes.values()) / (rows * length)

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is saved, unless it is a weight."""
        rows, length = self.shape
        whole = tensor._base if tensor._base is not None else tensor
        shape = tuple(tensor.shape)
        grows = shape[:1] == (rows * length,) or (rows in shape and length in shape)
        if grows and not isinstance(whole, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


@contextmanager
def saved_for_backward(shape: tuple[int, int]) -> Iterator[Saved]:
    """Count what forward passes over rows of this shape save.

    The addresses are only distinct while everything that is saved is held: until the
    backward pass.
    """
    saved = Saved(shape=shape)
    with saved_tensors_hooks(saved.keep, lambda tensor: tensor):
        yield saved
