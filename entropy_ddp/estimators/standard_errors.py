"""Standard errors of functions of group totals.

Groups (prompt draws) are the independent units; sequences of one group are not. Every
estimator here is a smooth function f(S) of totals S = sum_g s_g over n groups. Its error
is estimated in two ways:

delta method (infinitesimal jackknife): with the influence psi_g = <df/dS, s_g>,
    SE^2 = n/(n-1) sum_g (psi_g - mean psi)^2.
    For a ratio of totals sum_g psi_g = 0 and the mean drops out.

jackknife: with f_(g) the estimate without group g,
    SE^2 = (n-1)/n sum_g (f_(g) - mean f_(.))^2.

Both are biased of order 1/n: the delta method tends to be slightly too small, the
jackknife slightly too large (Efron and Stein 1981). With fewer than two groups there is
no estimate, and asking for one is an error.
"""

import math

import torch
from torch import Tensor

from entropy_ddp.errors import InputError


def count_groups(groups: Tensor) -> int:
    """Number of groups, from the group of each sequence [N]; 0 of an empty batch."""
    return int(groups.max()) + 1 if len(groups) else 0


def group_totals(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Sum of per-sequence values [N] within each group, [n]."""
    return values.new_zeros(num_groups).index_add_(0, groups, values)


def delta_method_error(influence: Tensor) -> float:
    """Standard error from the influence psi_g of each group, [n].

    Raises:
        InputError: there are fewer than two groups.
    """
    num_groups = _at_least_two(influence)
    centred = influence - influence.mean()
    return math.sqrt(num_groups / (num_groups - 1) * float(centred.square().sum()))


def jackknife_error(leave_one_out: Tensor) -> float:
    """Standard error from the estimates without each group, [n].

    Raises:
        InputError: there are fewer than two groups.
    """
    num_groups = _at_least_two(leave_one_out)
    centred = leave_one_out - leave_one_out.mean()
    return math.sqrt((num_groups - 1) / num_groups * float(centred.square().sum()))


def _at_least_two(values: Tensor) -> int:
    if len(values) < 2:
        raise InputError(
            f"a standard error needs at least 2 groups in E, found {len(values)}"
        )
    return len(values)


def relative_difference(value: float, reference: float, scale: float) -> float:
    """|value - reference| / scale; without a scale, the difference itself."""
    difference = abs(value - reference)
    return difference / scale if scale else difference


def effective_sample_size(log_weights: Tensor) -> float:
    """(sum w)^2 / sum w^2 of weights given by their logarithms, [n].

    Between 1 and n; n when all weights are equal.
    """
    twice = torch.logsumexp(2 * log_weights, 0)
    size = float((2 * torch.logsumexp(log_weights, 0) - twice).exp())
    return min(size, float(len(log_weights)))
