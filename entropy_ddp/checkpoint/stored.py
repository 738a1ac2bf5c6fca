"""A tensor that lies in files: its shape is known, its elements are read when asked for.

Every format of a checkpoint is a mapping of names to these, whether one file holds a
tensor or every rank that wrote it a part. A rank that needs a part asks for that part:

    stored["model.norm.weight"].read()                          # all of it
    stored["lm_head.weight"].read((slice(0, 4000),))            # its first 4,000 rows

What is read is in memory of its own. Bytes that are not asked for are not read, as far as
the format lets them be told apart.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor

# A slice with both ends for each dimension, of step 1; dimensions that are left out at
# the end are whole.
Region = tuple[slice, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in files.

    Attributes:
        shape: of the whole tensor.
        dtype: that it is stored in.
        fetch: reads a region, given with both ends for every dimension.
    """

    shape: torch.Size
    dtype: torch.dtype
    fetch: Callable[[Region], Tensor]

    def read(self, region: Region = ()) -> Tensor:
        """The elements of a region, on the CPU, in memory of their own.

        Raises:
            InputError: the files cannot be read.
        """
        return self.fetch(whole(region, self.shape))


def read_number(value: Any) -> Any:
    """A single number that is stored, in memory; anything else as it is.

    For counts and settings: a file may claim any shape for them.
    """
    is_number = isinstance(value, StoredTensor) and value.shape.numel() == 1
    return value.read() if is_number else value


@dataclass(frozen=True)
class Part:
    """What of a parameter this process holds.

    Attributes:
        shape: of the whole parameter.
        region: which elements of it are held.
    """

    shape: torch.Size
    region: Region = ()

    @classmethod
    def all_of(cls, parameters: Mapping[str, Tensor]) -> "dict[str, Part]":
        """Every parameter, whole."""
        return {name: cls(parameter.shape) for name, parameter in parameters.items()}


def whole(region: Region, shape: Sequence[int]) -> Region:
    """The region with both ends of every dimension.

    Raises:
        IndexError: it is not within the shape, or has steps.
    """
    given = (*region, *(slice(0, size) for size in shape[len(region) :]))
    ends = [(s.start or 0, size if s.stop is None else s.stop, s.step, size)
            for s, size in zip(given, shape, strict=True)]  # fmt: skip
    for start, stop, step, size in ends:
        if not 0 <= start <= stop <= size or step not in (None, 1):
            raise IndexError(f"region {region} of a tensor of shape {tuple(shape)}")
    return tuple(slice(start, stop) for start, stop, _, _ in ends)


def in_memory(tensor: Tensor) -> StoredTensor:
    """A tensor that is in memory, or mapped there from its file."""
    return StoredTensor(
        tensor.shape, tensor.dtype, lambda region: tensor[region].clone()
    )


@dataclass(frozen=True)
class Block:
    """A rectangular part of a larger tensor.

    Attributes:
        offsets: where its first element lies, by dimension.
        tensor: its elements.
    """

    offsets: tuple[int, ...]
    tensor: StoredTensor

    @property
    def region(self) -> Region:
        """Its place in the larger tensor."""
        pairs = zip(self.offsets, self.tensor.shape, strict=True)
        return tuple(slice(start, start + size) for start, size in pairs)


def joined(shape: Sequence[int], blocks: Sequence[Block]) -> StoredTensor:
    """The tensor that blocks make up; only those that a region meets are read.

    Raises:
        ValueError: they overlap, leave a gap, differ in dtype or number of dimensions.
    """
    size = torch.Size(shape)
    filled = [block for block in blocks if block.tensor.shape.numel()]
    dtypes = {block.tensor.dtype for block in blocks}
    if len(dtypes) != 1 or any(len(b.offsets) != len(size) for b in blocks):
        raise ValueError(f"parts of {len(dtypes)} dtypes, or of other dimensions")
    _require_partition(size, [block.region for block in filled])
    (dtype,) = dtypes

    def fetch(region: Region) -> Tensor:
        found = torch.empty(_lengths(region), dtype=dtype)
        for block in filled:
            met = [_meet(a, b) for a, b in zip(region, block.region, strict=True)]
            if all(part.start < part.stop for part in met):
                origins = [s.start for s in region]
                place = _shifted(met, origins)
                found[place] = block.tensor.read(_shifted(met, block.offsets))
        return found

    return StoredTensor(size, dtype, fetch)


def _lengths(region: Sequence[slice]) -> list[int]:
    return [part.stop - part.start for part in region]


def _meet(first: slice, second: slice) -> slice:
    return slice(max(first.start, second.start), min(first.stop, second.stop))


def _shifted(region: Sequence[slice], origins: Sequence[int]) -> Region:
    pairs = zip(region, origins, strict=True)
    return tuple(slice(part.start - by, part.stop - by) for part, by in pairs)


def _require_partition(shape: torch.Size, regions: list[Region]) -> None:
    """Check that regions cover a shape, each element once."""
    outside = any(
        part.start < 0 or part.stop > size
        for region in regions
        for part, size in zip(region, shape, strict=True)
    )
    covered = sum(math.prod(_lengths(region)) for region in regions)
    if outside or covered != shape.numel():
        raise ValueError(
            f"parts with {covered} elements for a tensor of shape {tuple(shape)}"
        )
    # Of intervals along one dimension it is enough to look at neighbours.
    split = [d for d, size in enumerate(shape)
             if any(_lengths(region)[d] != size for region in regions)]  # fmt: skip
    if len(split) == 1:
        (along,) = split
        regions = sorted(regions, key=lambda region: region[along].start)
        pairs = list(pairwise(regions))
    else:
        pairs = list(combinations(regions, 2))
    for first, second in pairs:
        met = [_meet(a, b) for a, b in zip(first, second, strict=True)]
        if all(part.start < part.stop for part in met):
            raise ValueError(f"parts that overlap in a tensor of shape {tuple(shape)}")


def unflattened(flat: StoredTensor, start: int, shape: Sequence[int]) -> StoredTensor:
    """The tensor whose elements lie in a flat one, row after row, from an offset on.

    Of a region, all columns of its rows are read.

    Raises:
        ValueError: the flat tensor ends before.
    """
    size = torch.Size(shape)
    if not 0 <= start <= start + size.numel() <= flat.shape.numel():
        raise ValueError(
            f"{flat.shape.numel()} elements, and {tuple(size)} from the {start}th on"
        )
    row = math.prod(size[1:])

    def fetch(region: Region) -> Tensor:
        rows = region[0] if region else slice(0, 1)
        first, last = start + rows.start * row, start + rows.stop * row
        found = flat.read((slice(first, last),))
        if not region:
            return found.reshape(())
        found = found.view(rows.stop - rows.start, *size[1:])
        return found[(slice(None), *region[1:])].contiguous()

    return StoredTensor(size, flat.dtype, fetch)
