"""Tensors in files: what is read of a region equals the region of the whole."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entropy_ddp.checkpoint.stored import (
    Block,
    Region,
    StoredTensor,
    in_memory,
    joined,
    unflattened,
)


def numbered(*shape: int) -> Tensor:
    """A tensor whose elements tell their place."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    """Any region, with dimensions left out at the end."""
    given = draw(st.integers(0, len(shape)))
    ends = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape[:given]]
    return tuple(slice(start, stop) for start, stop in ends)


def blocks_of(tensor: Tensor, *splits: int) -> list[Block]:
    """A tensor in as many blocks along each dimension; some may be empty."""
    blocks = []
    sizes = [-(-n // s) for n, s in zip(tensor.shape, splits, strict=True)]
    for place in itertools.product(*map(range, splits)):
        starts = tuple(
            min(i * size, n)
            for i, size, n in zip(place, sizes, tensor.shape, strict=True)
        )
        region = tuple(slice(a, a + size) for a, size in zip(starts, sizes))
        blocks.append(Block(starts, in_memory(tensor[region])))
    return blocks


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_region_is_read_from_whatever_holds_it(data: st.DataObject) -> None:
    """A tensor whole, in blocks along one or two dimensions, or flat and cut anywhere."""
    shape = data.draw(
        st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3))
    )
    tensor = numbered(*shape)
    flat = torch.cat([torch.full((4,), -1), tensor.flatten(), torch.full((3,), -1)])
    held = {
        "whole": in_memory(tensor),
        "rows": joined(shape, blocks_of(tensor, 4, 1, 1)),
        "grid": joined(shape, blocks_of(tensor, 2, 3, 1)),
        "flat": unflattened(joined([flat.numel()], blocks_of(flat, 5)), 4, shape),
    }
    region = data.draw(regions(shape))
    for name, stored in held.items():
        assert stored.shape == shape and stored.dtype == tensor.dtype
        assert torch.equal(stored.read(region), tensor[region]), (name, region)


def test_what_is_read_is_nobody_else_s_memory() -> None:
    """A step on it changes no file, and no map of one."""
    tensor = numbered(3, 2)
    stored = in_memory(tensor)
    stored.read().zero_()
    stored.read((slice(0, 1),)).zero_()
    assert torch.equal(stored.read(), numbered(3, 2))


def test_a_single_number_is_read() -> None:
    """No dimensions."""
    flat = in_memory(numbered(5))
    assert unflattened(flat, 3, ()).read() == 3
    assert in_memory(torch.tensor(7)).read() == 7


def test_only_blocks_that_a_region_meets_are_read() -> None:
    """Each rank reads what it needs."""
    tensor, asked = numbered(6, 2), []

    def watched(number: int, stored: StoredTensor) -> StoredTensor:
        def fetch(region: Region) -> Tensor:
            asked.append((number, region[0]))
            return stored.read(region)

        return StoredTensor(stored.shape, stored.dtype, fetch)

    blocks = [
        Block(block.offsets, watched(number, block.tensor))
        for number, block in enumerate(blocks_of(tensor, 3, 1))
    ]
    joined(tensor.shape, blocks).read((slice(3, 5),))
    assert asked == [(1, slice(1, 2)), (2, slice(0, 1))]


@pytest.mark.parametrize("splits", [(3, 1), (2, 2)])
@pytest.mark.parametrize("change", ["missing", "twice", "outside", "dtype"])
def test_blocks_that_make_up_no_tensor_are_refused(
    splits: tuple[int, int], change: str
) -> None:
    """A gap, an overlap that hides a gap, an end beyond, two dtypes."""
    tensor = numbered(6, 4)
    blocks = blocks_of(tensor, *splits)
    last = blocks.pop()
    if change == "twice":
        blocks.append(Block(blocks[0].offsets, last.tensor))
    if change == "outside":
        blocks.append(Block((5, 1), last.tensor))
    if change == "dtype":
        blocks.append(Block(last.offsets, in_memory(tensor[-2:, -2:].float())))
    with pytest.raises(ValueError, match="parts"):
        joined(tensor.shape, blocks)


@pytest.mark.parametrize(
    "region", [(slice(0, 7),), (slice(-1, 2),), (slice(0, 4, 2),), (slice(3, 1),)]
)
def test_what_is_no_region_is_refused(region: Region) -> None:
    """Beyond the end, negative, with steps, backwards."""
    with pytest.raises(IndexError, match="of a tensor of shape"):
        in_memory(numbered(6)).read(region)
