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

from entropy_ddp.config import Normalize
from entropy_ddp.data.batch import Ragged
from entropy_ddp.estimators.entropy import Ratio, reweighted
from entropy_ddp.estimators.linear import Slope, slope_from_terms
from entropy_ddp.estimators.standard_errors import Draws
from entropy_ddp.model.response_tokens import DirectionalScores


def midpoint_columns(
    tokens: DirectionalScores, log_ratio: Tensor, ragged: Ragged, mean_entropy: float
) -> Tensor:
    """Sums of one rank's sequences for `midpoint_slope`, [n, 6].

    Args:
        tokens: values and derivatives along v at theta', [t].
        log_ratio: log p at theta' less log p at theta, or under the policy that E was
            sampled by, [t].
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


def midpoint_slope(
    columns: Tensor, mean_entropy: float, normalize: Normalize, draws: Draws
) -> Slope:
    """The slope at theta' with its errors, from the sums of all sequences.

    Consistent, with the bias of order 1/N of every ratio; its error is conditional on v.

    Args:
        columns: of `midpoint_columns`, [N, 6].
        mean_entropy: what it was given.
        normalize: `per_token`, `per_sequence` or `sum`.

    Raises:
        InputError: there are fewer than two units.
    """
    # Counts are sums of w times the score before: what the mean entropy multiplies.
    centred, score, pathwise, counts, numerator, size = columns.unbind(1)
    if normalize != "per_token":
        # The number of sequences depends on no policy.
        centred = centred + mean_entropy * counts
        counts = torch.zeros_like(counts)
        ones = torch.ones_like(size)
        value = Ratio(
            numerator=numerator, size=ones if normalize == "per_sequence" else None
        )
    else:
        value = Ratio(numerator=numerator, size=size)
        # From the entropy at theta to the one at theta', which is known only now.
        centred = centred - (value.value - mean_entropy) * counts
    terms = torch.stack([centred, score, pathwise, counts], dim=1)
    return slope_from_terms(terms, value, draws, ("to_go", "hk"))


def snis_slope(
    log_weights: Tensor, dlogp: Tensor, after: Ratio, dnumerator: Tensor, draws: Draws
) -> Slope:
    """The slope of the `snis` value at theta' = theta + eta v, from sequence sums.

        [ sum w_i (l'_i A_i + A'_i) - H(theta') sum w_i l'_i D_i ] / sum w_i D_i

    At eta = 0 it is the slope `full`.

    Args:
        log_weights: log w_i, [N].
        dlogp: l'_i at theta', [N].
        after: the estimator at theta', unweighted.
        dnumerator: A'_i at theta', [N].

    Raises:
        InputError: there are fewer than two units.
    """
    weighted = reweighted(after, log_weights)
    # The same scale as the ratio's, which drops out of it; none of a plain sum.
    shift = 0.0 if after.size is None else log_weights.max()
    weights = (log_weights - shift).exp()
    size = torch.zeros_like(dlogp) if weighted.size is None else weighted.size
    mean = 0.0 if weighted.size is None else weighted.value
    pathwise = weights * dnumerator
    columns = (
        dlogp * (weighted.numerator - mean * size) + pathwise,
        dlogp * weighted.numerator,
        pathwise,
        dlogp * size,
    )
    terms = torch.stack(columns, dim=1)
    return slope_from_terms(terms, weighted, draws, ("full", "none"))
