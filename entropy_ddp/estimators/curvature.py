"""The second derivative of the importance-sampled entropy along the step, at eta = 0.

With w_i = exp(l_i(eta) - l_i(0)), A = sum w_i A_i(eta) and D = sum w_i D_i,

    A' = sum (l' A_i + A'_i)      A'' = sum [(l'' + l'^2) A_i + 2 l' A'_i + A''_i]
    D' = sum l' D_i               D'' = sum (l'' + l'^2) D_i
    H'' = A''/D - 2 A'D'/D^2 - A D''/D^2 + 2 A D'^2/D^3

which is computed in centred form, with Hbar = A/D and slope = (A' - Hbar D')/D,

    q_i = (l''_i + l'_i^2)(A_i - Hbar D_i) + 2 l'_i A'_i + A''_i
    H'' = [ sum q_i - 2 slope D' ] / D

exactly the second derivative of the `snis` value on this batch. For `sum`, D is the
constant 1. As an estimate of the policy's second derivative it has the 1/N bias of every
ratio (none for `sum`).

    delta_h2 = eta slope + eta^2 H'' / 2
    eta_star = |2 slope / H''|: there the quadratic term equals the linear one

Shape legend: N sequences, n groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_ddp.estimators.entropy import Ratio
from entropy_ddp.estimators.standard_errors import (
    count_groups,
    group_totals,
    jackknife_error,
)


@dataclass(frozen=True, kw_only=True)
class CurvatureEstimate:
    """H'' in nats per squared unit of learning rate.

    Attributes:
        value: the second derivative.
        se: leave-one-group-out jackknife standard error, conditional on v.
        without: the estimate without each group, [n].
    """

    value: float
    se: float
    without: Tensor

    @property
    def influence(self) -> Tensor:
        """Influence of each group on the value, from the estimates without it, [n].

        Scaled so that `delta_method_error` of it is the jackknife error.
        """
        share = (len(self.without) - 1) / len(self.without)
        return share * (self.without.mean() - self.without)

    def second_order(self, eta: float, slope: float) -> float:
        """delta_h2 = eta slope + eta^2 H'' / 2."""
        return eta * slope + eta**2 * self.value / 2

    def second_order_influence(self, eta: float, slope: Tensor) -> Tensor:
        """Influence of each group on delta_h2, from that on the slope, [n]."""
        return eta * slope + eta**2 / 2 * self.influence

    def eta_star(self, slope: float) -> float | None:
        """|2 slope / H''|; None where H'' is 0."""
        return abs(2 * slope / self.value) if self.value else None


def curvature(
    original: Ratio,
    groups: Tensor,
    *,
    dlogp: Tensor,
    d2logp: Tensor,
    dnumerator: Tensor,
    d2numerator: Tensor,
) -> CurvatureEstimate:
    """H'' and its error from per-sequence derivatives along v, float64, [N] each.

    Args:
        original: the entropy estimator at theta.
        groups: group of each sequence, [N].
        dlogp, d2logp: l'_i and l''_i.
        dnumerator, d2numerator: A'_i and A''_i of the estimator's numerator.

    Raises:
        InputError: there are fewer than two groups.
    """
    num_groups = count_groups(groups)
    size = original.size
    if size is None:
        size = torch.zeros_like(original.numerator)
    mean_entropy = original.value if original.size is not None else 0.0
    centred = original.numerator - mean_entropy * size
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
    # [6, n]
    totals = torch.stack([group_totals(x, groups, num_groups) for x in pieces])
    whole = totals.sum(1, keepdim=True)
    is_sum = original.size is None
    # All groups but one, for each of them, [n].
    without = _second_derivative(whole - totals, is_sum)
    if is_sum:
        # A plain sum over n - 1 groups is scaled to n.
        without = without * (num_groups / max(num_groups - 1, 1))
    value = float(_second_derivative(whole, is_sum))
    return CurvatureEstimate(value=value, se=jackknife_error(without), without=without)


def _second_derivative(totals: Tensor, is_sum: bool) -> Tensor:
    """H'' from the totals of q, b, r, D'', centred A and D, each [...].

    The totals are centred at the mean entropy of all groups. The mean of a subset
    differs from it by e, the subset's mean of the centred A, and the totals are moved
    there: q - e D'', b - e r.
    """
    q, b, r, d2, rest, size = totals
    if is_sum:
        return q
    shift = rest / size
    slope = (b - shift * r) / size
    return (q - shift * d2 - 2 * slope * r) / size
