"""Is the inner product of the two mean gradients what its docstring says it is?

On a toy policy with five tokens and at most three steps every response can be listed, so
that expectations over groups of responses are sums: unbiasedness is an equality. What is
random (the coverage of intervals) is simulated 2,000 times with a fixed seed.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from reference import all_rows
from torch import Tensor

from entropy_ddp.errors import InputError
from entropy_ddp.estimators.gradient_dot import (
    Weighting,
    entropy_coefficients,
    estimate_dot,
    longest_in_group,
    reward_coefficients,
    variance_of_mean,
    without_diagonal,
)

DOUBLE = torch.float64
VOCABULARY, LONGEST = 5, 3
TOLERANCE = 1e-13  # sums of up to 600,000 terms of order 1, weighted by probabilities
NUM_BATCHES = 2000
NUM_UNITS = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class Toy:
    """A policy whose every response is listed.

    The logits of step k depend on k and on the token before; P of them are parameters.

    Attributes:
        theta: logits, [LONGEST, VOCABULARY + 1, VOCABULARY].
        tokens: the responses.
        lengths: their lengths, [R].
        rewards: a reward for each, [R].
    """

    theta: Tensor
    tokens: list[list[int]]
    lengths: Tensor
    rewards: Tensor

    def logp(self, theta: Tensor) -> Tensor:
        """S of every response, [R]."""
        steps = theta.log_softmax(-1)
        return torch.stack(
            [
                sum(steps[k, ([VOCABULARY] + ids)[k], v] for k, v in enumerate(ids))
                for ids in self.tokens
            ]
        )

    @property
    def values(self) -> Tensor:
        """S at theta, [R]."""
        return self.logp(self.theta)

    @property
    def probabilities(self) -> Tensor:
        """Probability of every response, [R]."""
        return self.values.exp()

    @property
    def scores(self) -> Tensor:
        """grad S of every response, [R, P]."""
        jacobian = torch.autograd.functional.jacobian(self.logp, self.theta)
        return jacobian.reshape(len(self.tokens), -1)

    def gradient_of_mean(self, per_response: Tensor) -> Tensor:
        """Gradient of E[f] for f that does not depend on the parameters, [P]."""
        return (self.probabilities * per_response) @ self.scores

    def gradient_of_mean_surprisal(self, divisor: Tensor) -> Tensor:
        """Gradient of E[-S / divisor], where S depends on them too, [P]."""

        def functional(theta: Tensor) -> Tensor:
            logp = self.logp(theta)
            return -(logp.exp() * logp / divisor).sum()

        return torch.autograd.functional.jacobian(functional, self.theta).flatten()


@cache
def make_toy(*, ragged: bool) -> Toy:
    """Responses end at token 0 or after LONGEST steps, or all after LONGEST steps."""
    generator = torch.Generator().manual_seed(1)
    shape = (LONGEST, VOCABULARY + 1, VOCABULARY)
    end = 0 if ragged else -1
    tokens = [r.response_ids for r in all_rows([1], VOCABULARY, end, LONGEST)]
    return Toy(
        theta=torch.randn(shape, generator=generator, dtype=DOUBLE),
        tokens=tokens,
        lengths=torch.tensor([len(ids) for ids in tokens]),
        rewards=torch.rand(len(tokens), generator=generator, dtype=DOUBLE),
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
    responses = torch.cartesian_prod(*[torch.arange(len(toy.tokens))] * size)
    probability = toy.probabilities[responses].prod(1)
    return Groups.of(responses), probability.repeat_interleave(size)


def expectation(toy: Toy, groups: Groups, weights: Tensor) -> Tensor:
    """Sum of weight times grad S over all sequences, [P]."""
    totals = torch.zeros(len(toy.tokens), dtype=DOUBLE)
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
    expected = toy.gradient_of_mean_surprisal(toy.lengths)
    expected = expected + toy.gradient_of_mean(1 / toy.lengths)
    assert_same(expectation(toy, groups, weights), expected)


@pytest.mark.parametrize("weighting", ["dr_grpo", "per_token_avg"])
@pytest.mark.parametrize("size", [2, 3])
def test_expected_x_of_equally_long_responses(size: int, weighting: Weighting) -> None:
    """E[X_u] = grad H / T: exactly the gradient of the entropy per token."""
    toy = make_toy(ragged=False)
    few = 3 if size == 3 else len(toy.tokens)
    toy = conditioned(toy, few * few)
    groups, probability = every_group(toy, size)
    weights = probability * groups.entropy_coefficients(toy, weighting)
    expected = toy.gradient_of_mean_surprisal(toy.lengths)
    assert_same(expectation(toy, groups, weights), expected)
