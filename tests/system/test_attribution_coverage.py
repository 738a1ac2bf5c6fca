"""Are what-ifs, reliability and errors of an attribution what many drawn E would show?

The policy is one whose responses can all be listed, with the derivatives of every token's
log p and H by every parameter. What a response of E adds to the gradient of the entropy is
then a row of a table, the shares of U's tokens are products of it with a fixed matrix, and
a batch E is a choice of rows: thousands are drawn without a model. The true shares are
those of the exact gradient of the entropy.

Shape legend: R responses of the table, P parameters, T tokens of U, n groups of one
response, K blocks.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from enumerable import Policy, at
from torch import Tensor

from entropy_ddp.data.batch import Ragged
from entropy_ddp.estimators.entropy import Ratio
from entropy_ddp.estimators.linear import slope_from_terms
from entropy_ddp.estimators.quantiles import two_sided
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
from entropy_ddp.estimators.shares import rules_by_share
from entropy_ddp.estimators.standard_errors import Draws, Estimate

BLOCKS = 8
FRACTION = 0.05
RESPONSES_OF_U = 100
DRAWS = {64: 800, 256: 400}
# What a choice delivers over what it claims, judged by the other half and by the same E.
DELIVERED = (0.9, 1.1)
IN_SAMPLE_AT_MOST = 0.8
# Of nominal 95 % intervals. Those of blocks have 7 degrees of freedom, and means over
# eight responses, which is what a block of 64 has, are far from normal.
COVERAGE_OF_BLOCKS = {64: (0.89, 0.98), 256: (0.92, 0.98)}
COVERAGE_OF_PARTS = {64: (0.92, 0.985), 256: (0.925, 0.98)}
# Root mean square of the standard errors over the spread. What either half chose is not
# independent of what the other was judged by, which the blocks do not see.
RATIO = {64: (0.93, 1.07), 256: (0.9, 1.1)}
RATIO_OF_WHAT_IFS = {64: (0.84, 1.07), 256: (0.9, 1.1)}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A policy, an update and its exact shares.

    Attributes:
        policy: the policy.
        added, counts: a response adds `added` - Hbar `counts` to the numerator of the
            gradient of the entropy, [R, P] each.
        entropy, lengths: H_i and T_i, [R] each.
        gradient: the exact gradient of the entropy per token, [P].
        shares: the share of a token of U is its row times the gradient, [T, P].
        momentum: the momentum part of the step, [P].
        kind: number of a kind that does not depend on E, of every token, [T].
    """

    policy: Policy
    added: Tensor
    counts: Tensor
    entropy: Tensor
    lengths: Tensor
    gradient: Tensor
    shares: Tensor
    momentum: Tensor
    kind: Tensor

    def batches(self, num_groups: int, seed: int) -> Tensor:
        """Row numbers of many E of single responses, [B, n]."""
        return self.policy.sample(DRAWS[num_groups], num_groups, 1, seed)


def sharpened(policy: Policy) -> Policy:
    """The same with larger weights: some tokens nearly certain, others rare."""
    first, second, factor = policy._theta
    policy._theta = [2 * first, 2 * second, factor]
    return policy


def derivatives(policy: Policy) -> tuple[Tensor, Tensor]:
    """log p and H of the tokens of all responses [2, t], and their gradients [2, t, P]."""
    sizes = [part.numel() for part in policy._theta]
    shapes = [part.shape for part in policy._theta]

    def scores(theta: Tensor) -> Tensor:
        moved = copy.copy(policy)
        pieces = zip(theta.split(sizes), shapes, strict=True)
        moved._theta = [piece.view(shape) for piece, shape in pieces]
        return torch.stack(moved.token_scores(at(0.0)))

    theta = torch.cat([part.flatten() for part in policy._theta])
    return scores(theta), torch.func.jacfwd(scores)(theta)


@cache
def scene(score: str) -> Scene:
    """With weights of log p of whole responses, or of what comes after the token."""
    length, prompts = {"full": (4, 12), "to_go": (3, 60)}[score]
    policy = sharpened(Policy(length=length, num_prompts=prompts, seed=3))
    (_, entropy), (by_logp, by_entropy) = derivatives(policy)
    ragged, ones = policy.ragged, torch.ones_like(entropy)
    if score == "full":
        weight, count = (ragged.spread(ragged.sum(x)) for x in (entropy, ones))
    else:
        weight, count = (ragged.sum_after(x) for x in (entropy, ones))
    sequence = ragged.sequence_of_token
    added, counts = (
        torch.zeros(len(ragged.lengths), by_logp.shape[1], dtype=torch.float64)
        for _ in range(2)
    )
    added.index_add_(0, sequence, weight[:, None] * by_logp + by_entropy)
    counts.index_add_(0, sequence, count[:, None] * by_logp)
    probability, lengths = policy.probabilities, ragged.lengths.double()
    size = float(probability @ lengths)
    sums = ragged.sum(entropy)
    mean = float(probability @ sums) / size
    generator = torch.Generator().manual_seed(3)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    drawn = policy.sample(1, RESPONSES_OF_U, 1, 4)[0]
    update = Ragged(ragged.lengths[drawn])
    tokens = update.spread(ragged.starts[drawn]) + update.position
    advantage = update.spread(normal(RESPONSES_OF_U))
    gain = normal(by_logp.shape[1]).exp()
    shares = advantage[:, None] / update.num_tokens * by_logp[tokens] * gain
    momentum = normal(by_logp.shape[1])
    return Scene(
        policy=policy,
        added=added,
        counts=counts,
        entropy=sums,
        lengths=lengths,
        gradient=probability @ (added - mean * counts) / size,
        shares=shares,
        momentum=momentum * float(shares.sum(0).norm() / momentum.norm()),
        kind=2 * (advantage > 0).long() + (update.position > 0).long(),
    )


def test_the_exact_gradient_is_that_of_the_entropy() -> None:
    """By autograd of the sum over all responses."""
    for score in ("full", "to_go"):
        found = scene(score)
        sizes = [part.numel() for part in found.policy._direction]
        direction = torch.cat([part.flatten() for part in found.policy._direction])
        assert sum(sizes) == len(found.gradient)
        expected = found.policy.derivative(1, "per_token")
        assert float(found.gradient @ direction) == pytest.approx(expected, rel=1e-9)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What one E gives: its terms of the gradient, and the shares by block."""

    terms: Tensor
    counts: Tensor
    original: Ratio
    blocks: BlockShares

    def part(self, direction: Tensor) -> Estimate:
        """The slope along a direction, as the package has it from its terms."""
        nothing = torch.zeros(len(self.terms), dtype=torch.float64)
        columns = [self.terms @ direction, nothing, nothing, self.counts @ direction]
        draws = Draws(groups=torch.arange(len(self.terms)))
        terms = torch.stack(columns, dim=1)
        return slope_from_terms(terms, self.original, draws, ("to_go", "hk")).estimate


def drawn(found: Scene, rows: Tensor) -> Drawn:
    groups = torch.arange(len(rows))
    original = Ratio(numerator=found.entropy[rows], size=found.lengths[rows])
    counts = found.counts[rows]
    terms = found.added[rows] - original.value * counts
    block = block_of_group(groups, groups, BLOCKS)
    by_block = torch.zeros(BLOCKS, terms.shape[1], dtype=torch.float64)
    by_block.index_add_(0, block, terms / original.denominator)
    blocks = BlockShares(
        share=found.shares @ by_block.T,
        momentum=by_block @ found.momentum,
        decay=torch.zeros(BLOCKS, dtype=torch.float64),
        size=block_sizes(original.size, groups, block),
    )
    return Drawn(terms=terms, counts=counts, original=original, blocks=blocks)


Simulated = dict[str, Tensor]


@cache
def simulated(score: str, num_groups: int) -> Simulated:
    """(value, standard error, what it is of) of every draw by name, [B, 3] each."""
    found, collected = scene(score), defaultdict(list)
    true = found.shares @ found.gradient
    exact = {
        "momentum": float(found.momentum @ found.gradient),
        "gradient": float(true.sum()),
    }
    for rows in found.batches(num_groups, seed=5):
        one = drawn(found, rows)
        blocks = one.blocks
        share = blocks.share.sum(1)
        by_half = [rules_by_share(blocks.half(n), FRACTION) for n in (0, 1)]
        for rule, mask in rules_by_share(share, FRACTION).items():
            name = rule.split(",")[0]
            collected[f"in sample, {name}"].append(
                (float(share[mask].sum()), 0.0, float(true[mask].sum()))
            )
            masks = (by_half[0][rule], by_half[1][rule])
            judged = left_out(blocks, masks)
            delivered = sum(
                float(blocks.size[half::2].sum() * true[masks[1 - half]].sum())
                for half in (0, 1)
            )
            left = blocks.total - judged
            collected[f"judged, {name}"].append((float(judged.sum()), 0.0, delivered))
            error = standard_error(left, blocks.size)
            assert error is not None
            collected[f"without {name}"].append(
                (float(left.sum()), error, sum(exact.values()) - delivered)
            )
        labels = ["0", "1", "2", "3"]
        for row in share_by(labels, found.kind, blocks):
            expected = float(true[found.kind == int(row["label"])].sum())
            collected[f"kind {row['label']}"].append(
                (row["share"], row["se"], expected)
            )
        momentum = one.part(found.momentum)
        gradient = one.part(found.momentum + found.shares.sum(0)).minus(momentum)
        for part, estimate in (("momentum", momentum), ("gradient", gradient)):
            collected[f"part {part}"].append(
                (estimate.value, estimate.se_jackknife, exact[part])
            )
        correlation = correlation_of_halves(blocks)
        assert correlation is not None
        collected["reliability"].append((reliability(correlation), 0.0, 0.0))
    return {
        name: torch.tensor(rows, dtype=torch.float64)
        for name, rows in collected.items()
    }


@pytest.mark.parametrize("score", ["full", "to_go"])
def test_what_ifs_deliver_what_they_claim(score: str) -> None:
    """Of 64 responses, judged by the half that did not choose; not by all of them."""
    rows = simulated(score, 64)
    found = {
        name: float(table[:, 2].mean() / table[:, 0].mean())
        for name, table in rows.items()
        if name.startswith(("judged", "in sample"))
    }
    assert len(found) == 4
    for name, ratio in found.items():
        if name.startswith("judged"):
            assert DELIVERED[0] < ratio < DELIVERED[1], found
        else:
            assert ratio < IN_SAMPLE_AT_MOST, found


@pytest.mark.parametrize("num_groups", DRAWS)
@pytest.mark.parametrize("score", ["full", "to_go"])
def test_errors_of_an_attribution_cover(score: str, num_groups: int) -> None:
    """What-ifs and kinds of tokens by blocks, parts of the step by the jackknife."""
    wrong = {}
    for name, table in simulated(score, num_groups).items():
        if not name.startswith(("without", "kind", "part")):
            continue
        value, error, expected = table.unbind(1)
        of_part = name.startswith("part")
        quantile = two_sided(num_groups - 1 if of_part else BLOCKS - 1)
        covered = (value - expected).abs() <= quantile * error
        coverage = float(covered.double().mean())
        low, high = (COVERAGE_OF_PARTS if of_part else COVERAGE_OF_BLOCKS)[num_groups]
        # The root mean square of the errors: that of few blocks varies by itself.
        ratio = float(error.square().mean().sqrt() / (value - expected).std())
        chosen = name.startswith("without")
        least, most = (RATIO_OF_WHAT_IFS if chosen else RATIO)[num_groups]
        if not (low < coverage < high and least < ratio < most):
            wrong[name] = coverage, ratio
    assert wrong == {}


@pytest.mark.parametrize("score", ["full", "to_go"])
def test_reliability_is_the_correlation_with_another_E(score: str) -> None:
    """And Spearman and Brown's formula says what four times the prompts would have."""
    found = scene(score)
    means = {n: float(simulated(score, n)["reliability"][:, 0].mean()) for n in DRAWS}
    pairs = found.batches(64, seed=6).view(-1, 2, 64)
    measured = []
    for one, other in pairs:
        shares = [drawn(found, rows).blocks.share.sum(1) for rows in (one, other)]
        measured.append(float(torch.corrcoef(torch.stack(shares))[0, 1]))
    assert means[64] == pytest.approx(sum(measured) / len(measured), abs=0.06)
    predicted = 4 * means[64] / (1 + 3 * means[64])
    assert means[256] == pytest.approx(predicted, abs=0.06)
