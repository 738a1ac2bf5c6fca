"""Do reported standard errors describe repeated sampling, and do their intervals cover?

2,000 batches (8,000 in the long test) are drawn from a policy whose entropy is known
exactly, by itself and with its derivatives. In each, every estimate is made as the probe
makes it. The spread of an estimate over the batches is what its standard errors must be,
and its 95 % interval must hold the exact value 95 times in 100.

Two cases: 200 sequences of their own, and, at length only, 200 prompts with three
responses each, where errors that take sequences for independent are wrong by a third.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import pytest
import torch
from enumerable import (
    Policy,
    at,
    changes,
    curvature_of,
    draws_of,
    middle_slope,
    predictions,
    slopes,
)
from simulated import (
    ALL,
    ESTIMATORS,
    FULL,
    MODES,
    Pieces,
    Repeated,
    exact,
    other_estimates,
    per_token_estimates,
    repeated,
)
from torch import Tensor

from entropy_ddp.estimators.standard_errors import Draws, Estimate

FEW, SHORT, LONG = 300, 2000, 8000  # batches
NUM_GROUPS = 200
# The spread of 2,000 values is known to 1.6 %, a coverage of 95 % to 0.5 %.
SPREAD_RTOL = 0.05
COVERAGE = (0.93, 0.97)
# What second order misses is of third order in log-weights: its tails are long, and from
# 200 groups the delta method is a twelfth too small.
REMAINDER_RTOL, REMAINDER_COVERAGE = 0.1, (0.90, 0.97)
# Standard deviations of the mean of all values that a bias may be.
BIAS = 4
# `adjusted_change` weighs the noise of a fold by what the other folds tell, with means
# that have seen it: of `snis`, whose noise is largest, the difference of truth and
# prediction, a seventh of either error here, is off by a part of its own error.
SEEN, SEEN_BIAS, SEEN_COVERAGE = "difference adjusted snis", 0.35, (0.90, 0.97)
SEEN_RTOL = 0.1
# Every third of the predictors of fitted baselines: as many fits in less time.
USED = slice(None, None, 3)
UNCLUSTERED_RATIO = 0.75  # errors of sequences over those of groups, at most


@dataclass(frozen=True, kw_only=True)
class Case:
    """What batches are drawn from, and how far the step goes."""

    num_prompts: int
    responses: int
    eta: float
    seed: int

    @cached_property
    def policy(self) -> Policy:
        return Policy(num_prompts=self.num_prompts, seed=self.seed)

    @cached_property
    def draws(self) -> Draws:
        return draws_of(NUM_GROUPS, self.responses)

    @cached_property
    def pieces(self) -> Pieces:
        table = self.policy.table(self.eta)
        return Pieces([table], table.select, USED)

    def batches(self, count: int) -> Iterator[Tensor]:
        """Row numbers of each batch, [N]."""
        yield from self.policy.sample(count, NUM_GROUPS, self.responses, seed=1)

    def drawn(self, count: int) -> Iterator[tuple[Pieces, float, Tensor, Draws]]:
        """What every estimate of each batch is made of."""
        for index in self.batches(count):
            yield self.pieces, self.eta, index, self.draws


CASES = {
    "single": Case(num_prompts=1, responses=1, eta=0.2, seed=0),
    "clustered": Case(num_prompts=4, responses=3, eta=0.1, seed=1),
}


def unclustered_estimates(case: Case, index: Tensor) -> dict[str, Estimate]:
    """Two of the estimates, with errors that take sequences for independent."""
    each = Draws(groups=torch.arange(len(index)))
    slope = case.pieces.slopes(index, each, fitted=False)
    change = next(case.pieces.changes(index, each, "per_token"))
    return {"truth snis": change.change, "slope full none": slope[FULL].estimate}


def others(name: str, count: int) -> bool:
    """Whether all estimates are made: of single responses, in the long test only."""
    return name == "clustered" or count == LONG


@cache
def simulated(name: str, count: int) -> dict[str, Repeated]:
    """Every estimate in all batches of a case."""
    case = CASES[name]
    # Whose derivatives are taken, before those of the estimates are ruled out.
    assert case.pieces
    with torch.no_grad():
        return repeated(
            per_token_estimates(*drawn)
            | (other_estimates(*drawn) if others(name, count) else {})
            for drawn in case.drawn(count)
        )


PER_TOKEN = {
    *("before", "after", "slope middle", "curvature midpoint", "second order midpoint"),
    *(f"slope {' '.join(e)}" for e in ESTIMATORS),
    *(f"{k} {m}" for k in ("truth", "difference") for m in MODES),
    *(f"{k} adjusted {m}" for k in ("truth", "difference") for m in MODES),
}
NAMES = {
    *PER_TOKEN,
    *(f"{h} {n} {m}" for h in ("truth", "after") for n in ALL[1:] for m in MODES),
    *(f"before {n}" for n in ALL[1:]),
    *(f"slope {n} middle" for n in ALL[1:]),
    "slope full none adjusted",
    *(f"curvature {n} taylor" for n in ALL[1:]),
    *("curvature taylor", "second order taylor", "second-order difference taylor"),
}


@pytest.mark.parametrize("name", CASES)
def test_pieces_make_the_same_estimates_as_whole_batches(name: str) -> None:
    """The short cut is one of time only."""
    case = CASES[name]
    index = next(case.batches(1))
    batch, draws, pieces = (
        case.policy.table(case.eta).select(index),
        case.draws,
        case.pieces,
    )
    pairs: list[tuple[Estimate, Estimate]] = []
    for normalize in ALL:
        whole = changes(batch, draws, normalize)
        for found in pieces.changes(index, draws, normalize):
            pairs.append((found.change, whole[found.is_mode].change))
        bend = curvature_of(batch, draws, normalize)
        pairs.append((pieces.taylor(index, draws, normalize).estimate, bend.estimate))
        middle = middle_slope(batch, draws, normalize)
        pairs.append((pieces.middle(index, draws, normalize).estimate, middle.estimate))
    predicted = predictions(batch, draws, "rb", USED)
    expected = slopes(batch, draws, "per_token", predicted=predicted)
    for estimator, slope in pieces.slopes(index, draws).items():
        pairs.append((slope.estimate, expected[estimator].estimate))
        torch.testing.assert_close(
            slope.contributions, expected[estimator].contributions
        )
    for found, one in pairs:
        for attribute in ("value", "influence", "without"):
            torch.testing.assert_close(
                getattr(found, attribute), getattr(one, attribute)
            )
    torch.testing.assert_close(pieces["zero_mean"][index], batch.zero_mean())


def bias_of_curvature(case: Case) -> float:
    """Second derivative along eta of the leading bias of the reweighted ratio, nats.

    That is (H Var D - Cov(A, D)) / (n E[D]^2) of n independent groups, A and D their sums
    weighted by w(eta); by five points.
    """
    assert case.responses == 1
    policy = case.policy
    drawn = policy.probabilities

    def bias(eta: float) -> float:
        weights = policy.probability(at(eta)) / drawn
        _, entropy = policy.token_scores(at(eta))
        numerator = weights * policy.ragged.sum(entropy)
        size = weights * policy.ragged.lengths
        mean = drawn @ size
        value = (drawn @ numerator) / mean
        # Cov(A - H D, D), the mean of A - H D being 0.
        covariance = drawn @ ((numerator - value * size) * (size - mean))
        return -float(covariance / mean**2) / NUM_GROUPS

    h = 2e-3
    a, b, c, d, e = (bias(k * h) for k in (-2, -1, 0, 1, 2))
    return (-a + 16 * b - 30 * c + 16 * d - e) / (12 * h**2)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        pytest.param("single", SHORT, marks=pytest.mark.long),
        pytest.param("single", LONG, marks=pytest.mark.long),
        pytest.param("clustered", LONG, marks=pytest.mark.long),
    ],
)
def test_errors_are_the_spread_and_intervals_cover(name: str, count: int) -> None:
    """And no bias is seen that is not known.

    That of a ratio is a hundredth of its error here, that of a second derivative more.
    """
    case = CASES[name]
    known = {"curvature taylor": bias_of_curvature(case)} if name == "single" else {}
    names = NAMES if others(name, count) else PER_TOKEN
    assert simulated(name, count).keys() == names
    wrong = {}
    for estimate, found in simulated(name, count).items():
        expected = exact(case.policy, case.eta, estimate, len(case.draws.groups))
        low, high = COVERAGE
        rtol, largest_bias = SPREAD_RTOL, BIAS / count**0.5
        if estimate.startswith("second-order difference"):
            rtol, (low, high) = REMAINDER_RTOL, REMAINDER_COVERAGE
        if estimate == SEEN:
            rtol, largest_bias, (low, high) = SEEN_RTOL, SEEN_BIAS, SEEN_COVERAGE
        ratios = [found.error_ratio(e) for e in (found.se, found.se_jackknife)]
        covered = found.coverage(expected)
        bias = found.bias(expected + known.get(estimate, 0.0))
        as_expected = (
            max(abs(ratio - 1) for ratio in ratios) < rtol,
            low < covered < high,
            abs(bias) < largest_bias,
        )
        if not all(as_expected):
            wrong[estimate] = (*ratios, covered, bias)
    # Both errors over the spread, coverage, bias over the spread.
    assert wrong == {}


def test_errors_of_sequences_are_wrong_where_groups_share_a_prompt() -> None:
    """Their intervals miss the exact value far too often; those of groups do not."""
    case = CASES["clustered"]
    assert case.pieces
    with torch.no_grad():
        apart = repeated(unclustered_estimates(case, i) for i in case.batches(FEW))
    for estimate, found in apart.items():
        assert found.error_ratio(found.se) < UNCLUSTERED_RATIO
        expected = exact(case.policy, case.eta, estimate, len(case.draws.groups))
        assert found.coverage(expected) < COVERAGE[0]
        grouped = simulated("clustered", FEW)[estimate]
        torch.testing.assert_close(grouped.value, found.value)
