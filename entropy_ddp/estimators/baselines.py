"""Baselines: what to subtract from the entropy to go, known before the token is drawn.

Any function of (x, y_{<k}) times log p'_ik has mean zero, so subtracting it from the
weight of log p'_ik changes no expectation. Starting from `hk`, three predictions of

    Y_ik = ( sum_{j>k} H_ij,  T_i - k )        (used as Y_1 - Hbar Y_2)

are made here:

    loo             the mean of Y at the same position k over the other groups that
                    reach it; 0 where none does
    ridge           x_ik . beta, x what is known before y_k (`predictors`, and random
                    projections of the hidden state that predicts it: the model's own
                    summary of what is to come)
    action_value    a prediction q(x_ik, y_k) that knows the token as well, linear in
                    e(y_k), random projections of the output embedding. It is not known
                    before y_k, and times log p' it has a mean; less that mean,

                        F_ik = [ x_ik log p'_ik,  x_ik (x) (e(y_k) log p'_ik - e'_ik) ],
                        e'_ik = sum_v pi'_v e(v),     E[F_ik | y_{<k}] = 0,

                    and F_ik . beta is subtracted from log p'_ik Y_ik.

beta is the ridge regression of log p'_ik Y_ik on F_ik over the other folds of groups; for
`ridge`, of whose F the second half is left out, that is the regression of Y on x with
rows weighted by (log p')^2. It is the fit under which the variance of the slope is
smallest, sum E[(log p' Y - F beta)^2] with the tokens' terms uncorrelated. The penalty is
a share of the diagonal of sum F F', a constant over N: what a fit on few sequences would
take for signal. Coefficients are never fitted on the group they are used on, and none
uses T_i, so that with `sum` and `per_sequence` the slope stays exactly unbiased; with
`per_token`, up to the 1/N of every ratio. The predictions are linear in Y: the same for
any Hbar.

Where E was sampled by another policy p_s (`Reweighting`), F carries the weight of the
prefix and Y the weights of what follows.

Shape legend: t tokens of one rank, F predictors, M columns of F_ik, K longest response,
f folds.
"""

import torch
from torch import Tensor

from entropy_ddp.config import SlopeBaseline
from entropy_ddp.data.batch import Ragged
from entropy_ddp.estimators.entropy import Reweighting
from entropy_ddp.model.response_tokens import NUM_EMBEDDINGS

# Columns of `predictors`.
NUM_PREDICTORS = 7
NUM_FOLDS = 10
# Times 1/N of the diagonal, for N sequences.
RIDGE_PENALTY = 32.0
ACTION_VALUE_PENALTY = 320.0


def future_targets(
    values: Tensor, ragged: Ragged, reweighting: Reweighting | None = None
) -> Tensor:
    """Y: integrand and number of steps after each token, [t, 2].

    Args:
        values: integrand of each token, [t].
        reweighting: of E sampled by another policy; every step counts its weight.
    """
    if reweighting is not None:
        steps = reweighting.before
        columns = (ragged.sum_after(values * steps), ragged.sum_after(steps))
        return torch.stack(columns, dim=1)
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


def action_columns(
    predictor: Tensor,
    dlogp: Tensor,
    features: dict[str, Tensor],
    reweighting: Reweighting | None = None,
) -> Tensor:
    """F_ik: predictors times log p', and times e(y) log p' - e'; [t, 9 F].

    Args:
        predictor: x, [t, F].
        dlogp: log p', [t].
        features: `embedding` e(y) and `dembedding` e', [t, 8] each.
        reweighting: of E sampled by another policy: what depends on y_k has the weight
            through it, its mean that of the prefix.
    """
    mean = features["dembedding"]
    if reweighting is not None:
        dlogp = reweighting.through * dlogp
        mean = reweighting.before[:, None] * mean
    actions = features["embedding"] * dlogp[:, None] - mean
    factors = torch.cat([dlogp[:, None], actions], dim=1).to(predictor)
    # [t, 9, 1] times [t, 1, F]: the plain predictors come first.
    return (factors[:, :, None] * predictor[:, None, :]).flatten(1)


def fold_moments(columns: Tensor, target: Tensor, fold: Tensor) -> Tensor:
    """sum F F' and sum F (log p' Y) of one rank's tokens in each fold.

    To be summed over ranks.

    Args:
        columns: F_ik, [t, M].
        target: log p' times Y, [t, 2].
        fold: fold of each token, [t].

    Returns:
        Moments, [f, M, M + 2].
    """
    moments = columns.new_zeros(NUM_FOLDS, columns.shape[1], columns.shape[1] + 2)
    for number in range(NUM_FOLDS):
        rows = columns[fold == number]
        moments[number, :, :-2] = rows.T @ rows
        moments[number, :, -2:] = rows.T @ target[fold == number]
    return moments


def cross_fitted_coefficients(moments: Tensor, penalty: float) -> Tensor:
    """For each fold, beta of a ridge regression on all other folds, [f, M, 2].

    The penalty leaves the constant, the first predictor, free: beta does not depend on
    the units of the predictors.

    Args:
        moments: of all ranks, [f, M, M + 2].
        penalty: relative to the diagonal of sum F F'.
    """
    # Of all folds but the own one, [f, M, M + 2].
    others = moments.sum(0) - moments
    gram, right = others[..., :-2], others[..., -2:]
    # [f, M], a view.
    diagonal = gram.diagonal(dim1=1, dim2=2)
    added = penalty * diagonal
    added[:, 0] = 0
    # An empty fit (all moments zero) predicts nothing.
    floor = torch.where(diagonal > 0, 0.0, 1.0)
    # (sum F F' + penalty) beta = sum F log p' Y, for each fold and both targets.
    return torch.linalg.solve(gram + torch.diag_embed(added + floor), right)


def coefficients_of(moments: Tensor, num_sequences: int) -> dict[SlopeBaseline, Tensor]:
    """Coefficients of the fitted baselines, [f, M, 2] each; those of x alone are 0.

    Args:
        moments: of `fold_moments` for `action_columns`, all ranks', [f, 9 F, 9 F + 2].
        num_sequences: N: responses of one prompt are as many draws of its tokens.
    """
    total = moments.shape[1]
    width = total // (1 + NUM_EMBEDDINGS)
    plain = torch.cat([moments[:, :width, :width], moments[:, :width, -2:]], dim=2)
    ridge = moments.new_zeros(len(moments), total, 2)
    ridge[:, :width] = cross_fitted_coefficients(plain, RIDGE_PENALTY / num_sequences)
    penalty = ACTION_VALUE_PENALTY / num_sequences
    return {
        "ridge": ridge,
        "action_value": cross_fitted_coefficients(moments, penalty),
    }


def fitted_part(columns: Tensor, coefficients: Tensor, fold: Tensor) -> Tensor:
    """F . beta with the fold's own coefficients, [.., 2].

    Args:
        columns: F_ik of each token, or their sums over sequences, [.., M].
        coefficients: beta of each fold, [f, M, 2].
        fold: fold of each row, [..].
    """
    fitted = columns.new_empty(len(columns), 2)
    for number, beta in enumerate(coefficients):
        here = fold == number
        fitted[here] = columns[here] @ beta
    return fitted


def token_predictions(
    predictor: Tensor, embedding: Tensor, coefficients: Tensor, fold: Tensor
) -> tuple[Tensor, Tensor]:
    """What is subtracted from the weight of each token's log p', and given to each E[e].

    F_ik . beta = log p' q(x, y) - <e', beta_e x>, with q = x . beta_0 + <e(y), beta_e x>.

    Args:
        predictor: x, [t, F].
        embedding: e(y), [t, 8].
        coefficients: beta of each fold, [f, 9 F, 2].
        fold: fold of each token, [t].

    Returns:
        q, [t, 2], and the coefficients of e', [t, 8, 2].
    """
    width = predictor.shape[1]
    factors = predictor.new_empty(len(predictor), 1 + NUM_EMBEDDINGS, 2)
    for number, beta in enumerate(coefficients):
        here = fold == number
        # [t', F] times [9, F, 2].
        by_factor = beta.view(-1, width, 2)
        factors[here] = torch.einsum("tf,afc->tac", predictor[here], by_factor)
    of_actions = factors[:, 1:]
    values = factors[:, 0] + (embedding[:, :, None].to(factors) * of_actions).sum(1)
    return values, of_actions


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
