"""Control variates: everything of mean zero that the passes hold anyway.

Given x and y_{<k}, with ' = d/d eta along v and g any function of the distribution at
step k and the token drawn from it,

    E[ g(y_k) log p'_ik ] = sum_v pi_v g(v) (log pi_v)'      and      E[ g(y_k) ] = sum_v pi_v g(v)

are known in closed form, so that

    u_ik = g(y_k) log p'_ik - sum_v pi_v g(v) (log pi_v)'     (g = 1: log p'_ik itself)
    m_ik = ( g(y_k) - sum_v pi_v g(v) ) sum_{j<k} log p'_ij

have mean zero, also times anything known before y_k. For g: 1, log p, p, and whether the
token is the most probable one. u is the part of sum_{j>k} H_ij log p'_ik that depends on
y_k through g; m is the innovation by which y_k moves later entropies, against the score
of what came before.

Their sums Z_g over a group are regressed on the group's influence psi_g on the slope, over
the *other* folds of groups, and beta_{-fold} . Z_g is subtracted. The variance of the slope
falls by the share that Z explains. Its mean does not change: exactly for `sum` with a
baseline that is not fitted (`full`, `none`, `hk`); up to the 1/n of a ratio for the other
normalisations and for `loo` and `ridge`, whose predictions for other groups have seen this
one. The coefficients cost degrees of freedom that the standard errors do not see, so at
most one variate is used for every `GROUPS_PER_VARIATE` groups, the plain ones first.

Shape legend: n sequences and t tokens of one rank, N of the batch, n_g groups, m variates.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from entropy_ddp.data.batch import Ragged
from entropy_ddp.estimators.baselines import folds_of
from entropy_ddp.estimators.entropy import EntropyChange, Ratio
from entropy_ddp.estimators.linear import Slope, noise_between
from entropy_ddp.model.response_tokens import DirectionalScores

GROUPS_PER_VARIATE = 10.0
# Variates for each predictor: u and m, of four functions g each.
VARIATES_PER_PREDICTOR = 8
# Weight of the ridge penalty, in observations for each variate.
PENALTY_PER_VARIATE = 3.0


def zero_mean_sums(
    tokens: DirectionalScores,
    features: dict[str, Tensor],
    predictor: Tensor,
    ragged: Ragged,
) -> Tensor:
    """Z_i: sums over each sequence of the zero-mean quantities, [n, m].

    Args:
        tokens: values and derivatives, [t].
        features: what `score` returns beside them, [t] each.
        predictor: what is known before each token, [t, F].
    """
    probability, dlogp = tokens.logp.exp(), tokens.dlogp
    is_top = features["is_top"]
    # The score of the prefix, known before y_k.
    before = ragged.sum_before(dlogp)
    # u for g = 1, log p, p and is-top: g(y_k) log p' less its conditional mean. For g =
    # log p the mean is sum_v pi_v log pi_v (log pi_v)' = -H'.
    weighted = (
        dlogp,
        tokens.logp * dlogp + tokens.dentropy,
        probability * dlogp - features["dcollision"],
        is_top * dlogp - features["dtop"],
    )
    # What multiplies the prefix's score in m; for g = 1, which has no innovation,
    # log p' takes its place. The mean of log p is -H.
    innovations = (
        dlogp,
        tokens.logp + tokens.entropy,
        probability - features["collision"],
        is_top - features["top_probability"],
    )
    plain = torch.stack([*weighted, *(m * before for m in innovations)], dim=1)
    # All of them times the first predictor, then times the second, and so on.
    # [t, F] times [t, 8]: [t, 8 F].
    quantities = (predictor[:, :, None] * plain[:, None, :]).flatten(1)
    total = quantities.new_zeros(len(ragged.lengths), quantities.shape[1])
    return total.index_add_(0, ragged.sequence_of_token, quantities)


def num_usable_predictors(num_groups: int) -> int:
    """How many predictors, the first ones, have variates that `adjusted_slope` uses."""
    return math.ceil(int(num_groups / GROUPS_PER_VARIATE) / VARIATES_PER_PREDICTOR)


def adjusted_slope(
    slope: Slope, original: Ratio, zero_mean: Tensor, fold: Tensor | None = None
) -> Slope:
    """The slope with its control variates removed, contributions and errors included.

    Args:
        slope: a slope of any score and baseline.
        original: the entropy estimator at theta.
        zero_mean: Z_i of all sequences, [N, m].
        fold: fold of each unit, [n]; by default from its number.

    Raises:
        InputError: there are fewer than two units.
    """
    estimate, draws = slope.estimate, slope.estimate.draws
    num_units, groups = draws.num_units, draws.groups
    if fold is None:
        fold = folds_of(torch.arange(num_units))
    # The first variates only: the others would cost more than they explain.
    zero_mean = zero_mean[:, : int(num_units / GROUPS_PER_VARIATE)]
    # [f, m], those of a fold fitted on the other folds.
    coefficients = cross_fitted_slopes(
        draws.totals(zero_mean), estimate.group_influence, fold
    )
    correction = (zero_mean * coefficients[fold[groups]]).sum(1)
    size = original.denominator
    removed = Ratio(numerator=correction * size, size=original.size).estimate(draws)
    return replace(
        slope,
        control_variates=True,
        estimate=estimate.minus(removed),
        terms=slope.terms | {"control_variates": -float(correction.sum())},
        contributions=slope.contributions - correction,
    )


def cross_fitted_slopes(
    zero_mean: Tensor, influence: Tensor, fold: Tensor | None = None
) -> Tensor:
    """For each fold, coefficients of psi_g on Z_g fitted on the other folds, [f, m].

    A ridge regression on standardised variates with a free constant.
    """
    if fold is None:
        fold = folds_of(torch.arange(len(influence)))
    coefficients = []
    for number in range(int(fold.max()) + 1):
        rows, values = zero_mean[fold != number], influence[fold != number]
        # Not centred: the variates have mean zero.
        scale = rows.square().mean(0).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        rows = rows / scale
        rows, values = rows - rows.mean(0), values - values.mean()
        # Centred on both sides: the constant is free of the penalty.
        gram = rows.T @ rows
        gram.diagonal().add_(PENALTY_PER_VARIATE * rows.shape[1])
        # Back to the variates' own units.
        coefficients.append(torch.linalg.solve(gram, rows.T @ values) / scale)
    return torch.stack(coefficients)


def adjusted_change(
    change: EntropyChange,
    partner: Slope,
    best: Slope,
    original: Ratio,
    learning_rate: float,
    fold: Tensor,
) -> EntropyChange:
    """Delta H with the noise removed that a better slope shows its partner to have.

    The difference d of two slopes of the same expectation has mean zero, and eta d is
    the first-order part of the noise of Delta H. What is removed is c eta d: c = 1 for a
    small step; where the weights are uneven, Delta H has little of the noise of first
    order, and c = 1 would add noise. With psi the influences of units on Delta H and
    on eta d,

        c = min(1, max(0, sum psi(Delta H) psi(eta d) / sum psi(eta d)^2))

    over the other folds, so that no unit has part in its own.

    Args:
        partner: the slope that is exactly its derivative.
        best: a slope of the same expectation and less variance.
        original: the entropy estimator at theta.
        fold: fold of each unit, [n].
    """
    draws = change.change.draws
    ones = torch.ones(len(draws.groups), dtype=torch.float64)
    whole, _ = noise_between(partner, best, original, ones, draws)
    noise = learning_rate * whole.group_influence
    product, square = noise * change.change.group_influence, noise.square()
    count = int(fold.max()) + 1
    sums = torch.zeros(count, 2, dtype=torch.float64)
    sums.index_add_(0, fold, torch.stack([product, square], dim=1))
    others = sums.sum(0) - sums
    # Without noise there is nothing to remove.
    weight = others[:, 0] / torch.where(others[:, 1] > 0, others[:, 1], 1.0)
    weight = weight.clamp(0.0, 1.0)
    removed, contributions = noise_between(
        partner, best, original, weight[fold[draws.groups]], draws
    )
    used = weight[fold.unique()]
    return replace(
        change,
        after=change.after.minus(removed, learning_rate),
        change=change.change.minus(removed, learning_rate),
        contributions=change.contributions - learning_rate * contributions,
        control_weight=float(used.mean()),
    )
