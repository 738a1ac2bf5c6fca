"""How much of a share is E's luck: the same shares from disjoint blocks of E.

The gradient of the entropy is a sum over the groups of E, and shares are linear in it. E
is divided into K blocks of whole independent units (groups; prompts, where they are a
known set); block b adds x_b to a number x = sum_b x_b (the
share of a token, a sum of shares, a part of the step), and has the share d_b of the
entropy's denominator, sum_b d_b = 1. Blocks are independent, so that

    SE^2 = K / (K - 1) sum_b (x_b - x d_b)^2              with K - 1 degrees of freedom

Even and odd blocks are two halves of E, each with an estimate of its own,
sum_half x_b / sum_half d_b. What was chosen with one half is evaluated with the other,
which did not choose it:

    left out = sum_b x_b[chosen with the half that b is not in]

Shape legend: T tokens of U, K blocks of E, n groups.
"""

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from entropy_ddp.estimators.standard_errors import group_totals

# Fewer blocks than these tell nothing of their spread.
LEAST_BLOCKS = 3


def block_of_group(group_order: Tensor, unit: Tensor, count: int) -> Tensor:
    """Number of the block that each group of E is in, [n].

    It depends on neither the order of the file nor the number of ranks. Blocks have as
    many units each, or one more; of fewer units than blocks each is one.

    Args:
        group_order: rank of each group by its key, [n].
        unit: independent unit of each group, [n].
        count: number of blocks at most.
    """
    num_units = int(unit.max()) + 1
    first = torch.full((num_units,), len(unit), dtype=torch.int64)
    first.scatter_reduce_(0, unit, group_order, "amin")
    # The rank of each unit by its first group.
    rank = first.argsort().argsort()
    return rank[unit] % min(count, num_units)


def block_sizes(sizes: Tensor | None, groups: Tensor, block: Tensor) -> Tensor:
    """d_b, the share of each block in the denominator of the entropy, [K].

    Args:
        sizes: D_i of each sequence of E, [N]; None where the denominator is 1: groups
            then count alike.
        groups: group of each sequence, [N].
        block: block of each group, [n].
    """
    per_group = torch.ones(len(block), dtype=torch.float64)
    if sizes is not None:
        per_group = group_totals(sizes, groups, len(block))
    total = group_totals(per_group, block, int(block.max()) + 1)
    return total / total.sum()


@dataclass(frozen=True, kw_only=True)
class BlockShares:
    """What each block of E adds to the parts of the step and to the shares, nats.

    Attributes:
        share: of every token of U, [T, K]; a row sums to the token's share.
        momentum, decay: of the parts of the step, [K].
        size: d_b, [K].
    """

    share: Tensor
    momentum: Tensor
    decay: Tensor
    size: Tensor

    @property
    def count(self) -> int:
        """Number of blocks K."""
        return len(self.size)

    @property
    def total(self) -> Tensor:
        """What each block adds to the first-order change, [K]."""
        return self.momentum + self.decay + self.share.sum(0)

    def half(self, number: int) -> Tensor:
        """What the even (0) or the odd (1) blocks add to the share of every token, [T]."""
        return self.share[:, number::2].sum(1)


def standard_error(added: Tensor, size: Tensor) -> float | None:
    """Standard error of a sum over blocks; None of fewer than three.

    Args:
        added: x_b, [K].
        size: d_b, [K].
    """
    count = len(added)
    if count < LEAST_BLOCKS:
        return None
    influence = added - added.sum() * size
    return math.sqrt(count / (count - 1) * float(influence.square().sum()))


def correlation_of_halves(blocks: BlockShares) -> float | None:
    """Mean correlation (Pearson's) of the token shares of two halves of the blocks.

    Over all ways to halve them, as equally as can be: one way alone is at the mercy of
    single blocks. Of ways in which a half's shares are constant there is none; None if
    that is so of all.
    """
    centred = blocks.share - blocks.share.mean(0) if len(blocks.share) else blocks.share
    products = centred.T @ centred
    # Which blocks are in the one half, [ways, K]: the first of them is, of even numbers.
    chosen = list(combinations(range(blocks.count), blocks.count // 2))
    if blocks.count % 2 == 0:
        chosen = [places for places in chosen if 0 in places]
    one = torch.zeros(len(chosen), blocks.count, dtype=torch.float64)
    one.scatter_(1, torch.tensor(chosen), 1.0)
    other = 1 - one
    own, its, common = (
        ((left @ products) * right).sum(1)
        for left, right in ((one, one), (other, other), (one, other))
    )
    varied = (own > 0) & (its > 0)
    if not bool(varied.any()):
        return None
    found = common[varied] / (own[varied] * its[varied]).sqrt()
    return float(found.clamp(-1, 1).mean())


def reliability(correlation: float) -> float:
    """2 rho / (1 + rho): what the shares of another E as large would correlate with.

    The formula of Spearman and Brown for twice the data; 0 where the halves do not agree
    at all.
    """
    return 2 * correlation / (1 + correlation) if correlation > 0 else 0.0


def left_out(blocks: BlockShares, chosen: tuple[Tensor, Tensor]) -> Tensor:
    """What each block adds to the shares of tokens that the other half chose, [K].

    Args:
        chosen: the tokens that the even and the odd blocks chose, as masks, [T] each.
    """
    added = torch.zeros_like(blocks.size)
    for half, by_the_other in enumerate(reversed(chosen)):
        added[half::2] = blocks.share[by_the_other, half::2].sum(0)
    return added


def share_by(
    labels: list[str], label_of_token: Tensor, blocks: BlockShares
) -> list[dict[str, Any]]:
    """Sum of shares and number of tokens by label; empty labels are left out.

    With the standard error `se` of the sum, if there are blocks enough.

    Args:
        label_of_token: number of each token's label, [T].
    """
    added = blocks.share.new_zeros(len(labels), blocks.count)
    added.index_add_(0, label_of_token, blocks.share)
    counts = torch.bincount(label_of_token, minlength=len(labels)).tolist()
    rows = []
    for label, of_blocks, count in zip(labels, added, counts):
        if not count:
            continue
        row = {"label": label, "share": float(of_blocks.sum()), "num_tokens": count}
        error = standard_error(of_blocks, blocks.size)
        rows.append(row if error is None else row | {"se": error})
    return rows
