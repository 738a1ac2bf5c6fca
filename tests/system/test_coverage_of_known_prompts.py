"""Is the error of a known set of prompts the one of repeated sampling from it?

Batches take n of 500 prompts without replacement, with G responses to each. What varies
between them is which prompts are left out, and the responses: nothing else is in the
errors, and the exact entropy is that of the set.
"""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from enumerable import Policy, draws_of, group_numbers
from simulated import Pieces, Repeated, exact, per_token_estimates, repeated
from torch import Tensor

from entropy_ddp.estimators.standard_errors import Draws

NUM_PROMPTS, ETA = 500, 0.1
NUM_BATCHES = 400
# The spread of 400 values is known to 3.5 %, a coverage of 95 % to 1.1 %.
ERROR_RATIO = (0.9, 1.1)
COVERAGE = (0.915, 0.985)
# Four standard deviations of the mean of 400 values, in units of their spread.
BIAS = 4 / NUM_BATCHES**0.5
CASES = [
    (64, 2),
    pytest.param(250, 2, marks=pytest.mark.long),
    pytest.param(500, 4, marks=pytest.mark.long),
    pytest.param(250, 4, marks=pytest.mark.long),
    pytest.param(500, 2, marks=pytest.mark.long),
]
# What independent draws would say of all 500 prompts with four responses each.
FAR_TOO_LARGE = 1.5


@cache
def policy() -> Policy:
    return Policy(vocabulary=3, length=3, num_prompts=NUM_PROMPTS, seed=5)


@cache
def pieces() -> Pieces:
    table = policy().table(ETA)
    return Pieces([table], table.select)


def batches(units: int, responses: int, number: int) -> Iterator[Tensor]:
    """Row numbers of so many batches, [n G] each: prompts without replacement."""
    generator = torch.Generator().manual_seed(units + responses)
    upper = policy().probabilities.cumsum(0) * NUM_PROMPTS
    for _ in range(number):
        prompt = torch.randperm(NUM_PROMPTS, generator=generator)[:units, None]
        uniform = torch.rand(units, responses, generator=generator, dtype=torch.float64)
        index = torch.searchsorted(upper, prompt + uniform)
        yield index.clamp(max=len(upper) - 1).flatten()


def simulated(
    draws: Draws, units: int, responses: int, number: int
) -> dict[str, Repeated]:
    return repeated(
        per_token_estimates(pieces(), ETA, index, draws)
        for index in batches(units, responses, number)
    )


@pytest.mark.parametrize(("units", "responses"), CASES)
def test_errors_are_the_spread_and_intervals_cover(units: int, responses: int) -> None:
    groups = group_numbers(units, responses)
    known = Draws(groups=groups, num_prompts_total=NUM_PROMPTS)
    wrong = {}
    for name, found in simulated(known, units, responses, NUM_BATCHES).items():
        expected = exact(policy(), ETA, name, len(groups))
        ratios = [found.error_ratio(e) for e in (found.se, found.se_jackknife)]
        covered, bias = found.coverage(expected), found.bias(expected)
        as_expected = (
            all(ERROR_RATIO[0] < ratio < ERROR_RATIO[1] for ratio in ratios),
            COVERAGE[0] < covered < COVERAGE[1],
            abs(bias) < BIAS,
        )
        if not all(as_expected):
            wrong[name] = (*ratios, covered, bias)
    # Error over the spread by both methods, coverage, bias over the spread.
    assert wrong == {}


def test_errors_of_independent_draws_are_far_too_large() -> None:
    """Of a batch that has every prompt, where nothing is drawn but responses."""
    found = simulated(draws_of(500, 4), 500, 4, 100)
    for name in ("before", "truth snis", "slope to_go action_value"):
        assert found[name].error_ratio(found[name].se) > FAR_TOO_LARGE, name
