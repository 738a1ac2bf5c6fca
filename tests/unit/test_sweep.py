"""Are the step sizes of a sweep the telling ones, and is its summary what it says?"""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_ddp.estimators.step_sizes import (
    SMALLEST_SHARE,
    choose_grid,
    predicted_ess_fraction,
    summarise,
)
from entropy_ddp.estimators.sweep_points import SweepPoint, SweepSummary

GRID_RTOL = 1e-5  # learning rates are rounded to six digits
ESS_ATOL = 1e-5
RTOL = 1e-12

DLOGP = 30.0 + 200.0 * torch.randn(
    500, generator=torch.Generator().manual_seed(0), dtype=torch.float64
)
SLOPE = -40.0


def grid(
    dlogp: Tensor = DLOGP,
    slope: float = SLOPE,
    noise_floor: float = 0.0,
    ess_warn: float = 0.5,
    num_points: int = 8,
) -> list[float]:
    return choose_grid(dlogp, slope, noise_floor, ess_warn, num_points)


# The grid


def test_predicted_ess_is_that_of_linear_log_weights() -> None:
    weights = (0.004 * DLOGP).exp()
    expected = float(weights.sum() ** 2 / weights.square().sum()) / len(DLOGP)
    assert predicted_ess_fraction(DLOGP, 0.004) == pytest.approx(expected, rel=RTOL)
    assert predicted_ess_fraction(DLOGP, 0.0) == pytest.approx(1.0, rel=RTOL)


@pytest.mark.parametrize("num_points", [2, 3, 8])
def test_rates_are_sorted_and_evenly_spaced_in_their_logarithm(num_points: int) -> None:
    etas = grid(num_points=num_points)
    assert len(etas) == num_points
    assert etas == sorted(set(etas))
    steps = [math.log(b / a) for a, b in pairwise(etas)]
    assert steps == pytest.approx([sum(steps) / len(steps)] * len(steps), rel=GRID_RTOL)


@pytest.mark.parametrize("ess_warn", [0.2, 0.5, 0.9])
def test_largest_rate_is_where_the_predicted_ess_meets_the_threshold(
    ess_warn: float,
) -> None:
    largest = grid(ess_warn=ess_warn)[-1]
    assert abs(predicted_ess_fraction(DLOGP, largest) - ess_warn) < ESS_ATOL


def test_smallest_rate_is_ten_times_the_noise() -> None:
    largest = grid()[-1]
    for share in (0.005, 0.02, 0.09):
        noise_floor = share * largest * abs(SLOPE) / 10
        etas = grid(noise_floor=noise_floor)
        assert abs(SLOPE) * etas[0] == pytest.approx(10 * noise_floor, rel=GRID_RTOL)
        assert etas[-1] == pytest.approx(largest, rel=GRID_RTOL)


def test_smallest_rate_is_between_a_thousandth_and_a_tenth_of_the_largest() -> None:
    """Without noise, without a slope, and where all would drown in noise."""
    for options, share in (
        ({"noise_floor": 0.0}, SMALLEST_SHARE),
        ({"noise_floor": 1e-9}, SMALLEST_SHARE),
        ({"slope": 0.0, "noise_floor": 1.0}, SMALLEST_SHARE),
        ({"noise_floor": 1e9}, 0.1),
    ):
        etas = grid(**options)
        assert etas[0] / etas[-1] == pytest.approx(share, rel=GRID_RTOL)


def test_grid_follows_the_spread_of_the_log_weights() -> None:
    """Not their mean, which every weight shares; and inversely to their scale."""
    assert grid(DLOGP + 1e3) == pytest.approx(grid(), rel=GRID_RTOL)
    assert grid(1e6 * DLOGP) == pytest.approx([e / 1e6 for e in grid()], rel=GRID_RTOL)


def test_log_weights_that_are_all_alike_set_no_limit() -> None:
    etas = grid(torch.full((10,), 3.0, dtype=torch.float64))
    assert etas[-1] == pytest.approx(1.0, rel=GRID_RTOL)
    assert all(0 < eta < math.inf for eta in etas)


# The summary

POINT = SweepPoint(
    eta=1.0,
    delta_h_true=1.0,
    se=1e-3,
    ess_fraction=0.9,
    delta_h1=1.0,
    delta_h1_se=1e-3,
    delta_h2=None,
    difference_se=1e-3,
    trusted=True,
)
ETAS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def point(eta: float, change: float, **options: float) -> SweepPoint:
    return replace(POINT, eta=eta, delta_h_true=change, **options)


def summary(points: list[SweepPoint], noise_floor: float = 0.0) -> SweepSummary:
    """Of truths that three groups make, with noise that grows as they do."""
    noise = torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64)
    influences = {p.eta: p.delta_h_true * noise / 100 for p in points}
    return summarise(points, noise_floor, influences, 2.0)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_exponent_of_a_power_law(power: float, sign: int) -> None:
    points = [point(eta, sign * 7 * eta**power) for eta in ETAS]
    for order in (points, points[::-1]):
        found = summary(order).exponent
        assert found == pytest.approx(power, rel=RTOL)


def test_exponent_is_of_trusted_points_above_the_noise() -> None:
    points = [point(eta, 7 * eta) for eta in ETAS[1:-1]]
    points.append(point(ETAS[0], 0.5, trusted=False))
    points.append(point(ETAS[-1], 1e-6))
    points.append(point(-1.0, 123.0))
    found = summary(points, 1e-6)
    assert found.exponent == pytest.approx(1.0, rel=RTOL)
    assert found.noise_floor == 1e-6


def test_exponent_of_fewer_than_two_points_is_none() -> None:
    for points in ([], [point(1e-3, 1.0)], [point(1e-3, 1.0), point(-1e-3, 1.0)]):
        assert summary(points).exponent is None


def quadratic(eta: float, se: float = 2e-4) -> SweepPoint:
    """Truth 5 eta + 40 eta^2, first order 5 eta."""
    return point(eta, 5 * eta + 40 * eta**2, delta_h1=5 * eta, se=se)


def test_agreement_ends_where_the_quadratic_term_is_two_errors() -> None:
    """40 eta^2 = 4e-4 at eta = 3.2e-3."""
    points = [quadratic(eta) for eta in ETAS]
    found = summary(points[::-1])
    assert found.agreement == [1e-4, 3e-3]


def test_agreement_is_a_run_from_the_smallest_rate_up() -> None:
    """A point that agrees beyond one that does not is a coincidence."""
    points = [quadratic(eta) for eta in ETAS]
    points[2] = point(ETAS[2], 9.0, delta_h1=5 * ETAS[2])
    assert summary(points).agreement == [1e-4, 3e-4]
    points[0] = point(ETAS[0], 9.0, delta_h1=5 * ETAS[0])
    assert summary(points).agreement is None
    assert summary([]).agreement is None


def test_agreement_passes_over_points_that_say_nothing() -> None:
    """Those in the noise, those without enough effective sequences."""
    points = [quadratic(eta) for eta in ETAS]
    points[0] = point(ETAS[0], 1e-9, delta_h1=1.0)
    points[1] = point(ETAS[1], 9.0, delta_h1=1.0, trusted=False)
    assert summary(points, 1e-8).agreement == [1e-3, 3e-3]


def test_what_is_not_trusted_ends_the_agreement() -> None:
    """However well it agrees, and whatever agrees behind it."""
    points = [quadratic(eta) for eta in ETAS]
    points[2] = replace(points[2], trusted=False)
    assert summary(points).agreement == [1e-4, 3e-4]
    assert summary([replace(p, trusted=False) for p in points]).agreement is None
    assert summary([replace(p, trusted=False) for p in points]).exponent is None


def test_the_error_of_the_exponent_is_of_what_the_points_do_not_share() -> None:
    """Noise in proportion drops out; what is left is that of a fit to the groups."""
    points = [point(eta, 7 * eta) for eta in ETAS]
    assert summary(points).exponent_se == pytest.approx(0.0, abs=1e-15)
    generator = torch.Generator().manual_seed(3)
    parts = torch.randn(5, 40, generator=generator, dtype=torch.float64) / 1e4
    noise = {p.eta: p.delta_h_true * parts[i] for i, p in enumerate(points)}
    found = summarise(points, 0.0, noise, 2.0).exponent_se
    # Each group's own exponent: its noise is small enough for a difference.
    design = torch.tensor([[math.log(e), 1.0] for e in ETAS], dtype=torch.float64)
    logs = torch.stack([(7 * e + noise[e]).log() for e in ETAS])
    moved = torch.linalg.lstsq(design, logs).solution[0] - 1
    spread = float((moved - moved.mean()).square().sum())
    assert found == pytest.approx(math.sqrt(40 / 39 * spread), rel=1e-3)


def missing(eta: float, curved: float, se: float) -> SweepPoint:
    """A point whose truth is off by curved times eta of itself, with as much error."""
    return point(eta, 5 * eta, missed=curved * eta, missed_se=se * eta)


def reach(points: list[SweepPoint], noise_floor: float = 0.0) -> dict[float, Any]:
    """(eta, low, high) by share."""
    rows = summary(points, noise_floor).reach
    assert rows is not None
    return {row["off_by"]: (row["eta"], *row["interval"]) for row in rows}


@pytest.mark.parametrize("sign", [1, -1])
def test_reach_is_where_first_order_is_off_by_a_share(sign: int) -> None:
    """|r| = 10 eta with error eta: r -+ 2 errors reach 5 % at 5/12 % and 5/8 %."""
    points = [missing(eta, sign * 10.0, 1.0) for eta in ETAS]
    found = reach(points[::-1])
    for share in (0.01, 0.05):
        expected = (share / 10, share / 12, share / 8)
        assert found[share] == pytest.approx(expected, rel=RTOL)
    # 20 % are reached at 2 %, beyond the grid: at least the largest step.
    assert found[0.2] == (None, 1e-2, None)


def test_reach_that_is_beyond_the_grid_on_one_side_has_one_bound() -> None:
    """|r| = 4 eta -+ 2 eta: 5 % at 1.25e-2, rejected nowhere, possible from 8.3e-3."""
    eta, low, high = reach([missing(eta, 4.0, 1.0) for eta in ETAS])[0.05]
    assert (eta, high) == (None, None)
    assert low == pytest.approx(0.05 / 6, rel=RTOL)


def test_reach_below_the_grid_is_bounded_from_above() -> None:
    """|r| = 1000 eta: off by 10 % at the smallest of all."""
    assert reach([missing(eta, 1e3, 1.0) for eta in ETAS])[0.05] == (None, None, 1e-4)


def test_reach_is_not_resolved_where_the_error_is_too_large() -> None:
    """|r| + 2 errors is above 5 % at every step, and |r| - 2 errors below."""
    points = [missing(eta, 10.0, 1e4) for eta in ETAS]
    assert reach(points)[0.05][1:] == (None, None)
    assert reach([])[0.05] == (None, None, None)
    assert reach([point(eta, eta) for eta in ETAS])[0.05] == (None, None, None)


def test_reach_passes_over_rounding_and_ends_at_what_is_not_trusted() -> None:
    """At the two smallest steps rounding alone makes 1 % and more of the truth."""
    points = [missing(eta, 10.0, 1.0) for eta in ETAS]
    points[0] = replace(points[0], missed=0.9)
    points[1] = replace(points[1], missed=0.9)
    eta, low, high = reach(points, noise_floor=2e-5)[0.05]
    assert eta == pytest.approx(5e-3, rel=RTOL)
    assert low is not None and high is not None
    assert low < 5e-3 * 10 / 12 and high > 5e-3 * 10 / 8
    points[3] = replace(points[3], trusted=False)
    assert reach(points, noise_floor=2e-5)[0.05] == (None, 1e-3, None)


def test_odd_part_has_no_even_orders() -> None:
    """a eta + b eta^2 + c eta^3 + d eta^4: what is left is a eta + c eta^3."""

    def change(eta: float) -> float:
        return 5 * eta + 40 * eta**2 - 300 * eta**3 + 1e4 * eta**4

    points = [point(sign * eta, change(sign * eta)) for eta in ETAS for sign in (1, -1)]
    points.append(point(0.1, change(0.1)))
    odd = summary(points).odd
    assert odd is not None
    assert [row["eta"] for row in odd] == list(ETAS)
    assert all(row["se"] > 0 for row in odd)
    assert [row["delta_h"] for row in odd] == pytest.approx(
        [5 * eta - 300 * eta**3 for eta in ETAS], rel=RTOL
    )


def test_odd_part_of_a_one_sided_sweep_is_none() -> None:
    points = [point(eta, eta) for eta in ETAS]
    assert summary(points).odd is None
