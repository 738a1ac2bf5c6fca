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
    cross_fitted_coefficients,
    folds_of,
    future_targets,
    leave_one_group_out_prediction,
    ridge_prediction,
)
from entropy_ddp.estimators.control_variates import adjusted_slope
from entropy_ddp.estimators.curvature import CurvatureEstimate, curvature
from entropy_ddp.estimators.entropy import (
    EntropyChange,
    Ratio,
    all_entropy_changes,
    as_ratio,
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
from entropy_ddp.model.response_tokens import DirectionalScores, TokenScores
from entropy_ddp.probe.features import known_before
from entropy_ddp.probe.passes import AlongStep, gather_sums
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
        slopes: the slope by (score, baseline, control variates).
    """

    original: Ratio
    before: SequenceSums
    after: SequenceSums
    log_weights: Tensor
    changes: dict[ImportanceMode, EntropyChange]
    slopes: dict[tuple[Score, Baseline, bool], Slope]


def estimate(
    session: Session, along: AlongStep, stepped: TokenScores, sample_size: int = 0
) -> tuple[EntropyEstimates, Tensor | None]:
    """Every estimator of truth and prediction from two scoring passes over E.

    Args:
        along: this rank's tokens of E at theta.
        stepped: the same at theta_after.
        sample_size: number of E's first sequences in the audits' sample.

    Returns:
        The estimates, and what the configured baseline predicts of what follows each of
        this rank's tokens of the sample, [s, 2]; None for a baseline without predictions.
    """
    base = along.scores
    sums_of, of_sample = _predict(session, along, sample_size)
    before, after = _sums_of_both(session, base, stepped)
    original = _ratio(session, before)
    estimates = EntropyEstimates(
        original=original,
        before=before,
        after=after,
        log_weights=after.logp - before.logp,
        changes=_changes(session, before, after, base, stepped),
        slopes=_slopes(session, along, original, sums_of),
    )
    return estimates, of_sample


def changes_at(
    session: Session, base: TokenScores, shifted: TokenScores
) -> dict[ImportanceMode, EntropyChange]:
    """Delta H by every mode between two scoring passes over E."""
    before, after = _sums_of_both(session, base, shifted)
    return _changes(session, before, after, base, shifted)


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


def _ratio(session: Session, sums: SequenceSums) -> Ratio:
    """The configured entropy estimator from sequence sums, unweighted."""
    objective = session.config.objective
    values = integrand_tokens(objective.integrand, sums.logp, sums.entropy)
    return as_ratio(objective.normalize, values, session.batches["E"].lengths)


def _changes(
    session: Session,
    before: SequenceSums,
    after: SequenceSums,
    base: TokenScores,
    stepped: TokenScores,
) -> dict[ImportanceMode, EntropyChange]:
    return all_entropy_changes(
        _ratio(session, before),
        _ratio(session, after),
        after.logp - before.logp,
        session.config.truth.clip_c,
        _per_decision(session, session.shard("E"), base, stepped),
        session.batches["E"].groups,
    )


def _per_decision(
    session: Session, shard: Shard, base: TokenScores, stepped: TokenScores
) -> Ratio | None:
    """The per-decision estimator at theta_after; None where it is not defined."""
    objective = session.config.objective
    if objective.integrand != "rb" or objective.normalize == "per_sequence_token_mean":
        return None
    pieces = []
    for block in shard.blocks():
        ratio = stepped.logp[block.tokens] - base.logp[block.tokens]
        weights = prefix_log_weights(block.ragged, ratio)
        # The empty prefix has log w = 0.
        largest = float(weights.max()) if len(weights) else 0.0
        entropy = stepped.entropy[block.tokens]
        sums = prefix_sums(block.ragged, weights, entropy, largest)
        pieces.append((block.sequences, largest, sums))
    # Each block's largest weight was divided out of its sums: now the largest of all.
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
    terms = _terms(session, along.scores, original.value, predicted)
    rows = session.world.gather_rows(
        torch.cat([*terms.values(), along.features.zero_mean], dim=1),
        shard.positions,
        len(shard.batch),
    )
    *pieces, zero_mean = rows.split(
        [piece.shape[1] for piece in (*terms.values(), along.features.zero_mean)], dim=1
    )
    groups = shard.batch.groups
    group_fold = folds_of(shard.batch.group_order)
    slopes = {}
    for estimator, piece in zip(terms, pieces):
        slope = slope_from_terms(piece, original, groups, estimator)
        slopes[*estimator, False] = slope
        slopes[*estimator, True] = adjusted_slope(slope, zero_mean, groups, group_fold)
    return slopes


def _terms(
    session: Session,
    base: DirectionalScores,
    mean_entropy: float,
    predicted: dict[Baseline, Tensor],
) -> dict[tuple[Score, Baseline], Tensor]:
    """`sequence_terms` of this rank's sequences by estimator, [n, 4] each."""
    shard = session.shard("E")
    objective = session.config.objective
    integrand, normalize = objective.integrand, objective.normalize
    estimators = applicable_estimators(normalize)
    terms = {
        estimator: torch.zeros(len(shard.positions), 4, dtype=torch.float64)
        for estimator in estimators
    }
    direct = [kind for kind in estimators if kind[1] not in predicted]
    for block in shard.blocks():
        tokens = base.at(block.tokens)
        for score, baseline in direct:
            kind = (integrand, normalize, score, baseline)
            weights = slope_weights(tokens, block.ragged, mean_entropy, kind)
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
) -> tuple[dict[Baseline, Tensor], Tensor | None]:
    """What `ridge` and `loo` predict of what follows each token; two collectives.

    Returns:
        Sums over each of this rank's sequences of log p' times the predictions, by
        baseline, [n, 2]; and the configured baseline's own predictions of the tokens of
        the audits' sample, [s, 2], None for a baseline without.
    """
    world, features = session.world, along.features
    coefficients = cross_fitted_coefficients(world.sum(features.moments, "scalars"))
    totals = world.sum(features.totals, "scalars")
    sample, configured = session.first_sequences(sample_size), session.config.linear
    kept = sample.ragged.num_tokens if configured.baseline == "loo" else 0
    loo, of_sample = _leave_one_out(session, along, totals, kept)
    if configured.baseline == "ridge":
        of_sample = _ridge_of_sample(along, sample, coefficients)
    fold = _folds(session.shard("E"))
    sums_of: dict[Baseline, Tensor] = {
        "loo": loo,
        "ridge": ridge_prediction(features.known, coefficients, fold),
    }
    return sums_of, of_sample if configured.baseline in sums_of else None


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
        prediction = leave_one_group_out_prediction(
            future_targets(values, ragged),
            ragged.position,
            ragged.spread(block.shard.groups),
            totals,
        )
        here = block.tokens < num_sample_tokens
        own[block.tokens[here]] = prediction[here]
        for column, predicted in enumerate(prediction.T):
            sums[block.sequences, column] = ragged.sum(base.dlogp * predicted)
    return sums, own


def _ridge_of_sample(along: AlongStep, sample: Shard, coefficients: Tensor) -> Tensor:
    """Predictions of the ridge of every token of the sample, [s, 2]."""
    predicted = torch.zeros(sample.ragged.num_tokens, 2, dtype=torch.float64)
    for block in sample.blocks():
        scores = along.scores.at(block.tokens)
        kept = along.features.sample.items()
        scores.features = {name: values[block.tokens] for name, values in kept}
        predicted[block.tokens] = ridge_prediction(
            known_before(scores, block.ragged),
            coefficients,
            block.ragged.spread(_folds(block.shard)),
        )
    return predicted


def estimate_curvature(
    session: Session,
    estimates: EntropyEstimates,
    base: DirectionalScores,
    second_logp: Tensor,
    second_entropy: Tensor,
) -> CurvatureEstimate:
    """H'' along the step.

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
        session.batches["E"].groups,
        dlogp=first_logp,
        d2logp=second_logp,
        dnumerator=_ratio(session, first).numerator,
        d2numerator=_ratio(session, second).numerator,
    )
