"""The second derivative of the importance-sampled entropy along the step, at eta = 0.

By the slopes at theta and in the middle of the step (`midpoint`), one pass,

    H'' = [ slope(eta / 2) - slope(0) ] / (eta / 2)     so that
    delta_h2 = eta slope(0) + eta^2 H'' / 2 = eta slope(eta / 2),

the midpoint rule; or by second derivatives (`taylor`), two passes. With w_i = exp(l_i(eta) - l_i(0)), A = sum w_i A_i(eta) and D = sum w_i D_i,

    A' = sum (l' A_i + A'_i)      A'' = sum [(l'' + l'^2) A_i + 2 l' A'_i + A''_i]
    D' = sum l' D_i               D'' = sum (l'' + l'^2) D_i
    H'' = A''/D - 2 A'D'/D^2 - A D''/D^2 + 2 A D'^2/D^3

which is computed in centred form, with Hbar = A/D and slope = (A' - Hbar D')/D,

    q_i = (l''_i + l'_i^2)(A_i - Hbar D_i) + 2 l'_i A'_i + A''_i
    H'' = [ sum q_i - 2 slope D' ] / D

exactly the second derivative of the `snis` value on this batch. For `sum`, D is the
constant 1. Both are differences of slopes that are exact derivatives on this batch. As an estimate of the policy's second derivative it has the 1/N bias of every
ratio (none for `sum`).

    delta_h2 = eta slope + eta^2 H'' / 2
    eta_star = |2 slope / H''|: there the quadratic term equals the linear one

Shape legend: N sequences, n groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_ddp.config import CurvatureMethod
from entropy_ddp.estimators.entropy import Ratio
from entropy_ddp.estimators.linear import Slope
from entropy_ddp.estimators.quantiles import two_sided
from entropy_ddp.estimators.standard_errors import Draws, Estimate


@dataclass(frozen=True, kw_only=True)
class CurvatureEstimate:
    """H'' in nats per squared unit of learning rate.

    Attributes:
        method: how it was found.
        estimate: the second derivative with its errors, conditional on v.
    """

    method: CurvatureMethod
    estimate: Estimate

    @property
    def value(self) -> float:
        """H''."""
        return self.estimate.value

    def second_order(self, eta: float, slope: Estimate) -> Estimate:
        """delta_h2 = eta slope + eta^2 H'' / 2, with the error of both together."""
        return slope.scaled(eta).plus(self.estimate, eta**2 / 2)

    def eta_star(self, slope: Estimate) -> float | None:
        """|2 slope / H''|; None where H'' is 0."""
        return abs(2 * slope.value / self.value) if self.value else None

    def eta_star_error(self, slope: Estimate) -> float | None:
        """Standard error of eta_star to first order; None without one.

        psi(eta*) / eta* = psi(slope) / slope - psi(H'') / H''.
        """
        eta_star = self.eta_star(slope)
        if not slope.value or eta_star is None:
            return None
        relative = slope.scaled(1 / slope.value)
        return eta_star * relative.minus(self.estimate, 1 / self.value).se

    def eta_star_interval(self, slope: Estimate) -> tuple[float | None, float | None]:
        """95 % interval of |2 slope / H''| by Fieller; None for an end that is open.

        The x >= 0 for which 2 slope - x |H''| is not resolved, the sign of H'' being
        that of its estimate: between the roots of (2 s - x h)^2 = t^2 Var(2 s - x h),
        with the covariance of both. Where H'' itself is not resolved there is no largest
        such x; where the slope is not, the least is 0.
        """
        t = two_sided(slope.draws.num_units - 1)
        doubled = slope.scaled(2.0)
        second = self.estimate
        variances = [e.se_jackknife**2 for e in (doubled, second)]
        covariance = (
            doubled.plus(second).se_jackknife ** 2
            - doubled.minus(second).se_jackknife ** 2
        ) / 4
        # a x^2 - 2 b x + c <= 0, for the sign with which 2 s / h is positive.
        sign = 1.0 if doubled.value * second.value >= 0 else -1.0
        a = second.value**2 - t**2 * variances[1]
        b = sign * (doubled.value * second.value - t**2 * covariance)
        c = doubled.value**2 - t**2 * variances[0]
        discriminant = b**2 - a * c
        if a > 0:
            root = max(discriminant, 0.0) ** 0.5
            return max((b - root) / a, 0.0), max((b + root) / a, 0.0)
        if c <= 0 or discriminant < 0:
            return 0.0, None
        # With a < 0 the set lies outside the roots, one of which is negative.
        root = discriminant**0.5
        return (max(c / (b + root), 0.0) if b + root > 0 else 0.0), None


def midpoint_curvature(middle: Slope, start: Slope, eta: float) -> CurvatureEstimate:
    """H'' from the slopes at theta + eta v / 2 and at theta.

    Args:
        middle: at the middle of the step, of the same form as `start`.
        eta: learning rate of the step.
    """
    difference = middle.estimate.minus(start.estimate)
    return CurvatureEstimate(method="midpoint", estimate=difference.scaled(2 / eta))


def curvature(
    original: Ratio,
    draws: Draws,
    *,
    dlogp: Tensor,
    d2logp: Tensor,
    dnumerator: Tensor,
    d2numerator: Tensor,
) -> CurvatureEstimate:
    """H'' and its error from per-sequence derivatives along v, float64, [N] each.

    Args:
        original: the entropy estimator at theta.
        dlogp, d2logp: l'_i and l''_i.
        dnumerator, d2numerator: A'_i and A''_i of the estimator's numerator.

    Raises:
        InputError: there are fewer than two units.
    """
    is_sum = original.size is None
    size = torch.zeros_like(original.numerator)
    if original.size is not None:
        size = original.size
    centred = original.numerator - (0.0 if is_sum else original.value) * size
    # l'' + l'^2: the second derivative of w_i over w_i, which is 1 at eta = 0.
    twice = d2logp + dlogp.square()
    pieces = (
        twice * centred + 2 * dlogp * dnumerator + d2numerator,
        dlogp * centred + dnumerator,
        dlogp * size,
        twice * size,
        centred,
        size,
    )
    estimate = Estimate.of(
        lambda totals: _second_derivative(totals, is_sum),
        torch.stack(pieces, dim=1),
        draws,
    )
    return CurvatureEstimate(method="taylor", estimate=estimate)


def _second_derivative(totals: Tensor, is_sum: bool) -> Tensor:
    """H'' [...] from the totals of q, b, r, D'', centred A and D, [..., 6].

    The totals are centred at the mean entropy of all groups. The mean of a subset
    differs from it by e, the subset's mean of the centred A, and the totals are moved
    there: q - e D'', b - e r.
    """
    q, b, r, d2, rest, size = totals.unbind(-1)
    if is_sum:
        return q
    shift = rest / size
    slope = (b - shift * r) / size
    return (q - shift * d2 - 2 * slope * r) / size
