"""Is the second derivative that of the importance-sampled entropy on the same batch?"""

import math
from functools import cache

import pytest
import torch
from enumerable import Policy, Table, curvature_of, group_numbers
from torch import Tensor

from entropy_ddp.config import Integrand, Normalize
from entropy_ddp.data.batch import Ragged
from entropy_ddp.errors import InputError
from entropy_ddp.estimators.curvature import CurvatureEstimate
from entropy_ddp.estimators.entropy import reweighted
from entropy_ddp.estimators.quantiles import two_sided
from entropy_ddp.estimators.standard_errors import Draws, Estimate, jackknife_error

DIFFERENCE_RTOL = 1e-7  # five points, errors of order STEP^4
STEP = 3e-3
RTOL = 1e-10  # the same sums in another order
NUM_GROUPS = 7
NORMALIZATIONS: tuple[Normalize, ...] = (
    "per_token",
    "per_sequence",
    "per_sequence_token_mean",
    "sum",
)
INTEGRANDS: tuple[Integrand, ...] = ("rb", "surprisal")
GROUPS = torch.cat([group_numbers(NUM_GROUPS, 2), torch.tensor([NUM_GROUPS - 1])])
DRAWS = Draws(groups=GROUPS)


@cache
def table(eta: float) -> Table:
    return Policy(num_prompts=2, seed=5).table(eta)


def batch(eta: float, keep: Tensor | None = None) -> Table:
    """Groups of two responses, in the last group a third one without a token.

    Args:
        eta: step size of theta'.
        keep: sequences to keep, all by default, [N] bool.
    """
    index = Policy(num_prompts=2, seed=5).sample(1, NUM_GROUPS, 2, seed=2)[0]
    keep = torch.ones(len(GROUPS), dtype=torch.bool) if keep is None else keep
    chosen = table(eta).select(index[keep[:-1]])
    empty = torch.zeros(int(keep[-1]), dtype=torch.int64)
    lengths = torch.cat([chosen.ragged.lengths, empty])
    return Table(ragged=Ragged(lengths), arrays=chosen.arrays)


def importance_sampled(eta: float, normalize: Normalize, integrand: Integrand) -> float:
    """H(theta + eta v) of the batch by `snis`."""
    moved = batch(eta)
    log_weights = moved.ragged.sum(moved["logp_after"] - moved["logp"])
    return reweighted(moved.ratio(normalize, integrand, "_after"), log_weights).value


@pytest.mark.parametrize("integrand", INTEGRANDS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_value_is_the_second_difference(
    normalize: Normalize, integrand: Integrand
) -> None:
    a, b, c, d, e = (
        importance_sampled(k * STEP, normalize, integrand) for k in (-2, -1, 0, 1, 2)
    )
    difference = (-a + 16 * b - 30 * c + 16 * d - e) / (12 * STEP**2)
    found = curvature_of(batch(0.0), DRAWS, normalize, integrand)
    assert found.value == pytest.approx(difference, rel=DIFFERENCE_RTOL)


@pytest.mark.parametrize("integrand", INTEGRANDS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_error_is_that_of_leaving_each_group_out(
    normalize: Normalize, integrand: Integrand
) -> None:
    """Recomputed without the group; a sum is scaled to the full number of groups."""
    scale = NUM_GROUPS / (NUM_GROUPS - 1) if normalize == "sum" else 1.0
    expected = []
    for group in range(NUM_GROUPS):
        keep = group != GROUPS
        draws = Draws(groups=GROUPS[keep] - (GROUPS[keep] > group).long())
        rest = curvature_of(batch(0.0, keep), draws, normalize, integrand)
        expected.append(scale * rest.value)
    found = curvature_of(batch(0.0), DRAWS, normalize, integrand)
    assert found.estimate.without.tolist() == pytest.approx(expected, rel=RTOL)
    error = jackknife_error(torch.tensor(expected, dtype=torch.float64))
    assert found.estimate.se_jackknife == pytest.approx(error, rel=RTOL)
    assert error > 0


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_value_does_not_depend_on_the_clustering(normalize: Normalize) -> None:
    """Groups enter the error only."""
    whole = batch(0.0)
    found = curvature_of(whole, DRAWS, normalize)
    generator = torch.Generator().manual_seed(0)
    shuffled = GROUPS[torch.randperm(len(GROUPS), generator=generator)]
    each = curvature_of(whole, Draws(groups=torch.arange(len(GROUPS))), normalize)
    assert curvature_of(
        whole, Draws(groups=shuffled), normalize
    ).value == pytest.approx(found.value, rel=RTOL)
    assert each.value == pytest.approx(found.value, rel=RTOL)
    assert each.estimate.se != pytest.approx(found.estimate.se, rel=1e-3)


def made_up(value: float, spread: float, seed: int, count: int = 30) -> Estimate:
    """An estimate of a mean with so large an error over independent units."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    x = value + spread * math.sqrt(count) * (x - x.mean()) / x.std()
    columns = torch.stack([x, torch.ones_like(x)], dim=1)
    draws = Draws(groups=torch.arange(count))
    return Estimate.of(lambda t: t[..., 0] / t[..., 1], columns, draws)


def test_second_order_prediction_and_the_edge_of_the_linear_regime() -> None:
    second, slope = made_up(-4.0, 1.0, 0), made_up(3.0, 0.1, 1)
    bend = CurvatureEstimate(method="taylor", estimate=second)
    predicted = bend.second_order(0.5, slope)
    assert predicted.value == pytest.approx(0.5 * 3.0 - 0.5 * 0.25 * 4.0)
    influence = 0.5 * slope.influence + 0.125 * second.influence
    torch.testing.assert_close(predicted.influence, influence)
    edge = bend.eta_star(slope)
    assert edge == pytest.approx(1.5)
    linear = edge * 3.0
    assert bend.second_order(edge, slope).value - linear == pytest.approx(-linear)
    assert bend.eta_star(slope.scaled(-1)) == pytest.approx(1.5)
    straight = CurvatureEstimate(method="taylor", estimate=second.scaled(0.0))
    assert straight.eta_star(slope) is None
    assert straight.eta_star_error(slope) is None


@pytest.mark.parametrize("sign", [1, -1])
def test_the_interval_of_the_edge_is_where_both_orders_cannot_be_told(
    sign: int,
) -> None:
    """Of every x inside, 2 slope - x H'' is not resolved, and of none outside."""
    second, slope = made_up(sign * 4.0, 0.8, 0), made_up(3.0, 0.2, 1)
    bend = CurvatureEstimate(method="midpoint", estimate=second)
    low, high = bend.eta_star_interval(slope)
    edge = bend.eta_star(slope)
    assert high is not None and 0 < low < edge < high

    def ratio(x: float) -> float:
        rest = slope.scaled(2.0).minus(second, sign * x)
        return abs(rest.value) / rest.se_jackknife

    assert ratio(low) == pytest.approx(two_sided(29), rel=1e-6)
    assert ratio(high) == pytest.approx(two_sided(29), rel=1e-6)
    assert (
        ratio((low + high) / 2) < two_sided(29) < min(ratio(low / 2), ratio(2 * high))
    )


def test_without_a_resolved_curvature_the_edge_has_no_end() -> None:
    """Errors of H'' a hundred times H'' itself: only a lower end, which is resolved."""
    slope = made_up(3.0, 0.2, 1)
    bend = CurvatureEstimate(method="midpoint", estimate=made_up(590.0, 5.3e4, 0))
    low, high = bend.eta_star_interval(slope)
    assert high is None
    rest = slope.scaled(2.0).minus(bend.estimate, low)
    assert rest.value / rest.se_jackknife == pytest.approx(two_sided(29), rel=1e-6)
    # As large as the largest curvature within the error allows, about.
    assert low == pytest.approx(2 * 3.0 / (two_sided(29) * 5.3e4), rel=0.3)
    unresolved = bend.eta_star_interval(made_up(0.1, 0.2, 1))
    assert unresolved == (0.0, None)


def test_second_order_prediction_leaves_the_third_order() -> None:
    """Halving eta divides what is left by eight."""
    slope = 0.0
    for k, weight in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
        slope += weight * importance_sampled(k * STEP, "per_token", "rb")
    slope /= 12 * STEP
    bend = curvature_of(batch(0.0), DRAWS, "per_token")
    here = importance_sampled(0.0, "per_token", "rb")
    left = [
        importance_sampled(eta, "per_token", "rb")
        - here
        - (eta * slope + eta**2 * bend.value / 2)
        for eta in (0.02, 0.01)
    ]
    assert math.log2(left[0] / left[1]) == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_fewer_than_two_groups_raise(normalize: Normalize) -> None:
    one = Draws(groups=torch.zeros(len(GROUPS), dtype=torch.int64))
    with pytest.raises(InputError, match="at least 2 groups in E, found 1"):
        curvature_of(batch(0.0), one, normalize)
