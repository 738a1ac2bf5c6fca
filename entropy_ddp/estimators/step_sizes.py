"""A grid of step sizes along one direction: which to measure, and what they say.

For AdamW the parameter change is exactly linear in the learning rate, so one direction v
serves every eta, and theta + eta v is measured without another optimizer step.

Whether truth and first order agree is judged by the truth's own error. A paired test has
the same verdict at every eta: the difference grows as eta^2 H'' / 2, and so does its
error, so that a resolved curvature is a rejection however small the step is. What does
depend on eta is how much is missed, r(eta) = 1 - eta slope / Delta H, in leading order
eta H'' / (2 slope).

Shape legend: N sequences, p points.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from entropy_ddp.estimators.standard_errors import (
    delta_method_error,
    effective_sample_size,
)
from entropy_ddp.estimators.sweep_points import SweepPoint, SweepSummary

SMALLEST_SHARE = 1e-3
# Of the truth: up to which step size is first order off by less than this?
OFF_BY = (0.01, 0.05, 0.2)
# No step keeps all weights equal: a threshold of 1 is read as this.
LARGEST_ESS_FRACTION = 0.99


def predicted_ess_fraction(dlogp: Tensor, eta: float) -> float:
    """ESS / N at eta if log-weights were linear, log w_i = eta l'_i, from l' [N]."""
    return effective_sample_size(eta * dlogp) / len(dlogp)


def choose_grid(
    dlogp: Tensor, slope: float, noise_floor: float, ess_warn: float, num_points: int
) -> list[float]:
    """Learning rates, evenly spaced in their logarithm, over which a sweep is telling.

    The largest is where the effective sample size is predicted to fall to `ess_warn`; the
    smallest where the change is predicted to be ten times the noise floor, but at least a
    thousandth of the largest.

    Args:
        dlogp: l'_i along v, [N].
        noise_floor: |Delta H| when nothing moves.
        ess_warn: threshold of ESS / N.
    """
    spread = float((dlogp - dlogp.mean()).abs().max())
    threshold = min(ess_warn, LARGEST_ESS_FRACTION)
    # At 1000 / spread one weight has e^1000 times the mean's: surely too far.
    low, high = 0.0, (1e3 / spread if spread else 1.0)
    # Halved until nothing is left of the interval.
    for _ in range(60):
        middle = (low + high) / 2
        trusted = predicted_ess_fraction(dlogp, middle) >= threshold
        low, high = (middle, high) if trusted else (low, middle)
    smallest = 10 * noise_floor / abs(slope) if slope else 0.0
    smallest = min(max(smallest, SMALLEST_SHARE * low), low / 10)
    ends = math.log(smallest), math.log(low)
    steps = torch.linspace(*ends, num_points, dtype=torch.float64)
    return [float(f"{eta:.6g}") for eta in steps.exp().tolist()]


def summarise(
    points: list[SweepPoint],
    noise_floor: float,
    influences: Mapping[float, Tensor],
    quantile: float,
) -> SweepSummary:
    """Exponent, range of agreement, reach and odd part of a sweep.

    Args:
        points: the steps, each with its verdict.
        noise_floor: |Delta H| when nothing moves.
        influences: of each group on delta_h_true, by eta, [n].
        quantile: of Student's t, by which an error becomes a 95 % interval.
    """
    forward = sorted((p for p in points if p.eta > 0), key=lambda p: p.eta)
    telling = [p for p in forward if abs(p.delta_h_true) > noise_floor]
    trusted = [p for p in telling if p.trusted]
    agreeing: list[float] = []
    for point in telling:
        own = point.se if point.se_jackknife is None else point.se_jackknife
        error = math.hypot(own, noise_floor)
        # Rounding adds to the noise of the responses.
        apart = abs(point.delta_h_true - point.delta_h1) > quantile * error
        if (apart and point.trusted) or (agreeing and not point.trusted):
            break
        if point.trusted:
            agreeing.append(point.eta)
    mirrored = {p.eta: p for p in points if p.eta < 0}
    odd = [
        {
            "eta": p.eta,
            "delta_h": (p.delta_h_true - mirrored[-p.eta].delta_h_true) / 2,
            "se": delta_method_error((influences[p.eta] - influences[-p.eta]) / 2),
        }
        for p in forward
        if -p.eta in mirrored and p.trusted and mirrored[-p.eta].trusted
    ]
    return SweepSummary(
        exponent=_weighted(trusted, lambda p: math.log(abs(p.delta_h_true))),
        exponent_se=_exponent_error(trusted, influences),
        agreement=[agreeing[0], agreeing[-1]] if agreeing else None,
        noise_floor=noise_floor,
        odd=odd or None,
        reach=[
            {"off_by": share} | _reach(forward, share, noise_floor, quantile)
            for share in OFF_BY
        ],
    )


def _reach(
    points: list[SweepPoint], share: float, noise_floor: float, quantile: float
) -> dict[str, Any]:
    """Up to which eta first order is off by less than a share of the truth.

    With r the share that is missed and w the half width of its 95 % interval, rounding
    included, eta is where |r| reaches the share, and the interval runs from where |r| + w
    does to where |r| - w does: the etas at which "off by this share" is not rejected.
    Between points |r| and w are interpolated linearly, as both are in leading order.

    Args:
        points: with positive eta, the smallest first.

    Returns:
        {eta, interval}, see `SweepSummary.reach`.
    """
    places: list[float] = []
    middles: list[float] = []
    widths: list[float] = []
    for point in points:
        if point.missed is None or point.missed_se is None:
            continue
        rounding = 2 * noise_floor / abs(point.delta_h_true)
        # Below, |r| is of rounding.
        if rounding > share / 2 and not places:
            continue
        if not point.trusted:
            break
        places.append(point.eta)
        middles.append(abs(point.missed))
        widths.append(math.hypot(quantile * point.missed_se, rounding))
    if not places:
        return {"eta": None, "interval": [None, None]}
    upper = [m + w for m, w in zip(middles, widths)]
    lower = [m - w for m, w in zip(middles, widths)]
    eta = _reaches(places, middles, share)
    low, high = _reaches(places, upper, share), _reaches(places, lower, share)
    # Beyond the largest and below the smallest step, these are the bounds that are known.
    if low is None and upper[0] < share:
        low = places[-1]
    if high is None and lower[0] >= share:
        high = places[0]
    return {"eta": eta, "interval": [low, high]}


def _reaches(places: list[float], values: list[float], level: float) -> float | None:
    """Where values at places, in between linear, first reach a level; None if outside."""
    for place in range(1, len(places)):
        before, after = values[place - 1], values[place]
        if before < level <= after:
            share = (level - before) / (after - before)
            return places[place - 1] + share * (places[place] - places[place - 1])
        if before >= level:
            return None
    return None


def _weights(points: list[SweepPoint]) -> list[float]:
    """Of the least-squares slope against log eta; they sum to 0."""
    places = [math.log(p.eta) for p in points]
    mean = math.fsum(places) / len(places)
    spread = math.fsum((x - mean) ** 2 for x in places)
    return [(x - mean) / spread for x in places]


def _weighted(
    points: list[SweepPoint], value: Callable[[SweepPoint], float]
) -> float | None:
    """Least-squares slope of a value against log eta."""
    if len(points) < 2:
        return None
    return math.fsum(w * value(p) for w, p in zip(_weights(points), points))


def _exponent_error(
    points: list[SweepPoint], influences: Mapping[float, Tensor]
) -> float | None:
    """d log |x| = dx / x: the influence of each group on the exponent is a sum."""
    if len(points) < 2:
        return None
    terms = [
        w / p.delta_h_true * influences[p.eta] for w, p in zip(_weights(points), points)
    ]
    return delta_method_error(torch.stack(terms).sum(0))
