"""Baselines: what to subtract from the entropy to go, known before the token is drawn.

Any function of (x, y_{<k}) times log p'_ik has mean zero, so subtracting it from the
weight of log p'_ik changes no expectation. Starting from `hk`, two predictions of

    Y_ik = ( sum_{j>k} H_ij,  T_i - k )        (used as Y_1 - Hbar Y_2)

are made here:

    loo     the mean of Y at the same position k over the other groups that reach it;
            0 where none does
    ridge   x_ik . beta, x what is known before y_k (`predictors`, and random
            projections of the hidden state that predicts it: the model's own summary of
            what is to come), beta from a ridge regression over the other folds of
            groups, rows weighted by (log p'_ik)^2

The weighting is the one under which the residual, times log p', is smallest: with the
tokens' terms uncorrelated, the variance of the slope is sum E[(log p')^2 (Y - x beta)^2].
Neither is ever fitted on the group it is used on, and neither uses T_i, so that with
`sum` and `per_sequence` the slope stays exactly unbiased; with `per_token`, up to the
1/N of every ratio. The predictions are linear in Y: the same for any Hbar.

Shape legend: t tokens of one rank, F predictors, K longest response, f folds.
"""

import torch
from torch import Tensor

from entropy_ddp.data.batch import Ragged

# Columns of `predictors`.
NUM_PREDICTORS = 7
NUM_FOLDS = 10
RIDGE_PENALTY = 1e-3


def future_targets(values: Tensor, ragged: Ragged) -> Tensor:
    """Y: integrand and number of steps after each token, [t, 2]."""
    # T_i - k with positions from 0: the last token has no step after it.
    remaining = ragged.spread(ragged.lengths) - ragged.position - 1
    return torch.stack([ragged.sum_after(values), remaining.double()], dim=1)


def predictors(entropy: Tensor, features: dict[str, Tensor], ragged: Ragged) -> Tensor:
    """What is known before each token is drawn: a few numbers of its distribution, [t, 7].

    1, H_ik, largest probability, its distance to the second, variance of log p, position
    k, entropy so far.

    Args:
        entropy: H_ik, [t].
        features: `top_probability`, `margin` and `log_variance`, [t] each.
    """
    columns = (
        torch.ones_like(entropy),
        entropy,
        features["top_probability"],
        features["margin"],
        features["log_variance"],
        ragged.position.double(),
        ragged.sum_before(entropy),
    )
    return torch.stack(columns, dim=1)


def folds_of(groups: Tensor) -> Tensor:
    """Fold of each group, from a number that does not depend on data or ranks."""
    return groups % NUM_FOLDS


def fold_moments(
    predictor: Tensor, target: Tensor, weight: Tensor, fold: Tensor
) -> Tensor:
    """X'WX and X'WY of one rank's tokens in each fold; to be summed over ranks.

    Args:
        predictor: X, [t, F].
        target: Y, [t, 2].
        weight: W, [t].
        fold: fold of each token, [t].

    Returns:
        Moments, [f, F, F + 2].
    """
    # [t, F + 2]: one product gives both moments of a fold.
    right = torch.cat([predictor, target], dim=1)
    weighted = predictor * weight[:, None]
    return torch.stack(
        [weighted[fold == f].T @ right[fold == f] for f in range(NUM_FOLDS)]
    )


def cross_fitted_coefficients(moments: Tensor) -> Tensor:
    """For each fold, beta of a ridge regression on all other folds, [f, F, 2].

    The penalty is relative to the diagonal of X'WX and leaves the constant free:
    beta does not depend on the units of the predictors.
    """
    # Of all folds but the own one, [f, F, F + 2].
    others = moments.sum(0) - moments
    num_predictors = moments.shape[1]
    gram, right = others[..., :num_predictors], others[..., num_predictors:]
    # [f, F], a view.
    diagonal = gram.diagonal(dim1=1, dim2=2)
    penalty = RIDGE_PENALTY * diagonal
    # The first predictor is the constant 1.
    penalty[:, 0] = 0
    # An empty fit (all moments zero) predicts nothing.
    floor = torch.where(diagonal > 0, 0.0, 1.0)
    # (X'WX + penalty) beta = X'WY, for each fold and both targets.
    return torch.linalg.solve(gram + torch.diag_embed(penalty + floor), right)


def ridge_prediction(predictor: Tensor, coefficients: Tensor, fold: Tensor) -> Tensor:
    """x . beta of the fold's own coefficients, [t, 2].

    Linear in x: of g_i = sum_k log p'_ik x_ik it makes the sum over a sequence of
    log p' times its tokens' predictions.

    Args:
        predictor: x of each token, or g of each sequence, [t, F].
        coefficients: beta of each fold, [f, F, 2].
        fold: fold of each row, [t].
    """
    predicted = predictor.new_empty(len(predictor), 2)
    for number, beta in enumerate(coefficients):
        here = fold == number
        predicted[here] = predictor[here] @ beta
    return predicted


def position_totals(target: Tensor, position: Tensor, longest: int) -> Tensor:
    """Sums of Y and number of tokens at each position; to be summed over ranks, [K, 3].

    Args:
        target: Y, [t, 2].
        position: position of each token, [t].
        longest: K, the same on every rank.
    """
    counted = torch.cat([target, torch.ones_like(target[:, :1])], dim=1)
    return target.new_zeros(longest, 3).index_add_(0, position, counted)


def leave_one_group_out_prediction(
    target: Tensor, position: Tensor, group: Tensor, totals: Tensor
) -> Tensor:
    """Mean of Y at the same position over the other groups, [t, 2].

    Args:
        target: Y, [t, 2].
        position: position of each token, [t].
        group: group of each token, [t]; whole groups lie on one rank.
        totals: `position_totals` over all ranks, [K, 3].
    """
    # One number for each pair of group and position.
    key = group * len(totals) + position
    _, place = key.unique(return_inverse=True)
    count = int(place.max()) + 1 if len(place) else 0
    # What the own group has at the same position, itself included, [t, 3].
    own = position_totals(target, place, count)[place]
    others = totals[position] - own
    # No other group is that long: 0 / 1.
    return others[:, :2] / others[:, 2:].clamp(min=1)
