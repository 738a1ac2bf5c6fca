"""The per-decision slope away from theta, against the values that it is a slope of."""

import math

import pytest
import torch

from entropy_ddp.data.batch import Ragged
from entropy_ddp.estimators.entropy import as_ratio
from entropy_ddp.estimators.linear import (
    sequence_terms,
    slope_from_terms,
    slope_weights,
)
from entropy_ddp.estimators.midpoint import midpoint_columns, midpoint_slope
from entropy_ddp.model.response_tokens import DirectionalScores

LENGTHS = torch.tensor([3, 1, 4, 2, 5])
GROUPS = torch.tensor([0, 0, 1, 2, 3])
RAGGED = Ragged(LENGTHS)
GENERATOR = torch.Generator().manual_seed(0)
# log p and H of every token as polynomials of eta, [3, 15].
LOGP = torch.randn(3, 15, generator=GENERATOR, dtype=torch.float64)
ENTROPY = torch.randn(3, 15, generator=GENERATOR, dtype=torch.float64)


def at(eta: float) -> DirectionalScores:
    powers = torch.tensor([1.0, eta, eta**2], dtype=torch.float64)
    slopes = torch.tensor([0.0, 1.0, 2 * eta], dtype=torch.float64)
    return DirectionalScores(
        logp=powers @ LOGP,
        entropy=powers @ ENTROPY,
        dlogp=slopes @ LOGP,
        dentropy=slopes @ ENTROPY,
    )


def value(eta: float) -> float:
    """The per-decision entropy, token by token."""
    tokens, base = at(eta), at(0.0)
    numerator = size = 0.0
    start = 0
    for length in LENGTHS.tolist():
        log_weight = 0.0
        for k in range(start, start + length):
            weight = math.exp(log_weight)
            numerator += weight * float(tokens.entropy[k])
            size += weight
            log_weight += float(tokens.logp[k] - base.logp[k])
        start += length
    return numerator / size


def slope_at(eta: float, reference: float = 0.3) -> tuple[float, float]:
    tokens = at(eta)
    columns = midpoint_columns(tokens, tokens.logp - at(0.0).logp, RAGGED, reference)
    slope = midpoint_slope(columns, reference, GROUPS)
    return slope.value, slope.se


@pytest.mark.parametrize("eta", [0.0, 0.2, -0.3])
def test_the_slope_is_the_derivative_of_the_value(eta: float) -> None:
    """By a central difference, wherever it is taken."""
    step = 1e-5
    central = (value(eta + step) - value(eta - step)) / (2 * step)
    assert slope_at(eta)[0] == pytest.approx(central, rel=1e-7)


def test_the_reference_entropy_changes_nothing() -> None:
    """It only keeps digits."""
    assert slope_at(0.2, -5.0) == pytest.approx(slope_at(0.2, 0.3), rel=1e-10)


def test_at_theta_it_is_the_slope_of_entropies_to_go() -> None:
    """With the error of that one."""
    tokens = at(0.0)
    sums = RAGGED.sum(tokens.entropy)
    original = as_ratio("per_token", sums, LENGTHS)
    kind = ("rb", "per_token", "to_go", "hk")
    weights = slope_weights(tokens, RAGGED, original.value, kind)  # type: ignore[arg-type]
    terms = sequence_terms(tokens, RAGGED, weights, "rb")
    expected = slope_from_terms(terms, original, GROUPS, ("to_go", "hk"))
    assert slope_at(0.0) == pytest.approx((expected.value, expected.se), rel=1e-10)


def remainder(eta: float, prediction: float) -> float:
    return abs(value(eta) - value(0.0) - prediction)


def test_the_midpoint_rule_leaves_a_quarter_of_the_taylor_polynomial_s_error() -> None:
    """Both of third order in the step."""

    def middle(eta: float) -> float:
        return remainder(eta, eta * slope_at(eta / 2)[0])

    def taylor(eta: float) -> float:
        step = 1e-4
        second = (slope_at(step)[0] - slope_at(-step)[0]) / (2 * step)
        return remainder(eta, eta * slope_at(0.0)[0] + eta**2 * second / 2)

    for error in (middle, taylor):
        assert error(0.02) / error(0.01) == pytest.approx(8, rel=0.2)
    assert middle(0.01) / taylor(0.01) == pytest.approx(0.25, rel=0.1)
