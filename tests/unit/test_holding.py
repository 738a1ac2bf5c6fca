"""Are the weights that hold the entropy those of their definitions, token by token?"""

import math

import pytest
import torch
from torch import Tensor

from entropy_ddp.estimators.holding import FAMILIES, improbable_failures

DOUBLE = torch.float64
DIFFERENCE = 1e-6


def tokens() -> tuple[Tensor, Tensor]:
    """log p [7, 1] of all sizes, and advantages [3] of all signs."""
    probability = torch.tensor([1.0, 0.9, 0.5, 0.4999, 0.1, 1e-3, 1e-8], dtype=DOUBLE)
    return probability.log()[:, None], torch.tensor([-0.7, 0.0, 1.3], dtype=DOUBLE)


def repo_by_hand(logp: float, advantage: float, zeta: float) -> float:
    """The advantage as REPO-R rescales it, over the advantage."""
    if advantage > 0:
        return max(0.0, advantage * (1 - zeta * logp)) / advantage
    if advantage < 0:
        return min(0.0, advantage * (1 + zeta * logp)) / advantage
    return 1.0


def failures_by_hand(logp: float, advantage: float, weight: float) -> float:
    """A class of tokens has another weight."""
    return weight if advantage < 0 and math.exp(logp) < 0.5 else 1.0


BY_HAND = {"repo": repo_by_hand, "improbable_failures": failures_by_hand}
PARAMETERS = [-1.0, -0.3, 0.0, 0.08, 0.3, 1.0, 2.0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameter", PARAMETERS)
def test_weights_are_those_of_the_definition(family: str, parameter: float) -> None:
    logp, advantage = tokens()
    found = FAMILIES[family].weight(logp, advantage, parameter)
    expected = [
        [BY_HAND[family](float(lp), float(a), parameter) for a in advantage]
        for lp in logp[:, 0]
    ]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=DOUBLE), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameter", PARAMETERS)
def test_slopes_are_differences_of_weights(family: str, parameter: float) -> None:
    """But at a kink, of which there is none here."""
    (logp, advantage), of = tokens(), FAMILIES[family]
    above, below = (
        of.weight(logp, advantage, parameter + sign * DIFFERENCE) for sign in (1, -1)
    )
    found = of.slope(logp, advantage, parameter)
    torch.testing.assert_close(
        found, (above - below) / (2 * DIFFERENCE), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_neutral_member_is_the_plain_loss(family: str) -> None:
    """Bit for bit; and it is within the limits."""
    (logp, advantage), of = tokens(), FAMILIES[family]
    weight = of.weight(logp, advantage, of.neutral)
    assert torch.equal(weight, torch.ones(7, 3, dtype=DOUBLE).expand_as(weight))
    assert of.limits[0] < of.neutral < of.limits[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_within_the_limits_is_negative(family: str) -> None:
    (logp, advantage), of = tokens(), FAMILIES[family]
    for parameter in torch.linspace(*of.limits, 21).tolist():
        assert bool((of.weight(logp, advantage, parameter) >= 0).all())


def test_a_token_of_probability_one_half_is_not_improbable() -> None:
    logp = torch.tensor([0.5, 0.499], dtype=DOUBLE).log()
    failed = torch.full_like(logp, -1.0)
    assert improbable_failures(logp, failed).tolist() == [False, True]
    assert not bool(improbable_failures(logp, -failed).any())
