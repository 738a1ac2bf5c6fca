"""Do blocks of E say how much of a share is luck, as their definitions do?

Every expectation is a double loop over the definition, or an array made by hand.
"""

import math

import pytest
import torch
from torch import Tensor

from entropy_ddp.estimators.share_blocks import (
    BlockShares,
    block_of_group,
    block_sizes,
    correlation_of_halves,
    left_out,
    reliability,
    share_by,
    standard_error,
)

DOUBLE = torch.float64


def random_blocks(
    seed: int, tokens: int = 30, count: int = 5, noise: float = 1.0
) -> BlockShares:
    """Shares of a truth that is the same in all blocks, and noise that is not."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(tokens, 1, generator=generator, dtype=DOUBLE)
    luck = torch.randn(tokens, count, generator=generator, dtype=DOUBLE)
    parts = torch.randn(2, count, generator=generator, dtype=DOUBLE)
    size = torch.rand(count, generator=generator, dtype=DOUBLE) + 0.5
    return BlockShares(
        share=(truth + noise * luck) / count,
        momentum=parts[0],
        decay=parts[1],
        size=size / size.sum(),
    )


def test_every_group_is_in_one_block() -> None:
    """Of equal numbers of groups, or one more; of few groups each is one."""
    order = torch.randperm(19, generator=torch.Generator().manual_seed(1))
    alone = torch.arange(19)
    block = block_of_group(order, alone, 8)
    assert torch.equal(block, order % 8)
    assert torch.bincount(block).tolist() == [3, 3, 3, 2, 2, 2, 2, 2]
    few = block_of_group(torch.tensor([2, 0, 1]), alone[:3], 8)
    assert few.tolist() == [2, 0, 1]


def test_groups_of_one_unit_are_in_one_block() -> None:
    """As two groups of one prompt of a known set are; units in order of their first."""
    unit = torch.tensor([0, 1, 2, 0, 3, 1])
    order = torch.tensor([5, 3, 0, 1, 2, 4])
    # Unit 2 has the first group, then 0 (its second group), 3 and 1.
    assert block_of_group(order, unit, 8).tolist() == [1, 3, 0, 1, 2, 3]
    assert block_of_group(order, unit, 2).tolist() == [1, 1, 0, 1, 0, 1]


def test_blocks_of_the_denominator() -> None:
    groups, block = torch.tensor([0, 0, 1, 2, 2, 3]), torch.tensor([1, 0, 0, 1])
    sizes = torch.tensor([1, 2, 3, 4, 5, 6], dtype=DOUBLE)
    assert block_sizes(sizes, groups, block).tolist() == [12 / 21, 9 / 21]
    # Of the normalisation `sum`, whose denominator is 1: by number of groups.
    three = torch.tensor([1, 0, 0, 0])
    assert block_sizes(None, groups, three).tolist() == [0.75, 0.25]


def test_error_is_that_of_a_ratio_of_sums_over_blocks() -> None:
    """As of ten thousand draws of blocks; fewer than three blocks have none."""
    generator = torch.Generator().manual_seed(3)
    shape = (10_000, 8)
    size = torch.rand(shape, generator=generator, dtype=DOUBLE) + 0.5
    added = 2.0 * size + 0.3 * torch.randn(shape, generator=generator, dtype=DOUBLE)
    # What is estimated is sum x / sum d, at d that sum to 1.
    weight = size / size.sum(1, keepdim=True)
    scaled = added / size.sum(1, keepdim=True)
    errors = [standard_error(x, d) for x, d in zip(scaled, weight, strict=True)]
    found = torch.tensor([error for error in errors if error is not None])
    assert len(found) == len(errors)
    squares = float(found.square().mean())
    assert squares == pytest.approx(float(scaled.sum(1).var()), rel=0.05)
    assert standard_error(scaled[0, :2], torch.tensor([0.5, 0.5])) is None


def test_halves_are_even_and_odd_blocks() -> None:
    blocks = random_blocks(4)
    even, odd = blocks.half(0), blocks.half(1)
    torch.testing.assert_close(even, blocks.share[:, [0, 2, 4]].sum(1))
    torch.testing.assert_close(odd, blocks.share[:, [1, 3]].sum(1))
    torch.testing.assert_close(
        blocks.total, blocks.momentum + blocks.decay + blocks.share.sum(0)
    )


@pytest.mark.parametrize(("count", "ways"), [(2, 1), (4, 3), (5, 10), (8, 35)])
def test_correlation_is_the_mean_over_all_halvings(count: int, ways: int) -> None:
    blocks = random_blocks(4, count=count)
    found = []
    for mask in range(2**count):
        chosen = [block for block in range(count) if mask >> block & 1]
        rest = [block for block in range(count) if block not in chosen]
        # Of an even number every halving is met twice.
        if len(chosen) != count // 2 or (count % 2 == 0 and 0 not in chosen):
            continue
        halves = [blocks.share[:, places].sum(1) for places in (chosen, rest)]
        found.append(float(torch.corrcoef(torch.stack(halves))[0, 1]))
    assert len(found) == ways
    expected = sum(found) / ways
    assert correlation_of_halves(blocks) == pytest.approx(expected, rel=1e-12)


def test_shares_that_are_all_equal_have_no_correlation() -> None:
    zero = torch.zeros(4, dtype=DOUBLE)
    same = BlockShares(
        share=torch.zeros(7, 4, dtype=DOUBLE), momentum=zero, decay=zero, size=zero
    )
    assert correlation_of_halves(same) is None
    none = BlockShares(
        share=torch.zeros(0, 4, dtype=DOUBLE), momentum=zero, decay=zero, size=zero
    )
    assert correlation_of_halves(none) is None


@pytest.mark.parametrize("noise", [0.5, 2.0, 5.0])
def test_reliability_is_the_correlation_with_another_E(noise: float) -> None:
    """Of two independent batches of the same size, 4,000 tokens each."""
    blocks = random_blocks(5, tokens=4000, count=8, noise=noise)
    generator = torch.Generator().manual_seed(5)
    truth = torch.randn(4000, 1, generator=generator, dtype=DOUBLE)
    other = torch.randn(
        4000, 8, generator=torch.Generator().manual_seed(6), dtype=DOUBLE
    )
    another = (truth + noise * other).sum(1)
    expected = torch.corrcoef(torch.stack([blocks.share.sum(1), another]))[0, 1]
    correlation = correlation_of_halves(blocks)
    assert correlation is not None
    assert abs(reliability(correlation) - float(expected)) < 0.04


@pytest.mark.parametrize(
    ("correlation", "expected"), [(1.0, 1.0), (1 / 3, 0.5), (0.0, 0.0), (-0.4, 0.0)]
)
def test_spearman_and_brown(correlation: float, expected: float) -> None:
    assert reliability(correlation) == pytest.approx(expected)


def naive_left_out(blocks: BlockShares, chosen: tuple[Tensor, Tensor]) -> list[float]:
    """Token by token and block by block."""
    added = [0.0] * blocks.count
    for token in range(len(blocks.share)):
        for block in range(blocks.count):
            if bool(chosen[1 - block % 2][token]):
                added[block] += float(blocks.share[token, block])
    return added


def test_tokens_are_evaluated_by_the_half_that_did_not_choose_them() -> None:
    blocks = random_blocks(7)
    chosen = tuple(blocks.half(number) > 0.3 for number in (0, 1))
    assert len(chosen) == 2 and not torch.equal(*chosen)
    found = left_out(blocks, chosen).tolist()
    for value, expected in zip(found, naive_left_out(blocks, chosen), strict=True):
        assert math.isclose(value, expected, rel_tol=1e-12, abs_tol=1e-15)


def test_share_by_label() -> None:
    """Sums over tokens, with the error that their blocks give them."""
    label = torch.tensor([2, 0, 2, 2, 0])
    blocks = random_blocks(8, tokens=5, count=3)
    rows = share_by(["a", "b", "c"], label, blocks)
    assert [row["label"] for row in rows] == ["a", "c"]
    for row, places in zip(rows, ([1, 4], [0, 2, 3]), strict=True):
        assert row["num_tokens"] == len(places)
        added = blocks.share[places].sum(0)
        assert row["share"] == pytest.approx(float(added.sum()))
        assert row["se"] == pytest.approx(standard_error(added, blocks.size))
    two = random_blocks(8, tokens=5, count=2)
    assert all("se" not in row for row in share_by(["a", "b", "c"], label, two))
