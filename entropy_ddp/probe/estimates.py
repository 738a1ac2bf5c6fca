"""From the passes' token arrays to every estimate: what ranks exchange, and when.

Each rank reduces its own tokens to sums per sequence, block by block; the tables of sums
are gathered, and every rank computes the same estimates from them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_ddp.config import ImportanceMode
from entropy_ddp.data.batch import Shard
from entropy_ddp.estimators.baselines import (
    coefficients_of,
    fitted_part,
    folds_of,
    future_targets,
    leave_one_group_out_prediction,
    token_predictions,
)
from entropy_ddp.estimators.control_variates import adjusted_change, adjusted_slope
from entropy_ddp.estimators.curvature import CurvatureEstimate, curvature
from entropy_ddp.estimators.entropy import (
    EntropyChange,
    Ratio,
    all_entropy_changes,
    as_ratio,
    entropy_change,
    integrand_tokens,
    per_decision_ratio,
    prefix_log_weights,
    prefix_sums,
)
from entropy_ddp.estimators.linear import (
    Baseline,
    Score,
    Slope,
    applicable_estimators,
    sequence_terms,
    slope_from_terms,
    slope_weights,
    terms_less_prediction,
)
from entropy_ddp.estimators.midpoint import (
    midpoint_columns,
    midpoint_slope,
    snis_slope,
)
from entropy_ddp.estimators.standard_errors import Estimate, effective_sample_size
from entropy_ddp.model.response_tokens import (
    NUM_EMBEDDINGS,
    DirectionalScores,
    TokenScores,
)
from entropy_ddp.probe.features import known_before
from entropy_ddp.probe.passes import AlongStep, gather_sums, reweighting
from entropy_ddp.probe.session import Session


@dataclass(frozen=True, kw_only=True)
class SequenceSums:
    """Log-probability l_i and entropy H_i of every sequence of a batch, [N] each."""

    logp: Tensor
    entropy: Tensor


@dataclass(frozen=True, kw_only=True)
class EntropyEstimates:
    """Truth and prediction on E, from all ranks.

    Attributes:
        original: entropy estimator at theta.
        before, after: sums of E's sequences at theta and theta_after.
        log_weights: log w_i, [N].
        changes: Delta H by mode of importance weights.
        adjusted: the same less the first-order noise that the best slope shows, where
            there is such a slope.
        slopes: the slope by (score, baseline, control variates).
        sampler_ess: effective sample size of the weights at theta of E sampled by
            another policy; None of E sampled by this one.
    """

    original: Ratio
    before: SequenceSums
    after: SequenceSums
    log_weights: Tensor
    changes: dict[ImportanceMode, EntropyChange]
    adjusted: dict[ImportanceMode, EntropyChange]
    slopes: dict[tuple[Score, Baseline, bool], Slope]
    sampler_ess: float | None = None

    def change(self, estimator: tuple[ImportanceMode, bool]) -> EntropyChange:
        """Delta H by mode, with first-order noise removed or not."""
        mode, removed = estimator
        return (self.adjusted if removed else self.changes)[mode]

    def matched_pair(self, mode: ImportanceMode) -> tuple[Estimate, Estimate]:
        """Delta H by mode, and the slope that is exactly its derivative.

        Raises:
            KeyError: `clip`, which is the derivative of no slope.
        """
        return self.changes[mode].change, self.slopes[*PARTNERS[mode], False].estimate


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a baseline predicts of what follows the tokens of the audits' sample.

    Attributes:
        after_token: subtracted from the weights of log p', [s, 2].
        of_means: coefficients of the derivatives e' of the means of the projected
            embeddings, [s, 8, 2]; None of a baseline that does not know the token.
    """

    after_token: Tensor
    of_means: Tensor | None = None


# The slope that is exactly the derivative of each mode's value.
PARTNERS: dict[ImportanceMode, tuple[Score, Baseline]] = {
    "snis": ("full", "none"),
    "per_decision": ("to_go", "hk"),
}
BEST: tuple[Score, Baseline] = ("to_go", "action_value")


def estimate(
    session: Session,
    eta: float,
    along: AlongStep,
    stepped: TokenScores,
    sample_size: int = 0,
) -> tuple[EntropyEstimates, Predictions | None]:
    """Every estimator of truth and prediction from two scoring passes over E.

    Args:
        eta: learning rate of the step.
        along: this rank's tokens of E at theta.
        stepped: the same at theta_after.
        sample_size: number of E's first sequences in the audits' sample.

    Returns:
        The estimates, and what the configured baseline predicts of what follows each of
        this rank's tokens of the sample; None for a baseline without predictions.
    """
    base = along.scores
    sums_of, of_sample = _predict(session, along, sample_size)
    before, after = _sums_of_both(session, base, stepped)
    original = original_entropy(session, base, before)
    slopes = _slopes(session, along, original, sums_of)
    changes = _changes(session, original, before, after, base, stepped)
    log_weights, sampler_ess = after.logp - before.logp, None
    if session.reweights:
        sampled = _sampled_logp(session)
        log_weights = after.logp - sampled
        sampler_ess = effective_sample_size(before.logp - sampled)
    estimates = EntropyEstimates(
        original=original,
        before=before,
        after=after,
        log_weights=log_weights,
        changes=changes,
        adjusted=adjusted_changes(session, changes, slopes, original, eta),
        slopes=slopes,
        sampler_ess=sampler_ess,
    )
    return estimates, of_sample


def adjusted_changes(
    session: Session,
    changes: dict[ImportanceMode, EntropyChange],
    slopes: dict[tuple[Score, Baseline, bool], Slope],
    original: Ratio,
    eta: float,
) -> dict[ImportanceMode, EntropyChange]:
    """Each Delta H less the first-order noise that its partner has over the best slope.

    Args:
        eta: learning rate of the change.
    """
    best = slopes.get((*BEST, False))
    if best is None:
        return {}
    folds = session.folds
    return {
        mode: adjusted_change(
            change, slopes[*PARTNERS[mode], False], best, original, eta, folds
        )
        for mode, change in changes.items()
        if mode in PARTNERS
    }


def changes_at(
    session: Session, base: TokenScores, shifted: TokenScores
) -> dict[ImportanceMode, EntropyChange]:
    """Delta H by every mode between two scoring passes over E."""
    before, after = _sums_of_both(session, base, shifted)
    original = original_entropy(session, base, before)
    return _changes(session, original, before, after, base, shifted)


def _sampled_logp(session: Session) -> Tensor:
    """l_i under the policy that E was sampled by, [N]."""
    shard = session.shard("E")
    (sums,) = gather_sums(session.world, shard, shard.sampling_logprobs)
    return sums


def _sums_of_both(
    session: Session, base: TokenScores, stepped: TokenScores
) -> tuple[SequenceSums, SequenceSums]:
    """Sums of E's sequences at theta and elsewhere, all ranks'; one collective."""
    logp, entropy, logp_after, entropy_after = gather_sums(
        session.world,
        session.shard("E"),
        *(base.logp, base.entropy, stepped.logp, stepped.entropy),
    )
    return (
        SequenceSums(logp=logp, entropy=entropy),
        SequenceSums(logp=logp_after, entropy=entropy_after),
    )


def original_entropy(session: Session, base: TokenScores, sums: SequenceSums) -> Ratio:
    """The entropy estimator at theta.

    Args:
        base: this rank's tokens of E at theta.
        sums: of E's sequences at theta.
    """
    if not session.reweights:
        return _ratio(session, sums)
    shard = session.shard("E")
    # Not scaled: the weights of the slope are not either.
    ratio = _per_decision(session, shard, shard.sampling_logprobs, base, shift=0.0)
    assert ratio is not None
    return ratio


def _ratio(session: Session, sums: SequenceSums) -> Ratio:
    """The configured entropy estimator from sequence sums, unweighted."""
    objective = session.config.objective
    values = integrand_tokens(objective.integrand, sums.logp, sums.entropy)
    return as_ratio(objective.normalize, values, session.batches["E"].lengths)


def _changes(
    session: Session,
    original: Ratio,
    before: SequenceSums,
    after: SequenceSums,
    base: TokenScores,
    stepped: TokenScores,
) -> dict[ImportanceMode, EntropyChange]:
    shard, draws = session.shard("E"), session.draws
    if session.reweights:
        sampled = shard.sampling_logprobs
        there = _per_decision(session, shard, sampled, stepped)
        assert there is not None
        ess = effective_sample_size(after.logp - _sampled_logp(session))
        change = entropy_change("per_decision", original, there, ess, draws)
        return {"per_decision": change}
    return all_entropy_changes(
        original,
        _ratio(session, after),
        after.logp - before.logp,
        session.config.truth.clip_c,
        _per_decision(session, shard, base.logp, stepped),
        draws,
    )


def _per_decision(
    session: Session,
    shard: Shard,
    sampled_logp: Tensor,
    scores: TokenScores,
    shift: float | None = None,
) -> Ratio | None:
    """The per-decision estimator at the scores' parameters; None where not defined.

    Args:
        sampled_logp: log p of the shard's tokens where E comes from, [t].
        shift: log of what all weights are divided by; None for the largest weight.
    """
    objective = session.config.objective
    if objective.integrand != "rb" or objective.normalize == "per_sequence_token_mean":
        return None
    pieces = []
    for block in shard.blocks():
        ratio = scores.logp[block.tokens] - sampled_logp[block.tokens]
        weights = prefix_log_weights(block.ragged, ratio)
        # The empty prefix has log w = 0.
        largest = float(weights.max()) if len(weights) else 0.0
        entropy = scores.entropy[block.tokens]
        sums = prefix_sums(block.ragged, weights, entropy, largest)
        pieces.append((block.sequences, largest, sums))
    if shift is None:
        # Each block's largest weight was divided out: now the largest of all.
        shift = session.world.max(max((own for _, own, _ in pieces), default=0.0))
    rows = torch.zeros(len(shard.positions), 2, dtype=torch.float64)
    for sequences, own, sums in pieces:
        assert sums.size is not None
        rows[sequences] = torch.stack([sums.numerator, sums.size], dim=1)
        rows[sequences] *= math.exp(own - shift)
    gathered = session.world.gather_rows(rows, shard.positions, len(shard.batch))
    numerator, size = gathered.unbind(1)
    return per_decision_ratio(
        objective.normalize, Ratio(numerator=numerator, size=size), shift
    )


def _slopes(
    session: Session,
    along: AlongStep,
    original: Ratio,
    predicted: dict[Baseline, Tensor],
) -> dict[tuple[Score, Baseline, bool], Slope]:
    """The slope by every estimator that applies, from one gather."""
    shard = session.shard("E")
    terms = slope_terms(session, along.scores, original.value, predicted)
    # Control variates are of the policy that samples: not of a reweighted E.
    zero_mean = along.features.zero_mean
    rows = session.world.gather_rows(
        torch.cat([*terms.values(), zero_mean], dim=1),
        shard.positions,
        len(shard.batch),
    )
    *pieces, zero_mean = rows.split(
        [piece.shape[1] for piece in (*terms.values(), zero_mean)], dim=1
    )
    draws, folds = session.draws, session.folds
    slopes = {}
    for estimator, piece in zip(terms, pieces):
        slope = slope_from_terms(piece, original, draws, estimator)
        slopes[*estimator, False] = slope
        if not session.reweights:
            slopes[*estimator, True] = adjusted_slope(slope, original, zero_mean, folds)
    return slopes


def slope_terms(
    session: Session,
    base: DirectionalScores,
    mean_entropy: float,
    predicted: dict[Baseline, Tensor],
) -> dict[tuple[Score, Baseline], Tensor]:
    """`sequence_terms` of this rank's sequences by estimator, [n, 4] each.

    Args:
        base: this rank's tokens of E at theta, with derivatives along any direction.
        mean_entropy: Hbar over the whole batch.
        predicted: sums of the predictions over sequences by baseline, [n, 2].
    """
    shard = session.shard("E")
    objective = session.config.objective
    integrand, normalize = objective.integrand, objective.normalize
    estimators = applicable_estimators(normalize, session.reweights)
    terms = {
        estimator: torch.zeros(len(shard.positions), 4, dtype=torch.float64)
        for estimator in estimators
    }
    direct = [kind for kind in estimators if kind[1] not in predicted]
    for block in shard.blocks():
        tokens = base.at(block.tokens)
        weighting = reweighting(session, block, tokens.logp)
        for score, baseline in direct:
            kind = (integrand, normalize, score, baseline)
            weights = slope_weights(
                tokens, block.ragged, mean_entropy, kind, reweighting=weighting
            )
            terms[score, baseline][block.sequences] = sequence_terms(
                tokens, block.ragged, weights, integrand
            )
    for score, baseline in estimators[len(direct) :]:
        terms[score, baseline] = terms_less_prediction(
            terms[score, "hk"], predicted[baseline], mean_entropy, normalize
        )
    return terms


def _predict(
    session: Session, along: AlongStep, sample_size: int
) -> tuple[dict[Baseline, Tensor], Predictions | None]:
    """What baselines predict of what follows each token; two collectives.

    Returns:
        Sums over each of this rank's sequences of log p' times the predictions (of
        F beta for fitted ones), by baseline, [n, 2]; and the configured baseline's own
        predictions of the tokens of the audits' sample, None for one without.
    """
    world, features = session.world, along.features
    fitted = coefficients_of(
        world.sum(features.moments, "scalars"), len(session.batches["E"])
    )
    totals = world.sum(features.totals, "scalars")
    sample = session.first_sequences(sample_size)
    _, configured = session.config.slope_estimator
    kept = sample.ragged.num_tokens if configured == "loo" else 0
    loo, of_sample = _leave_one_out(session, along, totals, kept)
    fold = _folds(session.shard("E"))
    sums_of: dict[Baseline, Tensor] = {"loo": loo}
    sums_of |= {
        baseline: fitted_part(features.columns, coefficients, fold)
        for baseline, coefficients in fitted.items()
    }
    if configured == "loo":
        return sums_of, Predictions(after_token=of_sample)
    if configured in fitted:
        return sums_of, _of_sample(along, sample, fitted[configured])
    return sums_of, None


def _folds(shard: Shard) -> Tensor:
    """Fold of each of the shard's sequences, [n]."""
    return folds_of(shard.batch.group_order[shard.groups])


def _leave_one_out(
    session: Session, along: AlongStep, totals: Tensor, num_sample_tokens: int
) -> tuple[Tensor, Tensor]:
    """Sums of `loo` over sequences [n, 2], and its predictions of the first tokens."""
    shard = session.shard("E")
    sums = torch.zeros(len(shard.positions), 2, dtype=torch.float64)
    own = torch.zeros(num_sample_tokens, 2, dtype=torch.float64)
    for block in shard.blocks():
        base, ragged = along.scores.at(block.tokens), block.ragged
        values = integrand_tokens(
            session.config.objective.integrand, base.logp, base.entropy
        )
        weighting = reweighting(session, block, base.logp)
        prediction = leave_one_group_out_prediction(
            future_targets(values, ragged, weighting),
            ragged.position,
            ragged.spread(block.shard.groups),
            totals,
        )
        here = block.tokens < num_sample_tokens
        own[block.tokens[here]] = prediction[here]
        score = base.dlogp if weighting is None else weighting.through * base.dlogp
        for column, predicted in enumerate(prediction.T):
            sums[block.sequences, column] = ragged.sum(score * predicted)
    return sums, own


def _of_sample(along: AlongStep, sample: Shard, coefficients: Tensor) -> Predictions:
    """Predictions of a fitted baseline of every token of the sample."""
    count = sample.ragged.num_tokens
    after = torch.zeros(count, 2, dtype=torch.float64)
    of_means = torch.zeros(count, NUM_EMBEDDINGS, 2, dtype=torch.float64)
    for block in sample.blocks():
        # Of a rank without a token of the sample there are no features.
        if not len(block.tokens):
            continue
        scores = along.scores.at(block.tokens)
        kept = along.features.sample.items()
        scores.features = {name: values[block.tokens] for name, values in kept}
        after[block.tokens], of_means[block.tokens] = token_predictions(
            known_before(scores, block.ragged),
            scores.features["embedding"],
            coefficients,
            block.ragged.spread(_folds(block.shard)),
        )
    return Predictions(after_token=after, of_means=of_means)


def estimate_curvature(
    session: Session,
    estimates: EntropyEstimates,
    base: DirectionalScores,
    second_logp: Tensor,
    second_entropy: Tensor,
) -> CurvatureEstimate:
    """H'' along the step from second derivatives.

    Args:
        base: this rank's tokens of E, with derivatives along the step.
        second_logp, second_entropy: second derivatives of l_i and H_i, [N] each.
    """
    first_logp, first_entropy = gather_sums(
        session.world, session.shard("E"), base.dlogp, base.dentropy
    )
    first = SequenceSums(logp=first_logp, entropy=first_entropy)
    second = SequenceSums(logp=second_logp, entropy=second_entropy)
    return curvature(
        estimates.original,
        session.draws,
        dlogp=first_logp,
        d2logp=second_logp,
        dnumerator=_ratio(session, first).numerator,
        d2numerator=_ratio(session, second).numerator,
    )


def slope_elsewhere(
    session: Session, base: TokenScores, there: DirectionalScores, mean_entropy: float
) -> Slope:
    """The slope at other parameters than theta, with the weights that E has there.

    Of the `per_decision` value; of the `snis` value where that is not defined, or the
    configured slope is the derivative of that one.

    Args:
        base: this rank's tokens of E at theta.
        there: the same at the other parameters, with derivatives along the step.
        mean_entropy: Hbar at theta.
    """
    shard, objective = session.shard("E"), session.config.objective
    normalize = objective.normalize
    if objective.integrand == "rb" and session.config.slope_estimator[0] == "to_go":
        sampled = shard.sampling_logprobs if session.reweights else base.logp
        columns = torch.zeros(len(shard.positions), 6, dtype=torch.float64)
        for block in shard.blocks():
            scores = there.at(block.tokens)
            columns[block.sequences] = midpoint_columns(
                scores, scores.logp - sampled[block.tokens], block.ragged, mean_entropy
            )
        rows = session.world.gather_rows(columns, shard.positions, len(shard.batch))
        return midpoint_slope(rows, mean_entropy, normalize, session.draws)
    arrays = (base.logp, there.logp, there.entropy, there.dlogp, there.dentropy)
    before, logp, entropy, dlogp, dentropy = gather_sums(session.world, shard, *arrays)
    derivative = SequenceSums(logp=dlogp, entropy=dentropy)
    return snis_slope(
        logp - before,
        dlogp,
        _ratio(session, SequenceSums(logp=logp, entropy=entropy)),
        _ratio(session, derivative).numerator,
        session.draws,
    )
