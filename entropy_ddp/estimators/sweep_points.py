"""What a sweep finds, point by point and as a whole: its part of results.json."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One step size: keys of a row of `sweep` in results.json.

    Attributes:
        eta: learning rate; negative on the mirrored side of a symmetric sweep.
        delta_h_true: measured change.
        se: its standard error.
        ess_fraction: effective sample size over N.
        delta_h1: first-order prediction.
        delta_h1_se: its standard error.
        delta_h2: second-order prediction; None without curvature.
        delta_h2_se: its standard error; None without curvature.
        trusted: whether the effective sample size is at least both thresholds of the
            run; what is not is outside every statement about the sweep. None in the
            results of versions that did not write it.
        difference_se: paired standard error of delta_h_true - delta_h1.
        interval: 95 % interval of delta_h_true, [low, high]; absent, as the jackknife
            errors of all of these, in the results of earlier versions.
        missed: share of delta_h_true that first order misses, 1 - delta_h1 /
            delta_h_true; None where nothing changes. It and its error are absent in the
            results of versions that did not write them.
        missed_se: its jackknife standard error: truth and first order share most of
            theirs.
    """

    eta: float
    delta_h_true: float
    se: float
    ess_fraction: float
    delta_h1: float
    delta_h1_se: float
    delta_h2: float | None
    difference_se: float
    delta_h2_se: float | None = None
    trusted: bool | None = None
    se_jackknife: float | None = None
    interval: list[float] | None = None
    delta_h1_se_jackknife: float | None = None
    delta_h2_se_jackknife: float | None = None
    difference_se_jackknife: float | None = None
    missed: float | None = None
    missed_se: float | None = None


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """What a sweep says as a whole.

    Attributes:
        exponent: d log |delta_h_true| / d log eta by least squares over trusted points
            above the noise; 1 in the linear regime. None with fewer than two points.
        exponent_se: its standard error, from the influences of each group on all
            points together: they share most of their noise, which drops out.
        agreement: smallest and largest eta of the run of trusted points, from the
            smallest up, at which first order is within the 95 % interval of the truth,
            whose own error that is. None if there is none.
        reach: for each of some shares, {off_by, eta, interval}: up to which eta first
            order is off by less than `off_by` of the truth, with its 95 % interval [low,
            high]. eta is null where it is not between two points of the grid; low is
            null where first order may be off by as much at the smallest, high where it
            may be off by less at the largest; both where it is not resolved.
        noise_floor: |Delta H| when nothing moves.
        odd: for a symmetric sweep, {eta, delta_h, se} with delta_h half the difference
            of both sides: the even orders, curvature first, drop out. Of steps that are
            trusted on both sides; None if there is none.
    """

    exponent: float | None
    agreement: list[float] | None
    noise_floor: float
    odd: list[dict[str, float]] | None
    exponent_se: float | None = None
    reach: list[dict[str, Any]] | None = None
