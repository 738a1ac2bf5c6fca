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
            loo, ridge, action_value: as hk, less a prediction of both sums (see
                `baselines`); one that knows y_k leaves a pathwise term of its own

`to_go` + `hk` is exactly d/d eta of the `per_decision` value. Hbar enters the weights for
`per_token` only: the number of sequences does not depend on the policy.

Where E was sampled by another policy (see `Reweighting`), H_ij and the count of each step
carry the weight w_{<j} of their prefix, a prediction that of the prefix through y_k, and
the slope is d/d eta of the `per_decision` value with those weights.

The weights are centred per token before they are contracted with log p': score and
denominator terms can be a thousand times larger than the slope they leave.

Shape legend: n sequences and t tokens of one rank, N sequences of the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_ddp.config import Integrand, Normalize, SlopeBaseline, SlopeScore
from entropy_ddp.data.batch import Ragged
from entropy_ddp.estimators.entropy import Ratio, Reweighting, integrand_tokens
from entropy_ddp.estimators.standard_errors import Draws, Estimate
from entropy_ddp.model.response_tokens import DirectionalScores, TokenScores

Score = SlopeScore
Baseline = SlopeBaseline
# Baselines with a prediction of what follows a token.
PREDICTING: tuple[Baseline, ...] = ("loo", "ridge", "action_value")


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
    tokens: TokenScores,
    ragged: Ragged,
    mean_entropy: float,
    estimator: tuple[Integrand, Normalize, Score, Baseline],
    prediction: Tensor | None = None,
    reweighting: Reweighting | None = None,
) -> SlopeWeights:
    """The weights c of section "First order" for one rank's tokens.

    Args:
        tokens: values at theta.
        mean_entropy: Hbar over the whole batch.
        estimator: integrand, normalisation, score and baseline.
        prediction: of the integrand and the number of steps after each token, [t, 2];
            needed by the baselines that predict.
        reweighting: of E sampled by another policy; for `to_go` with `hk` and beyond.

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
    # What each step counts: 1, or the weight of its prefix.
    steps = torch.ones_like(values)
    through = 1.0 if reweighting is None else reweighting.through
    if reweighting is not None:
        assert after_hk and integrand == "rb"
        steps = pathwise = reweighting.before
        values = values * steps
    counted = _counted(normalize)
    counted_own = 0.0 if after_hk else counted
    # What a fitted baseline expects of both sums after the step.
    predicted, predicted_count = torch.zeros(2, len(values), dtype=values.dtype)
    if baseline in PREDICTING:
        assert prediction is not None
        predicted = prediction[:, 0] * through
        predicted_count = counted * prediction[:, 1] * through
    # R_ik without the step itself: T_i - k, or 0 where lengths do not count.
    after = counted * ragged.sum_after(steps)
    return SlopeWeights(
        score=ragged.sum_after(values) + own - predicted,
        denominator=after + counted_own - predicted_count,
        # The differences first, then their sums: score and Hbar R cancel.
        centred=ragged.sum_after(values - counted * mean_entropy * steps)
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


def centred_part(
    predicted: Tensor, mean_entropy: float, normalize: Normalize
) -> Tensor:
    """Y_1 - Hbar Y_2 of predictions of both, [..., 2] to [...]."""
    return predicted[..., 0] - mean_entropy * _counted(normalize) * predicted[..., 1]


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
    """`sequence_terms` of a baseline that predicts, from those of `hk`; [n, 4].

    The weights are those of `hk` less the prediction, so that of a sequence's tokens only
    sum_k log p'_ik times the prediction is needed (for `action_value`, sum_k F_ik beta).

    Args:
        terms: columns of `sequence_terms` for `to_go` with `hk`, [n, 4].
        predicted: that sum over each sequence, of the integrand and of the number of
            steps after the token, [n, 2].
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
    """A slope d H / d eta, in nats per unit learning rate, conditional on v.

    Attributes:
        score, baseline: which estimator.
        estimate: the slope with its errors.
        terms: its score, pathwise and denominator terms; they sum to it.
        contributions: derivative of each sequence's contribution c_i to the truth,
            [s_i + A'_i - A_i r / S] / S; they sum to the value, [N].
        pieces: the columns of `sequence_terms` that it was made of, [N, 4].
        control_variates: whether control variates were removed.
    """

    score: Score
    baseline: Baseline
    estimate: Estimate
    terms: dict[str, float]
    contributions: Tensor
    pieces: Tensor
    control_variates: bool = False

    @property
    def value(self) -> float:
        """The slope."""
        return self.estimate.value

    @property
    def se(self) -> float:
        """Its standard error by the delta method."""
        return self.estimate.se


def slope_from_terms(
    terms: Tensor,
    original: Ratio,
    draws: Draws,
    estimator: tuple[Score, Baseline],
) -> Slope:
    """The slope and its errors from the pieces of all sequences.

    With B = sum b_i the centred sums, r = sum r_i, A and S the sums of A_i and D_i, and
    the terms centred at the batch's own mean entropy Hbar,

        slope = [ B - (A / S - Hbar) r ] / S

    where the bracket's second term is 0 of the whole batch, and not without some of it:
    every mean that enters varies. For `sum`, slope = B.

    Args:
        terms: columns of `sequence_terms`, [N, 4].
        original: the entropy estimator at theta.
        estimator: score and baseline, carried along.

    Raises:
        InputError: there are fewer than two units.
    """
    _, score, pathwise, counts = terms.unbind(1)
    denominator, mean_entropy = original.denominator, original.value
    count = float(counts.sum())
    return Slope(
        score=estimator[0],
        baseline=estimator[1],
        estimate=Estimate.of(
            *_slope_of_totals(terms[:, 0], counts, original), draws=draws
        ),
        terms={
            "score": float(score.sum()) / denominator,
            "pathwise": float(pathwise.sum()) / denominator,
            "denominator": -mean_entropy * count / denominator,
        },
        contributions=(score + pathwise - original.numerator * count / denominator)
        / denominator,
        pieces=terms,
    )


def _slope_of_totals(
    centred: Tensor, counts: Tensor, original: Ratio
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A sum of terms centred at Hbar as a function of totals, and its columns [N, m]."""
    if original.size is None:
        return lambda totals: totals[..., 0], centred[:, None]
    # Counted from Hbar, so that no digits are lost: the mean's excess is 0 in all.
    excess = original.numerator - original.value * original.size

    def slope(totals: Tensor) -> Tensor:
        own, count, above, size = totals.unbind(-1)
        return (own - above / size * count) / size

    return slope, torch.stack([centred, counts, excess, original.size], dim=1)


def noise_between(
    noisy: Slope, quiet: Slope, original: Ratio, weight: Tensor, draws: Draws
) -> tuple[Estimate, Tensor]:
    """The difference of two slopes of one expectation, each sequence with a weight.

    Args:
        weight: of each sequence, the same for all of a fold, [N].

    Returns:
        The difference, of mean zero where the weights do not depend on it, and what each
        sequence has of it, [N].
    """
    difference = weight[:, None] * (noisy.pieces - quiet.pieces)
    function, columns = _slope_of_totals(difference[:, 0], difference[:, 3], original)
    count = float(difference[:, 3].sum())
    _, score, pathwise, _ = difference.unbind(1)
    contributions = score + pathwise - original.numerator * count / original.denominator
    return (
        Estimate.of(function, columns, draws),
        contributions / original.denominator,
    )


def applicable_estimators(
    normalize: Normalize, reweighted: bool = False
) -> list[tuple[Score, Baseline]]:
    """Every combination of score and baseline that is defined, the best one last.

    Args:
        reweighted: E was sampled by another policy.
    """
    if normalize == "per_sequence_token_mean":
        return [("full", "none")]
    with_weights: list[tuple[Score, Baseline]] = [
        ("to_go", "hk"),
        ("to_go", "loo"),
        ("to_go", "ridge"),
        ("to_go", "action_value"),
    ]
    if reweighted:
        return with_weights
    return [("full", "none"), ("to_go", "none"), *with_weights]
