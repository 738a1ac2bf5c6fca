"""The slope of the per-decision entropy at other parameters than E was sampled at.

At theta' = theta + eta v, with w_k = exp sum_{j<k} (log p'_j - log p_j) the weight of the
prefix of step k and everything else at theta', the per-decision value and its derivative
along v are

    H     = sum w_k H_k / sum w_k
    slope = sum w_k [ (H_k - H) sum_{j<k} (log p_j)' + H'_k ] / sum w_k

At eta = 0 that is the slope `to_go` with baseline `hk`. At the middle of a step it is the
midpoint rule,

    Delta H = eta slope(eta / 2) + O(eta^3)

one pass with first derivatives, and an error a quarter of the second-order Taylor
polynomial's, for which two such passes are needed.

Shape legend: n sequences and t tokens of one rank, N sequences of the batch.
"""

import torch
from torch import Tensor

from entropy_ddp.data.batch import Ragged
from entropy_ddp.estimators.entropy import Ratio
from entropy_ddp.estimators.linear import Slope, slope_from_terms
from entropy_ddp.model.response_tokens import DirectionalScores


def midpoint_columns(
    tokens: DirectionalScores, log_ratio: Tensor, ragged: Ragged, mean_entropy: float
) -> Tensor:
    """Sums of one rank's sequences for `midpoint_slope`, [n, 6].

    Args:
        tokens: values and derivatives along v at theta', [t].
        log_ratio: log p at theta' less log p at theta, [t].
        mean_entropy: the entropy at theta, from which entropies are counted: sums of
            differences lose no digits.
    """
    weight = ragged.sum_before(log_ratio).exp()
    before = ragged.sum_before(tokens.dlogp)
    excess = tokens.entropy - mean_entropy
    columns = (
        weight * (excess * before + tokens.dentropy),
        weight * tokens.entropy * before,
        weight * tokens.dentropy,
        weight * before,
        weight * tokens.entropy,
        weight,
    )
    return torch.stack([ragged.sum(column) for column in columns], dim=1)


def midpoint_slope(columns: Tensor, mean_entropy: float, groups: Tensor) -> Slope:
    """The slope at theta' with its errors, from the sums of all sequences.

    Consistent, with the bias of order 1/N of every ratio; its error is conditional on v.

    Args:
        columns: of `midpoint_columns`, [N, 6].
        mean_entropy: what it was given.
        groups: group of each sequence, [N].

    Raises:
        InputError: there are fewer than two groups.
    """
    # Counts are sums of w times the score before: what the mean entropy multiplies.
    centred, score, pathwise, counts, numerator, size = columns.unbind(1)
    value = Ratio(numerator=numerator, size=size)
    terms = (
        # From the entropy at theta to the one at theta', which is known only now.
        centred - (value.value - mean_entropy) * counts,
        score,
        pathwise,
        counts,
    )
    return slope_from_terms(torch.stack(terms, dim=1), value, groups, ("to_go", "hk"))
