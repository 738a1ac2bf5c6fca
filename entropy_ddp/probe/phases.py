"""The passes of a probe, in order, and the per-sequence numbers they leave.

1. gradient of the loss on U: one forward and backward over U;
2. one optimizer step; E scored at theta_after; the step undone;
3. E scored at theta with derivatives along the step.

Between the passes only per-sequence sums travel between ranks: one collective for the
gradient, one for each table of sums.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_ddp.distributed import World
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
from entropy_ddp.policy.parameters import fingerprint
from entropy_ddp.policy.scoring import TokenScores
from entropy_ddp.probe.session import Session
from entropy_ddp.rollouts.batch import Shard
from entropy_ddp.update.loss import loss_weights
from entropy_ddp.update.step import Step, one_step, optimizer_tensors


@dataclass(frozen=True, kw_only=True)
class SequenceSums:
    """Log-probability l_i and entropy H_i of every sequence of a batch, [N] each."""

    logp: Tensor
    entropy: Tensor


def gather_sums(world: World, shard: Shard, *token_arrays: Tensor) -> list[Tensor]:
    """Per-sequence sums [N] of flat token arrays [t], over all ranks in file order."""
    columns = [shard.ragged.sum(values) for values in token_arrays]
    rows = torch.stack(columns, dim=1)
    return list(world.gather_rows(rows, shard.positions, len(shard.batch)).unbind(1))


def loss_gradient(session: Session) -> tuple[Tensor, SequenceSums, TokenScores]:
    """Gradient of the loss on U, summed over ranks, flat, [P]; one collective.

    Returns:
        The gradient, the sums of U's sequences at theta, and this rank's tokens.
    """
    shard = session.shard(session.batches["U"])
    weights = loss_weights(shard, session.config.update)
    with session.phase("gradient of U", shard.ragged.num_tokens):
        gradient, scores = session.passes.gradient(shard, weights, session.buffer_dtype)
        session.world.sum(gradient, "parameter buffers")
        logp, entropy = gather_sums(session.world, shard, scores.logp, scores.entropy)
    return gradient, SequenceSums(logp=logp, entropy=entropy), scores


@dataclass(frozen=True, kw_only=True)
class SteppedScores:
    """What was measured while the step was taken.

    Attributes:
        step: the step.
        scores: this rank's tokens of E at theta_after.
        hashes: fingerprints of parameters and optimizer state: before, after the step
            (parameters only), and after the restore.
    """

    step: Step
    scores: TokenScores
    hashes: tuple[str, str, str]


def score_after_step(session: Session, gradient: Tensor) -> SteppedScores:
    """Take the step, score E at theta_after, undo the step."""
    shard = session.shard(session.batches["E"])
    parameters = session.policy.parameters
    compute = session.config.compute
    cpu = torch.device("cpu") if compute.snapshot_device == "cpu" else None

    def state_hash() -> str:
        state = optimizer_tensors(session.optimizer)
        return fingerprint([*parameters.items(), *state])

    before = state_hash()
    with session.phase("truth: E after the step", shard.ragged.num_tokens):
        with one_step(
            session.optimizer, parameters, gradient, session.config.update, cpu
        ) as step:
            stepped = fingerprint(parameters.items())
            scores = session.passes.score(shard)
        restored = state_hash()
    return SteppedScores(step=step, scores=scores, hashes=(before, stepped, restored))


def score_along_step(session: Session, step: Step) -> TokenScores:
    """This rank's tokens of E at theta, with derivatives along v = delta / eta."""
    shard = session.shard(session.batches["E"])
    direction = session.passes.layout.views(step.direction)
    with session.phase("slope: E along the step", shard.ragged.num_tokens):
        return session.passes.score(shard, direction)


@dataclass(frozen=True, kw_only=True)
class EntropyEstimates:
    """Truth and prediction on E, from all ranks.

    Attributes:
        original: entropy estimator at theta.
        before, after: sums of E's sequences at theta and theta_after.
        log_weights: log w_i, [N].
        changes: Delta H by mode of importance weights.
        slopes: the slope by (score, baseline).
    """

    original: Ratio
    before: SequenceSums
    after: SequenceSums
    log_weights: Tensor
    changes: dict[str, EntropyChange]
    slopes: dict[tuple[Score, Baseline], Slope]


def estimate(
    session: Session, base: TokenScores, stepped: TokenScores
) -> EntropyEstimates:
    """Every estimator of section "Truth" and "First order" from two scoring passes."""
    world, batch = session.world, session.batches["E"]
    objective, shard = session.config.objective, session.shard(batch)
    logp, entropy, logp_after, entropy_after = gather_sums(
        world, shard, base.logp, base.entropy, stepped.logp, stepped.entropy
    )
    original, unweighted_after = (
        as_ratio(
            objective.normalize,
            integrand_tokens(objective.integrand, sequence_logp, sequence_entropy),
            batch.lengths,
        )
        for sequence_logp, sequence_entropy in (
            (logp, entropy),
            (logp_after, entropy_after),
        )
    )
    log_weights = logp_after - logp
    return EntropyEstimates(
        original=original,
        before=SequenceSums(logp=logp, entropy=entropy),
        after=SequenceSums(logp=logp_after, entropy=entropy_after),
        log_weights=log_weights,
        changes=all_entropy_changes(
            original,
            unweighted_after,
            log_weights,
            session.config.truth.clip_c,
            _per_decision(session, shard, base, stepped),
            batch.groups,
        ),
        slopes=_slopes(session, shard, base, original),
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
    session: Session, shard: Shard, base: TokenScores, original: Ratio
) -> dict[tuple[Score, Baseline], Slope]:
    """The slope by every estimator that applies, from one gather."""
    objective = session.config.objective
    tokens = derivatives_of(base)
    estimators = applicable_estimators(objective.normalize)
    terms = []
    for score, baseline in estimators:
        kind = (objective.integrand, objective.normalize, score, baseline)
        weights = slope_weights(tokens, shard.ragged, original.value, kind)
        terms.append(sequence_terms(tokens, shard.ragged, weights, objective.integrand))
    rows = session.world.gather_rows(
        torch.cat(terms, dim=1), shard.positions, len(shard.batch)
    )
    width = rows.shape[1] // len(estimators)
    return {
        estimator: slope_from_terms(piece, original, shard.batch.groups, estimator)
        for estimator, piece in zip(estimators, rows.split(width, dim=1))
    }


def derivatives_of(scores: TokenScores) -> TokenDerivatives:
    """An order-1 score as the estimators take it."""
    assert scores.dlogp is not None and scores.dentropy is not None
    return TokenDerivatives(
        logp=scores.logp,
        entropy=scores.entropy,
        dlogp=scores.dlogp,
        dentropy=scores.dentropy,
    )
