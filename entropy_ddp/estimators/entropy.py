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
    count_groups,
    delta_method_error,
    effective_sample_size,
    group_totals,
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

    def influence(self, groups: Tensor, num_groups: int) -> Tensor:
        """Influence of each group on the value, [num_groups]."""
        residual = self.numerator
        if self.size is not None:
            residual = residual - self.value * self.size
        return group_totals(residual, groups, num_groups) / self.denominator


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
        value: Delta H.
        se: delta-method standard error, clustered by group.
        se_before, se_after: those of the two entropies, of the batch as it is drawn;
            they are nearly one error, of which the change has little.
        ess: effective sample size (sum w)^2 / sum w^2 of the sequences' weights
            (clipped for `clip`), between 1 and N.
        contributions: per-sequence c_i; they sum to the value, [N].
        influence: influence of each group, [n_g].
    """

    is_mode: ImportanceMode
    before: float
    after: float
    value: float
    se: float
    se_before: float
    se_after: float
    ess: float
    contributions: Tensor
    influence: Tensor

    @property
    def ess_fraction(self) -> float:
        """Effective sample size over N."""
        return self.ess / len(self.contributions)


def entropy_change(
    is_mode: ImportanceMode, before: Ratio, after: Ratio, ess: float, groups: Tensor
) -> EntropyChange:
    """Delta H with its error and its exact split over sequences.

    c_i = A'_i / sum D' - A_i / sum D, with A', D' the weighted numerator and size. The
    influence of a group is the difference of its influences on both values, so that
    the strong correlation of the two is in the standard error.

    Args:
        before: the estimator at theta.
        after: the weighted estimator at theta'.
        groups: group of each sequence, [N].

    Raises:
        InputError: there are fewer than two groups.
    """
    num_groups = count_groups(groups)
    then, now = (r.influence(groups, num_groups) for r in (before, after))
    # Not the root of the sum of squares: the same responses are in both.
    influence = now - then
    return EntropyChange(
        is_mode=is_mode,
        before=before.value,
        after=after.value,
        value=after.value - before.value,
        se=delta_method_error(influence),
        se_before=delta_method_error(then),
        se_after=delta_method_error(now),
        ess=ess,
        contributions=after.contributions - before.contributions,
        influence=influence,
    )


def all_entropy_changes(
    before: Ratio,
    unweighted_after: Ratio,
    log_weights: Tensor,
    clip_c: float,
    per_decision: Ratio | None,
    groups: Tensor,
) -> dict[ImportanceMode, EntropyChange]:
    """Delta H by every mode that applies, from one scoring pass.

    Args:
        before: the estimator at theta.
        unweighted_after: the estimator with the integrand at theta', not yet weighted.
        log_weights: log w_i, [N].
        clip_c: upper limit of a weight in mode `clip`.
        per_decision: the `per_decision` estimator at theta', None where undefined.
        groups: group of each sequence, [N].

    Raises:
        InputError: there are fewer than two groups.
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
        mode: entropy_change(
            mode, before, ratio, effective_sample_size(weights), groups
        )
        for mode, (ratio, weights) in after.items()
    }
