"""From the passes' token arrays to every estimate: what ranks exchange, and when.

Each rank reduces its own tokens to sums per sequence; the tables of sums are gathered, and
every rank computes the same estimates from them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_ddp.config import ImportanceMode, Integrand
from entropy_ddp.distributed import World
from entropy_ddp.estimators.baselines import (
    cross_fitted_coefficients,
    fold_moments,
    folds_of,
    future_targets,
    leave_one_group_out_prediction,
    position_totals,
    predictors,
    ridge_prediction,
)
from entropy_ddp.estimators.control_variates import adjusted_slope, zero_mean_sums
from entropy_ddp.estimators.curvature import Curvature, SecondOrder, curvature
from entropy_ddp.estimators.entropy import (
    EntropyChange,
    PrefixSums,
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
    TokenDerivatives,
    applicable_estimators,
    sequence_terms,
    slope_from_terms,
    slope_weights,
)
from entropy_ddp.policy.scores import DirectionalScores, TokenScores
from entropy_ddp.probe.phases import SequenceSums, gather_sums
from entropy_ddp.probe.session import Session
from entropy_ddp.rollouts.batch import Shard


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
    session: Session, base: DirectionalScores, stepped: TokenScores
) -> EntropyEstimates:
    """Every estimator of truth and prediction from two scoring passes over E."""
    shard = session.shard(session.batches["E"])
    before, after = _sums_of_both(session, base, stepped)
    original = _ratio(session, before)
    return EntropyEstimates(
        original=original,
        before=before,
        after=after,
        log_weights=after.logp - before.logp,
        changes=_changes(session, (before, after), (base, stepped)),
        slopes=_slopes(session, shard, base, original),
    )


def changes_at(
    session: Session, base: TokenScores, shifted: TokenScores
) -> dict[ImportanceMode, EntropyChange]:
    """Delta H by every mode between two scoring passes over E."""
    sums = _sums_of_both(session, base, shifted)
    return _changes(session, sums, (base, shifted))


def _sums_of_both(
    session: Session, base: TokenScores, stepped: TokenScores
) -> tuple[SequenceSums, SequenceSums]:
    """Sums of E's sequences at theta and elsewhere, all ranks'; one collective."""
    logp, entropy, logp_after, entropy_after = gather_sums(
        session.world,
        session.shard(session.batches["E"]),
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
    sums: tuple[SequenceSums, SequenceSums],
    scores: tuple[TokenScores, TokenScores],
) -> dict[ImportanceMode, EntropyChange]:
    before, after = sums
    batch = session.batches["E"]
    return all_entropy_changes(
        _ratio(session, before),
        _ratio(session, after),
        after.logp - before.logp,
        session.config.truth.clip_c,
        _per_decision(session, session.shard(batch), *scores),
        batch.groups,
    )


def _per_decision(
    session: Session, shard: Shard, base: TokenScores, stepped: TokenScores
) -> Ratio | None:
    """The per-decision estimator at theta_after; None where it is not defined."""
    objective = session.config.objective
    if objective.integrand != "rb" or objective.normalize == "per_sequence_token_mean":
        return None
    weights = prefix_log_weights(shard.ragged, stepped.logp - base.logp)
    largest = float(weights.max()) if len(weights) else -torch.inf
    shift = session.world.max(largest)
    sums = prefix_sums(shard.ragged, weights, stepped.entropy, shift)
    rows = torch.stack([sums.entropy, sums.steps], dim=1)
    gathered = session.world.gather_rows(rows, shard.positions, len(shard.batch))
    entropy, steps = gathered.unbind(1)
    return per_decision_ratio(
        objective.normalize, PrefixSums(entropy=entropy, steps=steps), shift
    )


def _slopes(
    session: Session, shard: Shard, base: DirectionalScores, original: Ratio
) -> dict[tuple[Score, Baseline, bool], Slope]:
    """The slope by every estimator that applies, from one gather."""
    objective, ragged = session.config.objective, shard.ragged
    tokens = derivatives_of(base)
    known = predictors(base.entropy, base.features, ragged)
    estimators = applicable_estimators(objective.normalize)
    predictions = baseline_predictions(session.world, shard, base, objective.integrand)
    columns = []
    for score, baseline in estimators:
        kind = (objective.integrand, objective.normalize, score, baseline)
        weights = slope_weights(
            tokens, ragged, original.value, kind, predictions.get(baseline)
        )
        columns.append(sequence_terms(tokens, ragged, weights, objective.integrand))
    width = columns[0].shape[1]
    columns.append(zero_mean_sums(tokens, base.features, known, ragged))
    rows = session.world.gather_rows(
        torch.cat(columns, dim=1), shard.positions, len(shard.batch)
    )
    terms, zero_mean = rows.tensor_split([width * len(estimators)], dim=1)
    groups = shard.batch.groups
    group_fold = folds_of(shard.batch.group_order)
    slopes = {}
    for estimator, piece in zip(estimators, terms.split(width, dim=1)):
        slope = slope_from_terms(piece, original, groups, estimator)
        slopes[*estimator, False] = slope
        slopes[*estimator, True] = adjusted_slope(slope, zero_mean, groups, group_fold)
    return slopes


def baseline_predictions(
    world: World, shard: Shard, base: DirectionalScores, integrand: Integrand
) -> dict[Baseline, Tensor]:
    """Predictions of what follows each token, [t, 2], by baseline; two collectives."""
    ragged, batch = shard.ragged, shard.batch
    values = integrand_tokens(integrand, base.logp, base.entropy)
    target = future_targets(values, ragged)
    known = torch.cat(
        [
            predictors(base.entropy, base.features, ragged),
            base.features["hidden"].double(),
        ],
        dim=1,
    )
    group = ragged.spread(batch.groups[shard.positions])
    fold = folds_of(batch.group_order[group])
    moments = fold_moments(known, target, base.dlogp.square(), fold)
    coefficients = cross_fitted_coefficients(world.sum(moments, "scalars"))
    totals = position_totals(target, ragged.position, int(batch.lengths.max()))
    world.sum(totals, "scalars")
    return {
        "ridge": ridge_prediction(known, coefficients, fold),
        "loo": leave_one_group_out_prediction(target, ragged.position, group, totals),
    }


def derivatives_of(scores: DirectionalScores) -> TokenDerivatives:
    """An order-1 score as the estimators take it."""
    return TokenDerivatives(
        logp=scores.logp,
        entropy=scores.entropy,
        dlogp=scores.dlogp,
        dentropy=scores.dentropy,
    )


def estimate_curvature(
    session: Session,
    estimates: EntropyEstimates,
    base: DirectionalScores,
    second: tuple[Tensor, Tensor],
) -> Curvature:
    """H'' along the step from the base pass and the second derivatives of l_i and H_i."""
    batch = session.batches["E"]
    shard = session.shard(batch)
    first = gather_sums(session.world, shard, base.dlogp, base.dentropy)
    numerators = [
        _ratio(session, SequenceSums(logp=logp, entropy=entropy)).numerator
        for logp, entropy in (first, second)
    ]
    derivatives = SecondOrder(
        dlogp=first[0],
        d2logp=second[0],
        dnumerator=numerators[0],
        d2numerator=numerators[1],
    )
    return curvature(derivatives, estimates.original, batch.groups)
