"""The entropy of a batch and its importance-sampled change to other parameters.

Per sequence i, with T_i response tokens, integrand H_i (the sum of the step entropies
`rb`, or the surprisal -l_i) and l_i the log-probability of the response, `normalize`
fixes a numerator A_i and a size D_i, and H(theta) = sum A_i / sum D_i:

    per_token                 A_i = H_i         D_i = T_i
    per_sequence              A_i = H_i         D_i = 1
    per_sequence_token_mean   A_i = H_i / T_i   D_i = 1        (0 where T_i = 0)
    sum                       A_i = H_i         sum D_i := 1, a constant

At theta', with w_i = exp(l_i(theta') - l_i(theta)),

    snis           H(theta') = sum w_i A_i(theta') / sum w_i D_i
    clip           the same with min(w_i, c)
    per_decision   H(theta') = sum_ik w_{i,<k} H_ik(theta') / sum_ik w_{i,<k} D_ik,
                   w_{i,<k} the weight of the prefix y_{<k}: step k's entropy depends
                   on nothing later

`snis` and `per_decision` are consistent. Self-normalised they have a bias of order 1/N,
of `sum` none. `clip` is biased, however large N is, towards what the change would be
were all weights equal (of a ratio: c -> 0): the pathwise part, the change of the step
entropies along the responses of theta. It may have the other sign.

Shape legend: N sequences, T tokens of the whole batch; n, t those of one rank.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_ddp.config import ImportanceMode, Integrand, Normalize
from entropy_ddp.data.batch import Ragged
from entropy_ddp.estimators.standard_errors import (
    Draws,
    Estimate,
    effective_sample_size,
)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of sums over sequences, or a plain sum.

    Attributes:
        numerator: A_i, float64, [N].
        size: D_i, float64, [N]; None when the denominator is the constant 1.
    """

    numerator: Tensor
    size: Tensor | None

    @property
    def denominator(self) -> float:
        """sum D_i."""
        return 1.0 if self.size is None else float(self.size.sum())

    @property
    def value(self) -> float:
        """sum A_i / sum D_i."""
        return float(self.numerator.sum()) / self.denominator

    @property
    def contributions(self) -> Tensor:
        """A_i / sum D_i: they sum to the value, [N]."""
        return self.numerator / self.denominator

    def estimate(self, draws: Draws) -> Estimate:
        """The value with its errors.

        Raises:
            InputError: there are fewer than two units.
        """
        if self.size is None:
            columns = self.numerator[:, None]
            return Estimate.of(lambda totals: totals[..., 0], columns, draws)
        columns = torch.stack([self.numerator, self.size], dim=1)
        return Estimate.of(
            lambda totals: totals[..., 0] / totals[..., 1], columns, draws
        )


@dataclass(frozen=True, kw_only=True)
class Reweighting:
    """Weights at theta of tokens that another policy p_s sampled, [t] each.

    Attributes:
        before: w_{i,<k} = prod_{j<k} p_ij / p_s,ij, of the prefix of step k.
        through: the same through step k.
    """

    before: Tensor
    through: Tensor

    def at(self, tokens: slice) -> "Reweighting":
        """The weights of some of the tokens."""
        return Reweighting(before=self.before[tokens], through=self.through[tokens])

    @classmethod
    def of(cls, ragged: Ragged, log_ratio: Tensor) -> "Reweighting":
        """From log p_ik - log p_s,ik, [t]."""
        before = ragged.sum_before(log_ratio)
        return cls(before=before.exp(), through=(before + log_ratio).exp())


def integrand_tokens(integrand: Integrand, logp: Tensor, entropy: Tensor) -> Tensor:
    """What is summed over the steps of a response: entropy or surprisal, [t], nats."""
    return entropy if integrand == "rb" else -logp


def as_ratio(normalize: Normalize, integrand: Tensor, lengths: Tensor) -> Ratio:
    """The estimator of H(theta) from H_i [N] and T_i [N]; nats per token or sequence.

    Args:
        integrand: H_i, float64, [N].
        lengths: T_i, [N].
    """
    lengths = lengths.to(integrand)
    if normalize == "per_token":
        return Ratio(numerator=integrand, size=lengths)
    if normalize == "per_sequence":
        return Ratio(numerator=integrand, size=torch.ones_like(integrand))
    if normalize == "per_sequence_token_mean":
        # A sequence without tokens has H_i = 0, so 0 / 1 is its mean by definition.
        means = integrand / lengths.clamp(min=1)
        return Ratio(numerator=means, size=torch.ones_like(integrand))
    return Ratio(numerator=integrand, size=None)


def reweighted(original: Ratio, log_weights: Tensor) -> Ratio:
    """The estimator with each sequence weighted by exp(log w_i).

    Args:
        original: numerator at theta' and size, unweighted.
        log_weights: log w_i, [N].

    The largest weight is divided out of both sums; of a plain sum it is put back.
    """
    shift = log_weights.max()
    weights = (log_weights - shift).exp()
    if original.size is None:
        return Ratio(numerator=original.numerator * weights * shift.exp(), size=None)
    return Ratio(numerator=original.numerator * weights, size=original.size * weights)


def prefix_log_weights(ragged: Ragged, log_ratio: Tensor) -> Tensor:
    """log w_{i,<k} of every token, from log p'_ik - log p_ik, [t]."""
    return ragged.sum_before(log_ratio)


def prefix_sums(
    ragged: Ragged, log_weights: Tensor, entropy: Tensor, shift: float
) -> Ratio:
    """The sums of `per_decision` over each sequence, scaled by exp(-shift); [n] each.

    numerator_i = sum_k w_{i,<k} H_ik(theta'), size_i = sum_k w_{i,<k}.

    Args:
        log_weights: log w_{i,<k}, [t].
        entropy: H_ik at theta', [t].
        shift: at least the largest log-weight, so that no weight overflows.
    """
    weights = (log_weights - shift).exp()
    return Ratio(numerator=ragged.sum(weights * entropy), size=ragged.sum(weights))


def per_decision_ratio(normalize: Normalize, sums: Ratio, shift: float) -> Ratio:
    """The `per_decision` estimator at theta' from the sums over all sequences."""
    if normalize == "per_token":
        # The scale drops out of the ratio.
        return sums
    unscaled = sums.numerator * torch.tensor(shift, dtype=torch.float64).exp()
    size = torch.ones_like(unscaled) if normalize == "per_sequence" else None
    return Ratio(numerator=unscaled, size=size)


@dataclass(frozen=True, kw_only=True)
class EntropyChange:
    """Delta H = H(theta') - H(theta) on one batch, in nats (per token or sequence).

    Attributes:
        is_mode: kind of importance weights.
        before: H(theta).
        after: H(theta').
        change: Delta H. The errors of the two entropies, of the batch as it is drawn,
            are nearly one error, of which the change has little.
        ess: effective sample size (sum w)^2 / sum w^2 of the sequences' weights
            (clipped for `clip`), between 1 and N.
        contributions: per-sequence c_i; they sum to the change, [N].
        control_weight: mean over folds of the share c of first-order noise that was
            removed (see `control_variates`); None where none was.
    """

    is_mode: ImportanceMode
    before: Estimate
    after: Estimate
    change: Estimate
    ess: float
    contributions: Tensor
    control_weight: float | None = None

    @property
    def value(self) -> float:
        """Delta H."""
        return self.change.value

    @property
    def se(self) -> float:
        """Standard error of Delta H by the delta method."""
        return self.change.se

    @property
    def ess_fraction(self) -> float:
        """Effective sample size over N."""
        return self.ess / len(self.contributions)


def entropy_change(
    is_mode: ImportanceMode, before: Ratio, after: Ratio, ess: float, draws: Draws
) -> EntropyChange:
    """Delta H with its error and its exact split over sequences.

    c_i = A'_i / sum D' - A_i / sum D, with A', D' the weighted numerator and size. The
    influence of a unit is the difference of its influences on both values, so that
    the strong correlation of the two is in the standard error: it is not the root of
    the sum of squares.

    Args:
        before: the estimator at theta.
        after: the weighted estimator at theta'.

    Raises:
        InputError: there are fewer than two units.
    """
    then, now = before.estimate(draws), after.estimate(draws)
    return EntropyChange(
        is_mode=is_mode,
        before=then,
        after=now,
        change=now.minus(then),
        ess=ess,
        contributions=after.contributions - before.contributions,
    )


def all_entropy_changes(
    before: Ratio,
    unweighted_after: Ratio,
    log_weights: Tensor,
    clip_c: float,
    per_decision: Ratio | None,
    draws: Draws,
) -> dict[ImportanceMode, EntropyChange]:
    """Delta H by every mode that applies, from one scoring pass.

    Args:
        before: the estimator at theta.
        unweighted_after: the estimator with the integrand at theta', not yet weighted.
        log_weights: log w_i, [N].
        clip_c: upper limit of a weight in mode `clip`.
        per_decision: the `per_decision` estimator at theta', None where undefined.

    Raises:
        InputError: there are fewer than two units.
    """
    # min(w, c) by logarithms: no overflow before the limit.
    clipped = log_weights.clamp(max=math.log(clip_c))
    after: dict[ImportanceMode, tuple[Ratio, Tensor]] = {
        "snis": (reweighted(unweighted_after, log_weights), log_weights),
        "clip": (reweighted(unweighted_after, clipped), clipped),
    }
    if per_decision is not None:
        after["per_decision"] = (per_decision, log_weights)
    return {
        mode: entropy_change(mode, before, ratio, effective_sample_size(weights), draws)
        for mode, (ratio, weights) in after.items()
    }
