"""The first-order prediction: derivative of the estimator along the step, at eta = 0.

With ' = d/d eta along v, l_i the log-probability of response i, A_i and D_i numerator and
size of the entropy estimator (see `entropy`), and Hbar = sum A_i / sum D_i:

    full    slope = 1/sum D [ sum_i l'_i A_i  +  sum_i A'_i  -  Hbar sum_i l'_i D_i ]
                              score             pathwise       denominator

which is exactly d/d eta of the `snis` value on this batch. With entropies to go, each
log p'_ik is weighted by what comes after it only (same expectation, smaller variance):

    to_go   l'_i A_i - Hbar l'_i D_i  becomes  sum_k c_ik log p'_ik,
            c_ik = sum_{j>=k} H_ij - b_ik - Hbar R_ik
            none:  b = 0                        R_ik = T_i - k + 1
            hk:    b = H_ik (the step's Rao-Blackwell entropy, known before y_k)
                                                R_ik = T_i - k
            loo, ridge: as hk, less a prediction of both sums (see `baselines`)

`to_go` + `hk` is exactly d/d eta of the `per_decision` value. Hbar enters the weights for
`per_token` only: the number of sequences does not depend on the policy.

The weights are centred per token before they are contracted with log p': score and
denominator terms can be a thousand times larger than the slope they leave.

Shape legend: n sequences and t tokens of one rank, N sequences of the batch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entropy_ddp.config import Integrand, Normalize
from entropy_ddp.data.batch import Ragged
from entropy_ddp.estimators.entropy import Ratio, integrand_tokens
from entropy_ddp.estimators.standard_errors import (
    count_groups,
    delta_method_error,
    group_totals,
    jackknife_error,
)
from entropy_ddp.model.response_tokens import DirectionalScores

Score = Literal["full", "to_go"]
Baseline = Literal["none", "hk", "loo", "ridge"]


@dataclass(frozen=True, kw_only=True)
class SlopeWeights:
    """Weights of every token's log p' and integrand', before division by sum D; [t].

    Attributes:
        score: weight of log p' in the score term.
        denominator: weight R of Hbar times log p' (the denominator term is -Hbar R).
        centred: score - Hbar denominator, formed per token without cancellation.
        pathwise: weight of the integrand's derivative.
    """

    score: Tensor
    denominator: Tensor
    centred: Tensor
    pathwise: Tensor


def slope_weights(
    tokens: DirectionalScores,
    ragged: Ragged,
    mean_entropy: float,
    estimator: tuple[Integrand, Normalize, Score, Baseline],
    prediction: Tensor | None = None,
) -> SlopeWeights:
    """The weights c of section "First order" for one rank's tokens.

    Args:
        tokens: values at theta; the derivatives are not used.
        mean_entropy: Hbar over the whole batch.
        estimator: integrand, normalisation, score and baseline.
        prediction: of the integrand and the number of steps after each token, [t, 2];
            needed by the baselines `loo` and `ridge`.

    Raises:
        ValueError: `to_go` of `per_sequence_token_mean`, which has no such form.
    """
    integrand, normalize, score, baseline = estimator
    values = integrand_tokens(integrand, tokens.logp, tokens.entropy)
    pathwise = ragged.spread(pathwise_weights(normalize, ragged.lengths))
    if score == "full":
        totals = ragged.sum(values * pathwise)
        size = _sizes(normalize, ragged)
        return SlopeWeights(
            score=ragged.spread(totals),
            denominator=ragged.spread(size),
            centred=ragged.spread(totals - mean_entropy * size),
            pathwise=pathwise,
        )
    if normalize == "per_sequence_token_mean":
        raise ValueError("per_sequence_token_mean has no to-go form; use score full")
    after_hk = baseline != "none"
    # What the weight of step k has of step k itself, less b_ik = H_ik.
    own = values - tokens.entropy if after_hk else values
    counted = _counted(normalize)
    counted_own = 0.0 if after_hk else counted
    # What a fitted baseline expects of both sums after the step.
    predicted, predicted_count = torch.zeros(2, len(values), dtype=values.dtype)
    if baseline in ("loo", "ridge"):
        assert prediction is not None
        predicted, predicted_count = prediction[:, 0], counted * prediction[:, 1]
    # R_ik without the step itself: T_i - k, or 0 where lengths do not count.
    after = counted * ragged.sum_after(torch.ones_like(values))
    return SlopeWeights(
        score=ragged.sum_after(values) + own - predicted,
        denominator=after + counted_own - predicted_count,
        # The differences first, then their sums: score and Hbar R cancel.
        centred=ragged.sum_after(values - counted * mean_entropy)
        + (own - counted_own * mean_entropy)
        - (predicted - mean_entropy * predicted_count),
        pathwise=pathwise,
    )


def pathwise_weights(normalize: Normalize, lengths: Tensor) -> Tensor:
    """Weight of the integrand's derivative, the same for all tokens of a sequence; [n].

    Args:
        lengths: T_i, [n].
    """
    lengths = lengths.clamp(min=1).double()
    mean = normalize == "per_sequence_token_mean"
    return 1 / lengths if mean else torch.ones_like(lengths)


def _counted(normalize: Normalize) -> float:
    """Whether the number of steps to go enters the weights: 1 or 0."""
    return 1.0 if normalize == "per_token" else 0.0


def _sizes(normalize: Normalize, ragged: Ragged) -> Tensor:
    """D_i of one rank's sequences, as far as it depends on the weights w_i; [n]."""
    lengths = ragged.lengths.double()
    if normalize == "per_token":
        return lengths
    return (torch.zeros_like if normalize == "sum" else torch.ones_like)(lengths)


def sequence_terms(
    tokens: DirectionalScores,
    ragged: Ragged,
    weights: SlopeWeights,
    integrand: Integrand,
) -> Tensor:
    """The per-sequence pieces of the slope, before division by sum D; [n, 4].

    Columns: centred sum (score, pathwise and denominator terms together), score,
    pathwise, and r_i, the factor of -Hbar in the denominator term.
    """
    derivative = integrand_tokens(integrand, tokens.dlogp, tokens.dentropy)
    pathwise = ragged.sum(weights.pathwise * derivative)
    columns = (
        ragged.sum(weights.centred * tokens.dlogp) + pathwise,
        ragged.sum(weights.score * tokens.dlogp),
        pathwise,
        ragged.sum(weights.denominator * tokens.dlogp),
    )
    return torch.stack(columns, dim=1)


def terms_less_prediction(
    terms: Tensor, predicted: Tensor, mean_entropy: float, normalize: Normalize
) -> Tensor:
    """`sequence_terms` of `loo` or `ridge` from those of `hk`; [n, 4].

    The weights of both are those of `hk` less the prediction, so that of a sequence's
    tokens only sum_k log p'_ik times the prediction is needed.

    Args:
        terms: columns of `sequence_terms` for `to_go` with `hk`, [n, 4].
        predicted: sum over each sequence of log p' times the predictions of integrand
            and number of steps after the token, [n, 2].
        mean_entropy: Hbar over the whole batch.
    """
    centred, score, pathwise, counts = terms.unbind(1)
    values, steps = predicted[:, 0], _counted(normalize) * predicted[:, 1]
    columns = (
        centred - (values - mean_entropy * steps),
        score - values,
        pathwise,
        counts - steps,
    )
    return torch.stack(columns, dim=1)


@dataclass(frozen=True, kw_only=True)
class Slope:
    """A slope d H / d eta, in nats per unit learning rate.

    Attributes:
        score, baseline: which estimator.
        value: the slope.
        terms: its score, pathwise and denominator terms; they sum to it.
        se: delta-method standard error conditional on v, clustered by group.
        se_jackknife: leave-one-group-out jackknife of the same.
        contributions: derivative of each sequence's contribution c_i to the truth,
            [s_i + A'_i - A_i r / S] / S; they sum to the value, [N].
        influence: influence of each group, [n_g].
        without: the estimate without each group, [n_g].
        rescaled: by what a group's share of a sum grows when one group is left out,
            S / (S - D_g), [n_g].
        control_variates: whether control variates were removed.
    """

    score: Score
    baseline: Baseline
    value: float
    terms: dict[str, float]
    se: float
    se_jackknife: float
    contributions: Tensor
    influence: Tensor
    without: Tensor
    rescaled: Tensor
    control_variates: bool = False


def slope_from_terms(
    terms: Tensor,
    original: Ratio,
    groups: Tensor,
    estimator: tuple[Score, Baseline],
) -> Slope:
    """The slope and its errors from the pieces of all sequences.

    With s_i the score sums, B = sum b_i the centred sums, r = sum r_i and S = sum D_i,
    slope = B / S. Every mean that enters varies: the influence of group g is

        psi_g = [ b_g - slope D_g - (r / S) (A_g - Hbar D_g) ] / S

    and the estimate without it is [B - b_g + (Hbar - Hbar_(g)) (r - r_g)] / (S - D_g),
    Hbar_(g) the mean entropy without it. For `sum`, S = 1 and the total of the
    remaining n - 1 groups is scaled by n / (n - 1).

    Args:
        terms: columns of `sequence_terms`, [N, 4].
        original: the entropy estimator at theta.
        groups: group of each sequence, [N].
        estimator: score and baseline, carried along.

    Raises:
        InputError: there are fewer than two groups.
    """
    num_groups = count_groups(groups)
    centred, score, pathwise, counts = terms.unbind(1)
    total, denominator = float(centred.sum()), original.denominator
    mean_entropy, count = original.value, float(counts.sum())
    # Sums over each group, [n_g].
    b, r, a = (
        group_totals(x, groups, num_groups)
        for x in (centred, counts, original.numerator)
    )
    value = total / denominator
    if original.size is None:
        # The denominator is 1: no mean but the sum itself varies.
        influence = b
        rescaled = torch.full_like(b, num_groups / max(num_groups - 1, 1))
        without = rescaled * (total - b)
    else:
        d = group_totals(original.size, groups, num_groups)
        # Hbar varies with the batch as well: d Hbar = (A_g - Hbar D_g) / S.
        residual = a - mean_entropy * d
        influence = (b - value * d - count / denominator * residual) / denominator
        # The terms were centred at the mean of all groups; without g it is another.
        mean_without = (original.numerator.sum() - a) / (denominator - d)
        shift = (mean_entropy - mean_without) * (count - r)
        rescaled = denominator / (denominator - d)
        without = (total - b + shift) / denominator * rescaled
    return Slope(
        score=estimator[0],
        baseline=estimator[1],
        value=value,
        terms={
            "score": float(score.sum()) / denominator,
            "pathwise": float(pathwise.sum()) / denominator,
            "denominator": -mean_entropy * count / denominator,
        },
        se=delta_method_error(influence),
        se_jackknife=jackknife_error(without),
        contributions=(score + pathwise - original.numerator * count / denominator)
        / denominator,
        influence=influence,
        without=without,
        rescaled=rescaled,
    )


def applicable_estimators(normalize: Normalize) -> list[tuple[Score, Baseline]]:
    """Every combination of score and baseline that is defined for a normalisation."""
    if normalize == "per_sequence_token_mean":
        return [("full", "none")]
    return [
        ("full", "none"),
        ("to_go", "none"),
        ("to_go", "hk"),
        ("to_go", "loo"),
        ("to_go", "ridge"),
    ]
