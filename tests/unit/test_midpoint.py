"""Slopes away from theta, against the values that they are slopes of."""

import math

import pytest
import torch

from entropy_ddp.config import Integrand, Normalize
from entropy_ddp.data.batch import Ragged
from entropy_ddp.estimators.curvature import midpoint_curvature
from entropy_ddp.estimators.entropy import as_ratio, integrand_tokens, reweighted
from entropy_ddp.estimators.linear import (
    Slope,
    sequence_terms,
    slope_from_terms,
    slope_weights,
)
from entropy_ddp.estimators.midpoint import (
    midpoint_columns,
    midpoint_slope,
    snis_slope,
)
from entropy_ddp.estimators.standard_errors import Draws
from entropy_ddp.model.response_tokens import DirectionalScores

LENGTHS = torch.tensor([3, 1, 4, 2, 5])
DRAWS = Draws(groups=torch.tensor([0, 0, 1, 2, 3]))
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


def value(eta: float, normalize: Normalize = "per_token") -> float:
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
    sizes = {"per_token": size, "per_sequence": len(LENGTHS), "sum": 1}
    return numerator / sizes[normalize]


def estimate_at(
    eta: float, reference: float = 0.3, normalize: Normalize = "per_token"
) -> Slope:
    tokens = at(eta)
    columns = midpoint_columns(tokens, tokens.logp - at(0.0).logp, RAGGED, reference)
    return midpoint_slope(columns, reference, normalize, DRAWS)


def slope_at(eta: float, reference: float = 0.3) -> tuple[float, float]:
    slope = estimate_at(eta, reference)
    return slope.value, slope.se


@pytest.mark.parametrize("normalize", ["per_token", "per_sequence", "sum"])
@pytest.mark.parametrize("eta", [0.0, 0.2, -0.3])
def test_the_slope_is_the_derivative_of_the_value(
    eta: float, normalize: Normalize
) -> None:
    """By a central difference, wherever it is taken; the reference changes nothing."""
    step = 1e-5
    central = value(eta + step, normalize) - value(eta - step, normalize)
    for reference in (0.3, -5.0):
        found = estimate_at(eta, reference, normalize)
        assert found.value == pytest.approx(central / (2 * step), rel=1e-7)


def snis(eta: float, normalize: Normalize, integrand: Integrand) -> float:
    """The self-normalised entropy, sequence by sequence."""
    tokens, base = at(eta), at(0.0)
    values = integrand_tokens(integrand, tokens.logp, tokens.entropy)
    original = as_ratio(normalize, RAGGED.sum(values), LENGTHS)
    return reweighted(original, RAGGED.sum(tokens.logp - base.logp)).value


@pytest.mark.parametrize("integrand", ["rb", "surprisal"])
@pytest.mark.parametrize(
    "normalize", ["per_token", "per_sequence", "per_sequence_token_mean", "sum"]
)
@pytest.mark.parametrize("eta", [0.0, 0.2, -0.3])
def test_the_slope_of_the_self_normalised_value(
    eta: float, normalize: Normalize, integrand: Integrand
) -> None:
    """By a central difference; at theta it is the slope `full` with its error."""
    step, tokens = 1e-5, at(eta)
    pairs = ((tokens.logp, tokens.entropy), (tokens.dlogp, tokens.dentropy))
    after, derivative = (
        as_ratio(normalize, RAGGED.sum(integrand_tokens(integrand, *pair)), LENGTHS)
        for pair in pairs
    )
    found = snis_slope(
        RAGGED.sum(tokens.logp - at(0.0).logp),
        RAGGED.sum(tokens.dlogp),
        after,
        derivative.numerator,
        DRAWS,
    )
    central = snis(eta + step, normalize, integrand) - snis(
        eta - step, normalize, integrand
    )
    assert found.value == pytest.approx(central / (2 * step), rel=1e-7)
    if eta == 0.0:
        kind = (integrand, normalize, "full", "none")
        weights = slope_weights(tokens, RAGGED, after.value, kind)
        terms = sequence_terms(tokens, RAGGED, weights, integrand)
        expected = slope_from_terms(terms, after, DRAWS, ("full", "none"))
        assert found.value == pytest.approx(expected.value, rel=1e-12)
        assert found.se == pytest.approx(expected.se, rel=1e-10)


def test_at_theta_it_is_the_slope_of_entropies_to_go() -> None:
    """With the error of that one."""
    tokens = at(0.0)
    sums = RAGGED.sum(tokens.entropy)
    original = as_ratio("per_token", sums, LENGTHS)
    kind = ("rb", "per_token", "to_go", "hk")
    weights = slope_weights(tokens, RAGGED, original.value, kind)  # type: ignore[arg-type]
    terms = sequence_terms(tokens, RAGGED, weights, "rb")
    expected = slope_from_terms(terms, original, DRAWS, ("to_go", "hk"))
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


def test_the_curvature_of_two_slopes_predicts_by_the_midpoint_rule() -> None:
    """delta_h2 = eta slope + eta^2 H'' / 2 is eta times the slope in the middle."""
    eta = 0.02
    start, middle = estimate_at(0.0), estimate_at(eta / 2)
    found = midpoint_curvature(middle, start, eta)
    assert found.value == pytest.approx((middle.value - start.value) / (eta / 2))
    second = found.second_order(eta, start.estimate)
    assert second.value == pytest.approx(eta * middle.value, rel=1e-12)
    assert second.se_jackknife == pytest.approx(
        eta * middle.estimate.se_jackknife, rel=1e-9
    )
