"""The entropy change as an inner product of two mean gradients, and its variance.

Units are groups u of G_u responses, B_E of them in E and B_U in U. With S_{u,g} the
log-probability of a response, T_{u,g} its length and L_u the longest of its group,

    X_u = -(1/G) sum_g (S^w_{u,g} - loo_{u,g}) grad S_{u,g}      ascends entropy
          S^w = S / L_u (`dr_grpo`) or S / T (`per_token_avg`), 0 for an empty response
          loo_{u,g} = mean of S^w over the other responses; both held fixed
    Y_u = a diagonal matrix times the gradient of unit u's share of the objective on U

    bars_dot = <Xbar, Ybar>,        deltaH1 = lr bars_dot
    V_X = sum_u <X_u - Xbar, Ybar>^2 / (B_E (B_E - 1)), V_Y likewise with X and Y swapped
    se  = lr sqrt(V_X + V_Y)

Which functional X is the gradient of (expectations over i.i.d. responses of one prompt):

`per_token_avg`  E[X_u] = -grad E[S/T] + grad E[1/T], exactly: the gradient of the mean
    per-token surprisal of a response, plus that of its mean inverse length: what
    grad E[S/T] has beside E[(S/T) grad S]. The second term is 0 when all responses to
    a prompt are equally long.
`dr_grpo`  E[X_u] = -grad E[S_1/L] + G E[(S_2/L) grad S_1] + (1/G) grad E[1/L]. Equally
    long responses leave (1/L) grad H alone, H the entropy of the response. Otherwise
    L_u depends on the very response that is weighted: the baseline is not free of it,
    and E[X_u] is not the gradient of any functional of the policy in general.

Neither is the slope of the entropy per token in `linear`, a ratio of means over E with
the Rao-Blackwell entropy of each step: the two differ in expectation, not in noise only.

bars_dot is unbiased for <E[X], E[Y]> when E and U are independent and the matrix is
fixed. V_X and V_Y are the delta method's, for independent E and U; together they exceed
the variance by tr(Cov X Cov Y) / (B_E B_U), of second order. The matrix of a `step`, the
gain, is held fixed in V_Y, though another U has another gain: early in training that
overstates the spread over batches U (the square root of V_Y by a factor of about 3 at
Adam's second step, 1.4 at the fifth, 1.1 at the twentieth).

When E and U are the same rollouts, the terms u = u' bias the product by about
E<X_u, Y_u>/B and are removed (`without_diagonal`). V_X + V_Y then leaves out twice the
covariance of <X_u, Ybar> and <Y_u, Xbar>, which is of the same order: on the toy policy
of the tests its root is 0.83 of the standard deviation at B = 1,000 (and 1.34 at B = 20,
where the diagonal is in both projections). `paired_variance` has neither defect.

Shape legend: n sequences of whole groups, B units. Arguments of one number for each
sequence, [n]: logp S in nats, lengths T, advantages A, number of its group. For each unit:
x_projections <X_u, Ybar> [B_E], y_projections <Y_u, Xbar> [B_U], diagonal <X_u, Y_u> [B].
Everything is float64.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entropy_ddp.errors import InputError
from entropy_ddp.estimators.standard_errors import count_groups, group_totals

Weighting = Literal["dr_grpo", "per_token_avg"]


def longest_in_group(lengths: Tensor, groups: Tensor) -> Tensor:
    """L_u of each sequence's group, at least 1, float64, [n]."""
    longest = torch.ones(count_groups(groups), dtype=torch.float64)
    longest.scatter_reduce_(0, groups, lengths.double(), "amax")
    return longest[groups]


def entropy_coefficients(
    logp: Tensor, lengths: Tensor, groups: Tensor, weighting: Weighting
) -> Tensor:
    """-(S^w - loo) / G of each response: X_u = sum over its group times grad S; [n].

    Groups have at least 2 responses.

    Args:
        weighting: what S is divided by.
    """
    if weighting == "dr_grpo":
        divisor = longest_in_group(lengths, groups)
    else:
        divisor = lengths.clamp(min=1).double()
    weighted = logp / divisor
    sizes = group_sizes(groups)
    # The sum over the other G - 1 responses of the group.
    others = group_totals(weighted, groups, count_groups(groups))[groups] - weighted
    # Minus: more of what was less probable than the others raises the entropy.
    return -(weighted - others / (sizes - 1)) / sizes


def reward_coefficients(advantages: Tensor, lengths: Tensor, groups: Tensor) -> Tensor:
    """A / (G L_u) of each response: grad J_u = sum over its group times grad S; [n]."""
    return advantages / (group_sizes(groups) * longest_in_group(lengths, groups))


def group_sizes(groups: Tensor) -> Tensor:
    """Number of responses G of each sequence's group, [n]."""
    return torch.bincount(groups)[groups]


def variance_of_mean(projections: Tensor) -> float:
    """sum_u (p_u - mean p)^2 / (B (B - 1)) of one number for each unit, [B].

    Unbiased for the variance of mean p when units are independent.

    Raises:
        InputError: there are fewer than two units.
    """
    count = len(projections)
    if count < 2:
        raise InputError(
            f"the variance of the gradient dot needs at least 2 groups, found {count}"
        )
    centred = projections - projections.mean()
    return float(centred.square().sum()) / (count * (count - 1))


def without_diagonal(dot: float, y_projections: Tensor, diagonal: Tensor) -> float:
    """bars_dot over pairs u != u' only, when E and U are the same B units.

    With Ybar = C + (1/B) sum_u Y_u, C what does not depend on the units (momentum and
    weight decay of a step; 0 for a preconditioned gradient), and m = mean_u <Y_u, Xbar>,

        <Xbar, C> + [B^2 m - sum_u <X_u, Y_u>] / (B (B - 1))
            = <Xbar, Ybar> + [B m - sum_u <X_u, Y_u>] / (B (B - 1)),

    which for C = 0 is the U-statistic (B^2 <Xbar, Ybar> - sum_u <X_u, Y_u>)/(B(B - 1)).
    Unbiased where the plain product is off by (E<X_u, Y_u> - <E X, E Y>) / B.

    Raises:
        InputError: there are fewer than two units.
    """
    count = len(diagonal)
    if count < 2:
        raise InputError(f"a U-statistic needs at least 2 groups, found {count}")
    # B m less the terms u = u'.
    excess = float(y_projections.sum() - diagonal.sum())
    return dot + excess / (count * (count - 1))


# With two units the U-statistic without one of them is a sum over no pair.
FEWEST_PAIRED_UNITS = 3


def paired_variance(
    x_projections: Tensor,
    y_projections: Tensor,
    diagonal: Tensor,
    constant: Tensor,
) -> float:
    """Jackknife variance of `without_diagonal`, when E and U are the same B units.

    With C as there, r_u = sum_{v != u} <X_u, Y_v> + <X_v, Y_u> and M = sum_u r_u / 2 the
    sum over all pairs, the value is <Xbar, C> + M / (B (B - 1)). Without unit u it is

        f_(u) = sum_{v != u} <X_v, C> / (B - 1) + (M - r_u) / ((B - 1) (B - 2))

    and the estimate (B - 1)/B sum_u (f_(u) - mean f)^2. For C = 0, with a_u the mean of
    k_uv = <X_u, Y_v> + <X_v, Y_u> given unit u and delta the variance of what k_uv has
    beyond a_u + a_v,

        its expectation   Var a / B + delta / (B (B - 2))
        the variance      Var a / B + delta / (2 B (B - 1))

    It is unbiased where single units make the spread, and 2 (B - 1) / (B - 2) times too
    large in the part that only pairs make; never too small (Efron and Stein 1981).

    Args:
        constant: <X_u, C>, [B].

    Raises:
        InputError: there are fewer than three units.
    """
    count = len(diagonal)
    if count < FEWEST_PAIRED_UNITS:
        raise InputError(
            "the variance of a U-statistic needs at least "
            f"{FEWEST_PAIRED_UNITS} groups, found {count}"
        )
    pairs = count * (x_projections - constant + y_projections) - 2 * diagonal
    # What differs among the f_(u).
    without = constant / (count - 1) + pairs / ((count - 1) * (count - 2))
    centred = without - without.mean()
    return (count - 1) / count * float(centred.square().sum())


@dataclass(frozen=True, kw_only=True)
class DotEstimate:
    """<Xbar, Ybar> with the variances of its two factors.

    Attributes:
        bars_dot: the product; the U-statistic if a diagonal was removed.
        V_X, V_Y: variance of it due to the units of E and of U.
        frac_var: (V_X + V_Y) / bars_dot^2; None when bars_dot is 0.
        u_statistic: whether the diagonal was removed.
        paired_variance: variance of the U-statistic, covariance included; None if no
            diagonal was removed, or from fewer than three units.
    """

    bars_dot: float
    V_X: float
    V_Y: float
    frac_var: float | None
    u_statistic: bool
    paired_variance: float | None = None


def estimate_dot(
    dot: float,
    x_projections: Tensor,
    y_projections: Tensor,
    diagonal: Tensor | None = None,
    constant: Tensor | None = None,
) -> DotEstimate:
    """bars_dot, V_X and V_Y from one number for each unit.

    Args:
        diagonal: <X_u, Y_u> when E and U are the same units, [B]; None otherwise.
        constant: <X_u, C> of the same units, C what of Ybar does not depend on them,
            [B]; None where C = 0.

    Raises:
        InputError: there are fewer than two units in either batch.
    """
    V_X, V_Y = variance_of_mean(x_projections), variance_of_mean(y_projections)
    paired = None
    if diagonal is not None:
        dot = without_diagonal(dot, y_projections, diagonal)
        if len(diagonal) >= FEWEST_PAIRED_UNITS:
            fixed = torch.zeros_like(diagonal) if constant is None else constant
            paired = paired_variance(x_projections, y_projections, diagonal, fixed)
    return DotEstimate(
        bars_dot=dot,
        V_X=V_X,
        V_Y=V_Y,
        frac_var=(V_X + V_Y) / dot**2 if dot else None,
        u_statistic=diagonal is not None,
        paired_variance=paired,
    )
