"""Is the inner product of the two mean gradients what its docstring says it is?

On a toy policy with five tokens and at most three steps every response can be listed, so
that expectations over groups of responses are sums: unbiasedness is an equality. What is
random (the coverage of intervals) is simulated 2,000 times with a fixed seed.
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import cache, cached_property

import pytest
import torch
from reference import all_rows
from torch import Tensor
from torch.autograd.functional import jacobian

from entropy_ddp.errors import InputError
from entropy_ddp.estimators.gradient_dot import (
    Weighting,
    entropy_coefficients,
    estimate_dot,
    longest_in_group,
    paired_variance,
    reward_coefficients,
    variance_of_mean,
    without_diagonal,
)

DOUBLE = torch.float64
VOCABULARY = 5
TOLERANCE = 1e-13  # sums of up to 600,000 terms of order 1, weighted by probabilities
NUM_BATCHES = 2000
NUM_UNITS = 100


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A policy whose every response is listed.

    The logits of step k depend on k and on the token before; P of them are parameters.

    Attributes:
        theta: logits, [steps, VOCABULARY + 1, VOCABULARY].
        before, after: tokens before and after each step, VOCABULARY at the start and
            0 beyond the end, [R, steps].
        lengths: number of steps of each response, [R].
        rewards: a reward for each, [R].
    """

    theta: Tensor
    before: Tensor
    after: Tensor
    lengths: Tensor
    rewards: Tensor

    def logp(self, theta: Tensor) -> Tensor:
        """S of every response, [R]."""
        step = torch.arange(len(theta))
        logp = theta.log_softmax(-1)[step, self.before, self.after]
        return (logp * (step < self.lengths[:, None])).sum(1)

    @cached_property
    def values(self) -> Tensor:
        """S at theta, [R]."""
        return self.logp(self.theta)

    @cached_property
    def probabilities(self) -> Tensor:
        """Probability of every response, [R]."""
        return self.values.exp()

    @cached_property
    def scores(self) -> Tensor:
        """grad S of every response, [R, P]."""
        return jacobian(self.logp, self.theta).reshape(len(self.lengths), -1)

    def gradient_of_mean(self, per_response: Tensor) -> Tensor:
        """Gradient of E[f] for f that does not depend on the parameters, [P]."""
        return (self.probabilities * per_response) @ self.scores

    def gradient_of_mean_surprisal(self) -> Tensor:
        """Gradient of E[-S/T], where S depends on them too, [P]."""

        def functional(theta: Tensor) -> Tensor:
            logp = self.logp(theta)
            return -(logp.exp() * logp / self.lengths).sum()

        return jacobian(functional, self.theta).flatten()


@cache
def make_toy(*, ragged: bool) -> Toy:
    """Responses end at token 0 or after three steps; or all of them after two."""
    generator = torch.Generator().manual_seed(1)
    end, steps = (0, 3) if ragged else (-1, 2)
    responses = [r.response_ids for r in all_rows([1], VOCABULARY, end, steps)]
    shape = (steps, VOCABULARY + 1, VOCABULARY)
    padded = [ids + [0] * (steps - len(ids)) for ids in responses]
    return Toy(
        theta=torch.randn(shape, generator=generator, dtype=DOUBLE),
        before=torch.tensor([[VOCABULARY, *ids[:-1]] for ids in padded]),
        after=torch.tensor(padded),
        lengths=torch.tensor([len(ids) for ids in responses], dtype=DOUBLE),
        rewards=torch.rand(len(responses), generator=generator, dtype=DOUBLE),
    )


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Many groups of responses of a toy: which response each sequence is, [n]."""

    response: Tensor
    group: Tensor

    @classmethod
    def of(cls, responses: Tensor) -> "Groups":
        """From the responses of each group, [number of groups, G]."""
        count, size = responses.shape
        return cls(
            response=responses.flatten(),
            group=torch.arange(count).repeat_interleave(size),
        )

    def entropy_coefficients(self, toy: Toy, weighting: Weighting) -> Tensor:
        """c of every sequence, [n]."""
        logp, lengths = toy.values[self.response], toy.lengths[self.response]
        return entropy_coefficients(logp, lengths, self.group, weighting)

    def reward_coefficients(self, toy: Toy) -> Tensor:
        """The same of grad J, with centered advantages, [n]."""
        rewards = toy.rewards[self.response].reshape(int(self.group[-1]) + 1, -1)
        advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
        lengths = toy.lengths[self.response]
        return reward_coefficients(advantages, lengths, self.group)


def every_group(toy: Toy, size: int) -> tuple[Groups, Tensor]:
    """Every ordered group of i.i.d. responses, and the probability of each sequence's."""
    responses = torch.cartesian_prod(*[torch.arange(len(toy.lengths))] * size)
    probability = toy.probabilities[responses].prod(1)
    return Groups.of(responses), probability.repeat_interleave(size)


def expectation(toy: Toy, groups: Groups, weights: Tensor) -> Tensor:
    """Sum of weight times grad S over all sequences, [P]."""
    totals = torch.zeros(len(toy.lengths), dtype=DOUBLE)
    return totals.index_add_(0, groups.response, weights) @ toy.scores


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= TOLERANCE
    assert float(expected.abs().max()) > 0.001


# By hand


def test_coefficients_by_hand() -> None:
    """A group of two, one of three with an empty response; -(S^w - loo) / G each."""
    logp = torch.tensor([-3.0, -1.0, -4.0, 0.0, -2.0], dtype=DOUBLE)
    lengths = torch.tensor([2, 4, 2, 0, 1])
    groups = torch.tensor([0, 0, 1, 1, 1])
    assert longest_in_group(lengths, groups).tolist() == [4, 4, 2, 2, 2]
    by_longest = [-3 / 4, -1 / 4, -2.0, 0.0, -1.0]
    by_own = [-3 / 2, -1 / 4, -2.0, 0.0, -2.0]
    cases: list[tuple[Weighting, list[float]]] = [
        ("dr_grpo", by_longest),
        ("per_token_avg", by_own),
    ]
    for weighting, (a, b, c, d, e) in cases:
        expected = [
            -(a - b) / 2,
            -(b - a) / 2,
            -(c - (d + e) / 2) / 3,
            -(d - (c + e) / 2) / 3,
            -(e - (c + d) / 2) / 3,
        ]
        found = entropy_coefficients(logp, lengths, groups, weighting)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=DOUBLE))
    advantages = torch.tensor([0.5, -0.5, 1.0, -2.0, 1.0], dtype=DOUBLE)
    found = reward_coefficients(advantages, lengths, groups)
    assert found.tolist() == [0.5 / 8, -0.5 / 8, 1 / 6, -2 / 6, 1 / 6]


def test_a_group_whose_responses_are_all_empty_has_no_weight() -> None:
    zeros, groups = torch.zeros(2, dtype=DOUBLE), torch.zeros(2, dtype=torch.int64)
    lengths = torch.zeros(2, dtype=torch.int64)
    for weighting in ("dr_grpo", "per_token_avg"):
        assert not entropy_coefficients(zeros, lengths, groups, weighting).any()
    assert longest_in_group(lengths, groups).tolist() == [1, 1]


def test_a_rank_may_hold_nothing() -> None:
    none, nobody = torch.zeros(0, dtype=DOUBLE), torch.zeros(0, dtype=torch.int64)
    assert len(entropy_coefficients(none, nobody, nobody, "dr_grpo")) == 0
    assert len(entropy_coefficients(none, nobody, nobody, "per_token_avg")) == 0
    assert len(reward_coefficients(none, nobody, nobody)) == 0


def test_group_numbers_of_a_rank_may_have_gaps() -> None:
    """A rank holds some of the groups; the others' numbers are not used."""
    logp = torch.tensor([-3.0, -1.0, -4.0, -2.0], dtype=DOUBLE)
    lengths = torch.tensor([2, 4, 2, 1])
    dense, sparse = torch.tensor([0, 0, 1, 1]), torch.tensor([7, 7, 3, 3])
    found = [
        entropy_coefficients(logp, lengths, groups, "dr_grpo")
        for groups in (dense, sparse)
    ]
    assert torch.equal(*found)


# Expectations, exactly


@pytest.mark.parametrize("size", [2, 3])
def test_expected_x_per_token_average(size: int) -> None:
    """E[X_u] = -grad E[S/T] + grad E[1/T]."""
    toy = make_toy(ragged=True)
    groups, probability = every_group(toy, size)
    weights = probability * groups.entropy_coefficients(toy, "per_token_avg")
    expected = toy.gradient_of_mean_surprisal()
    expected = expected + toy.gradient_of_mean(1 / toy.lengths)
    assert_same(expectation(toy, groups, weights), expected)


@pytest.mark.parametrize("weighting", ["dr_grpo", "per_token_avg"])
@pytest.mark.parametrize("size", [2, 3])
def test_expected_x_of_equally_long_responses(size: int, weighting: Weighting) -> None:
    """E[X_u] = grad H / T: exactly the gradient of the entropy per token."""
    toy = make_toy(ragged=False)
    groups, probability = every_group(toy, size)
    weights = probability * groups.entropy_coefficients(toy, weighting)
    expected = toy.gradient_of_mean_surprisal()
    assert_same(expectation(toy, groups, weights), expected)


@pytest.mark.parametrize("size", [2, 3])
def test_expected_x_per_longest_response(size: int) -> None:
    """E[X_u] = -grad E[S_1/L] + G E[(S_2/L) grad S_1] + (1/G) grad E[1/L]."""
    toy = make_toy(ragged=True)
    groups, probability = every_group(toy, size)
    weights = probability * groups.entropy_coefficients(toy, "dr_grpo")
    responses = groups.response.reshape(-1, size)
    longest = toy.lengths[responses].amax(1)
    first, second = responses[:, 0], responses[:, 1]

    def functional(theta: Tensor) -> Tensor:
        logp = toy.logp(theta)
        value = 1 / size - logp[first]
        return (logp[responses].sum(1).exp() * value / longest).sum()

    expected = jacobian(functional, toy.theta).flatten()
    of_first = probability[::size] * toy.values[second] / longest
    baseline = torch.zeros(len(toy.lengths), dtype=DOUBLE)
    expected = expected + size * baseline.index_add_(0, first, of_first) @ toy.scores
    assert_same(expectation(toy, groups, weights), expected)


@pytest.mark.parametrize("size", [2, 3])
def test_expected_y_of_equally_long_responses(size: int) -> None:
    """Centered advantages take 1/G off: E[grad J_u] = (1 - 1/G) grad E[r] / T."""
    toy = make_toy(ragged=False)
    groups, probability = every_group(toy, size)
    weights = probability * groups.reward_coefficients(toy)
    expected = (1 - 1 / size) * toy.gradient_of_mean(toy.rewards) / toy.lengths[0]
    assert_same(expectation(toy, groups, weights), expected)


# The variance and the diagonal


def random_units(seed: int, count: int, width: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=DOUBLE)


def u_statistic(x: Tensor, y: Tensor, constant: Tensor) -> float:
    """<Xbar, C> plus the mean of <X_u, Y_v> over pairs of different units."""
    pairs = list(itertools.permutations(range(len(x)), 2))
    own = math.fsum(float(x[i] @ y[j]) for i, j in pairs) / len(pairs)
    return float(x.mean(0) @ constant) + own


def test_estimate_by_double_loop() -> None:
    """Different batches: every pair counts. One batch: pairs of different units."""
    x, y, constant = random_units(1, 6), random_units(2, 6), random_units(3, 1)[0]
    x_bar, y_bar = x.mean(0), constant + y.mean(0)
    dot = float(x_bar @ y_bar)
    plain = estimate_dot(dot, x @ y_bar, y @ x_bar)
    assert plain.bars_dot == dot and not plain.u_statistic
    paired = estimate_dot(
        dot, x @ y_bar, y @ x_bar, (x * y).sum(1), constant=x @ constant
    )
    pairs = [(i, j) for i, j in itertools.product(range(6), repeat=2) if i != j]
    expected = float(x_bar @ constant)
    expected += math.fsum(float(x[i] @ y[j]) for i, j in pairs) / len(pairs)
    assert math.isclose(paired.bars_dot, expected, rel_tol=1e-12)
    assert paired.u_statistic
    assert paired.paired_variance is not None and plain.paired_variance is None
    leave_out = [
        u_statistic(*(torch.cat([v[:i], v[i + 1 :]]) for v in (x, y)), constant)
        for i in range(6)
    ]
    mean = math.fsum(leave_out) / 6
    spread = 5 / 6 * math.fsum((value - mean) ** 2 for value in leave_out)
    assert math.isclose(paired.paired_variance, spread, rel_tol=1e-12)
    for estimate in (plain, paired):
        for found, units, bar in (
            (estimate.V_X, x, y_bar),
            (estimate.V_Y, y, x_bar),
        ):
            deviations = [float((u - units.mean(0)) @ bar) ** 2 for u in units]
            assert math.isclose(found, math.fsum(deviations) / 30, rel_tol=1e-12)
        fraction = (estimate.V_X + estimate.V_Y) / estimate.bars_dot**2
        assert estimate.frac_var == fraction


def test_u_statistic_of_the_contract() -> None:
    """Without a constant it is (B^2 <Xbar, Ybar> - sum <X_u, Y_u>) / (B (B - 1))."""
    x, y = random_units(1, 5), random_units(2, 5)
    dot, diagonal = float(x.mean(0) @ y.mean(0)), (x * y).sum(1)
    expected = (25 * dot - float(diagonal.sum())) / 20
    found = without_diagonal(dot, y @ x.mean(0), diagonal)
    assert math.isclose(found, expected, rel_tol=1e-12)


def test_u_statistic_is_unbiased_and_the_plain_product_is_not() -> None:
    """Every batch of two units of two one-token responses over three tokens."""
    probabilities = torch.tensor([0.2, 0.3, 0.5], dtype=DOUBLE)
    scores = torch.eye(3, dtype=DOUBLE) - probabilities
    rewards = torch.tensor([1.0, 0.0, 0.4], dtype=DOUBLE)
    ones, group = torch.ones(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    units, weights = [], []
    for pair in itertools.product(range(3), repeat=2):
        chosen, logp = scores[list(pair)], probabilities.log()[list(pair)]
        advantages = rewards[list(pair)] - rewards[list(pair)].mean()
        x = entropy_coefficients(logp, ones, group, "dr_grpo") @ chosen
        y = reward_coefficients(advantages, ones, group) @ chosen
        units.append((x, y))
        weights.append(float(probabilities[list(pair)].prod()))
    X, Y = (torch.stack(pieces) for pieces in zip(*units))
    p = torch.tensor(weights, dtype=DOUBLE)
    expected = float((p @ X) @ (p @ Y))
    plain = paired = 0.0
    for batch in itertools.product(range(9), repeat=2):
        x, y = X[list(batch)], Y[list(batch)]
        weight = float(p[list(batch)].prod())
        dot = float(x.mean(0) @ y.mean(0))
        plain += weight * dot
        paired += weight * without_diagonal(dot, y @ x.mean(0), (x * y).sum(1))
    assert math.isclose(paired, expected, rel_tol=1e-12)
    bias = (float(p @ (X * Y).sum(1)) - expected) / 2
    assert math.isclose(plain - expected, bias, rel_tol=1e-12)
    assert abs(bias) > 0.1 * abs(expected)


def test_no_fraction_of_nothing() -> None:
    estimate = estimate_dot(0.0, torch.ones(2), torch.ones(3))
    assert estimate.frac_var is None
    assert (estimate.V_X, estimate.V_Y) == (0.0, 0.0)


def test_fewer_than_two_units_have_no_variance() -> None:
    one, two = torch.ones(1, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE)
    for projections in ((one, two), (two, one)):
        with pytest.raises(InputError, match="at least 2 groups, found 1"):
            estimate_dot(1.0, *projections)
    with pytest.raises(InputError, match="at least 2 groups, found 0"):
        variance_of_mean(one[:0])
    with pytest.raises(InputError, match="U-statistic needs at least 2 groups"):
        without_diagonal(1.0, one, one)


def test_two_units_have_a_u_statistic_but_no_variance_of_it() -> None:
    """Without one of two units there is no pair; a variance of 0 would be a lie."""
    x, y = random_units(1, 2), random_units(2, 2)
    projections = (x @ y.mean(0), y @ x.mean(0), (x * y).sum(1))
    found = estimate_dot(float(x.mean(0) @ y.mean(0)), *projections)
    assert found.u_statistic and found.paired_variance is None
    assert found.V_X > 0 and found.V_Y > 0
    with pytest.raises(InputError, match="at least 3 groups, found 2"):
        paired_variance(*projections, torch.zeros(2, dtype=DOUBLE))


# Units that are one of three, each a row: X_u and Y_u.
ATOMS = {
    # <X_u, Y_v> = x_u + y_v: single units make all of the spread.
    "of single units": ([[1.0, -2.0], [1.0, 0.5], [1.0, 3.0]],
                        [[0.7, 1.0], [-1.0, 1.0], [0.2, 1.0]]),
    "of pairs too": ([[1.0, -2.0], [0.3, 0.5], [-1.0, 3.0]],
                     [[0.7, 1.0], [-1.0, 0.4], [0.2, -1.5]]),
}  # fmt: skip


@pytest.mark.parametrize("num_units", [3, 4, 8])
@pytest.mark.parametrize("kind", list(ATOMS))
def test_expected_variance_of_the_u_statistic(kind: str, num_units: int) -> None:
    """Every batch there is: unbiased, and above by delta / (2 (B - 1) (B - 2))."""
    X, Y = (torch.tensor(rows, dtype=DOUBLE) for rows in ATOMS[kind])
    p = torch.tensor([0.2, 0.3, 0.5], dtype=DOUBLE)
    first = second = variance = 0.0
    for batch in itertools.product(range(3), repeat=num_units):
        x, y, weight = X[list(batch)], Y[list(batch)], float(p[list(batch)].prod())
        found = estimate_dot(
            float(x.mean(0) @ y.mean(0)),
            x @ y.mean(0),
            y @ x.mean(0),
            (x * y).sum(1),
        )
        first += weight * found.bars_dot
        second += weight * found.bars_dot**2
        variance += weight * float(found.paired_variance or 0.0)
    kernel = X @ Y.T + Y @ X.T
    theta = float(p @ kernel @ p)
    single = kernel @ p - theta
    rest = kernel - theta - single[:, None] - single
    delta = float(p @ rest.square() @ p)
    excess = delta / (2 * (num_units - 1) * (num_units - 2))
    assert (delta > 0.1) == (kind == "of pairs too")
    assert math.isclose(variance, second - first**2 + excess, rel_tol=1e-9)


# Simulated batches


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """NUM_BATCHES batches of NUM_UNITS groups of two responses of a toy.

    Attributes:
        groups: all groups of all batches, one after the other.
        coefficients: weight of each sequence's grad S in its unit, [n].
        scores: grad S of every response, [R, P].
    """

    groups: Groups
    coefficients: Tensor
    scores: Tensor

    @property
    def bars(self) -> Tensor:
        """Mean gradient of every batch, [NUM_BATCHES, P]."""
        sums = torch.zeros(NUM_BATCHES * len(self.scores), dtype=DOUBLE)
        batch = self.groups.group // NUM_UNITS
        place = batch * len(self.scores) + self.groups.response
        sums.index_add_(0, place, self.coefficients / NUM_UNITS)
        return sums.reshape(NUM_BATCHES, -1) @ self.scores

    def projections(self, directions: Tensor) -> Tensor:
        """Every unit along its batch's direction [NUM_BATCHES, P]; [..., NUM_UNITS]."""
        along = directions @ self.scores.T
        batch = self.groups.group // NUM_UNITS
        products = self.coefficients * along[batch, self.groups.response]
        return products.reshape(NUM_BATCHES, NUM_UNITS, 2).sum(2)


def simulate(toy: Toy, seed: int) -> Groups:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.multinomial(
        toy.probabilities, 2 * NUM_BATCHES * NUM_UNITS, True, generator=generator
    )
    return Groups.of(draws.reshape(-1, 2))


@pytest.fixture(scope="module")
def simulated() -> tuple[Simulated, Simulated]:
    """Independent batches E and U of the ragged toy."""
    toy = make_toy(ragged=True)
    E, U = simulate(toy, 2), simulate(toy, 3)
    return (
        Simulated(
            groups=E,
            coefficients=E.entropy_coefficients(toy, "dr_grpo"),
            scores=toy.scores,
        ),
        Simulated(groups=U, coefficients=U.reward_coefficients(toy), scores=toy.scores),
    )


def expected_bars() -> tuple[Tensor, Tensor]:
    """E[X_u] and E[Y_u] by enumeration, [P] each."""
    toy = make_toy(ragged=True)
    groups, probability = every_group(toy, 2)
    return (
        expectation(
            toy, groups, probability * groups.entropy_coefficients(toy, "dr_grpo")
        ),
        expectation(toy, groups, probability * groups.reward_coefficients(toy)),
    )


def coverage(values: Tensor, variances: list[float], expected: float) -> float:
    """Share of the intervals value +- 1.96 sqrt(variance) that hold the expectation."""
    errors = torch.tensor(variances, dtype=DOUBLE).sqrt()
    return float(((values - expected).abs() <= 1.959964 * errors).double().mean())


def test_v_x_is_the_variance_along_a_fixed_step(
    simulated: tuple[Simulated, Simulated],
) -> None:
    """Direction `step`, conditional on it: the error is that of Xbar alone."""
    E, _ = simulated
    mean_x, mean_y = expected_bars()
    values = E.bars @ mean_y
    projections = E.projections(mean_y.expand(NUM_BATCHES, -1))
    variances = [variance_of_mean(row) for row in projections]
    ratio = math.sqrt(math.fsum(variances) / NUM_BATCHES) / float(values.std())
    # The standard deviation of 2,000 normal values is known to 1/sqrt(4,000) = 1.6 %.
    assert abs(ratio - 1) <= 0.05
    assert 0.93 <= coverage(values, variances, float(mean_x @ mean_y)) <= 0.97


def test_intervals_of_independent_batches_cover(
    simulated: tuple[Simulated, Simulated],
) -> None:
    """V_X + V_Y: both batches are drawn anew each time."""
    E, U = simulated
    mean_x, mean_y = expected_bars()
    x_bars, y_bars = E.bars, U.bars
    values = (x_bars * y_bars).sum(1)
    along_y, along_x = E.projections(y_bars), U.projections(x_bars)
    estimates = [
        estimate_dot(float(value), p, q)
        for value, p, q in zip(values, along_y, along_x)
    ]
    variances = [estimate.V_X + estimate.V_Y for estimate in estimates]
    ratio = math.sqrt(math.fsum(variances) / NUM_BATCHES) / float(values.std())
    assert abs(ratio - 1) <= 0.05
    assert 0.93 <= coverage(values, variances, float(mean_x @ mean_y)) <= 0.97


def test_intervals_of_the_same_rollouts_cover(
    simulated: tuple[Simulated, Simulated],
) -> None:
    """The variance of the U-statistic; V_X + V_Y knows nothing of the covariance."""
    E, _ = simulated
    toy = make_toy(ragged=True)
    U = replace(E, coefficients=E.groups.reward_coefficients(toy))
    mean_x, mean_y = expected_bars()
    x_bars, y_bars = E.bars, U.bars
    along_y, along_x = E.projections(y_bars), U.projections(x_bars)
    diagonal = diagonals(E, U)
    plain = (x_bars * y_bars).sum(1)
    estimates = [
        estimate_dot(float(value), *three)
        for value, *three in zip(plain, along_y, along_x, diagonal)
    ]
    values = torch.tensor([estimate.bars_dot for estimate in estimates], dtype=DOUBLE)
    variances = [float(estimate.paired_variance or 0.0) for estimate in estimates]
    expected = float(mean_x @ mean_y)
    ratio = math.sqrt(math.fsum(variances) / NUM_BATCHES) / float(values.std())
    assert abs(ratio - 1) <= 0.05
    assert 0.93 <= coverage(values, variances, expected) <= 0.97
    error = float(values.std()) / math.sqrt(NUM_BATCHES)
    assert abs(float(values.mean()) - expected) <= 3 * error


def diagonals(E: Simulated, U: Simulated) -> Tensor:
    """<X_u, Y_u> of the same groups, [NUM_BATCHES, NUM_UNITS]."""
    products = E.scores @ E.scores.T
    response = E.groups.response.reshape(-1, 2)
    left, right = (s.coefficients.reshape(-1, 2) for s in (E, U))
    total = sum(
        left[:, i] * right[:, j] * products[response[:, i], response[:, j]]
        for i, j in itertools.product(range(2), repeat=2)
    )
    assert isinstance(total, Tensor)
    return total.reshape(NUM_BATCHES, NUM_UNITS)
