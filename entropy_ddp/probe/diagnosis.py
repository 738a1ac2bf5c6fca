"""The audits that need a pass of their own: forward against reverse mode, noise floor.

In a probe they run on the first sequences of E, at most `SAMPLE_SEQUENCES` of them, the
same at every world size; the `audit` command runs them on all of E.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_ddp.estimators.entropy import as_ratio, integrand_tokens, reweighted
from entropy_ddp.estimators.errors import relative_difference
from entropy_ddp.estimators.linear import SlopeWeights, sequence_terms, slope_weights
from entropy_ddp.policy.parameters import global_norm, inner_product
from entropy_ddp.policy.scores import DirectionalScores
from entropy_ddp.probe.estimation import baseline_predictions, derivatives_of
from entropy_ddp.probe.phases import gather_sums, snapshot_device
from entropy_ddp.probe.session import Session
from entropy_ddp.rollouts.batch import Batch, Shard
from entropy_ddp.update.step import Step, one_step

SAMPLE_SEQUENCES = 64


@dataclass(frozen=True, kw_only=True)
class Duality:
    """Forward against reverse mode on a sample of E.

    Attributes:
        gap: relative difference of the two slopes.
        gradient: gradient of the entropy estimator on the sample, times its
            denominator, flat, [P].
        denominator: denominator of the estimator on the sample.
        num_sequences: size of the sample.
    """

    gap: float
    gradient: Tensor
    denominator: float
    num_sequences: int


def check_duality(
    session: Session,
    base: DirectionalScores,
    mean_entropy: float,
    direction: Tensor,
    size: int = SAMPLE_SEQUENCES,
) -> Duality:
    """<grad, v> from a backward pass against the slope from the forward-mode pass.

    The weights c and the pathwise weights are shared; both slopes are of the sample's
    terms with the whole batch's mean entropy and denominator left out.
    """
    integrand = session.config.objective.integrand
    sample, shard, here = _sample(session, size)
    tokens, ragged = derivatives_of(_select(base, here)), shard.ragged
    weights = _configured_weights(session, base, mean_entropy, (shard, here))
    terms = sequence_terms(tokens, ragged, weights, integrand)
    gathered = session.world.gather_rows(terms, shard.positions, len(sample))
    centred, score, pathwise, counts = gathered.sum(0).tolist()
    on_logp, on_entropy = weights.centred, weights.pathwise
    if integrand == "surprisal":
        on_logp = on_logp - weights.pathwise
        on_entropy = torch.zeros_like(weights.pathwise)
    with session.phase("audit: reverse mode", ragged.num_tokens):
        gradient, _ = session.passes.gradient(
            shard,
            lambda token, *_: (on_logp[token.cpu()], on_entropy[token.cpu()]),
            session.buffer_dtype,
        )
        session.world.sum(gradient, "parameter buffers")
    reverse = inner_product(gradient, direction)
    scale = max(map(abs, (centred, score, pathwise, mean_entropy * counts)))
    return Duality(
        gap=relative_difference(reverse, centred, scale),
        gradient=gradient,
        denominator=as_ratio(
            session.config.objective.normalize,
            torch.zeros(len(sample), dtype=torch.float64),
            sample.lengths,
        ).denominator,
        num_sequences=len(sample),
    )


def _configured_weights(
    session: Session,
    base: DirectionalScores,
    mean_entropy: float,
    sample: tuple[Shard, Tensor],
) -> SlopeWeights:
    """Weights of the configured slope for the sample's tokens.

    Args:
        session: the run.
        base: this rank's tokens of E.
        mean_entropy: Hbar over all of E.
        sample: this rank's share of the sample, and where its tokens lie in E's arrays.
    """
    (shard, here), linear = sample, session.config.linear
    objective = session.config.objective
    prediction = None
    if linear.baseline in ("loo", "ridge"):
        whole = session.shard(session.batches["E"])
        predictions = baseline_predictions(
            session.world, whole, base, objective.integrand
        )
        prediction = predictions[linear.baseline][here]
    return slope_weights(
        derivatives_of(_select(base, here)),
        shard.ragged,
        mean_entropy,
        (objective.integrand, objective.normalize, linear.score, linear.baseline),
        prediction,
    )


def learning_rate_ratios(
    session: Session, gradient: Tensor, step: Step, slope_gradient: Tensor
) -> tuple[float, float]:
    """Norm of the change and <grad H, change> at lr, each over the same at lr / 10."""
    with one_step(
        session.optimizer,
        session.policy.parameters,
        gradient,
        session.config.update,
        snapshot_device(session.config.compute),
        rate_scale=0.1,
    ) as smaller:
        delta = smaller.delta
    pairs = (
        (global_norm(step.delta), global_norm(delta)),
        (
            inner_product(slope_gradient, step.delta),
            inner_product(slope_gradient, delta),
        ),
    )
    ratios = [large / small if small else 0.0 for large, small in pairs]
    return ratios[0], ratios[1]


def measure_noise_floor(
    session: Session, base: DirectionalScores, size: int = SAMPLE_SEQUENCES
) -> float:
    """|Delta H| of the sample when it is only scored again, in other microbatches.

    Importance weights and all: their logarithms are pure rounding then.

    The number is of the sample's size: that of all of E is smaller, as the rounding of
    sequences is independent.
    """
    sample, shard, here = _sample(session, size)
    objective = session.config.objective
    with session.phase("audit: noise floor", shard.ragged.num_tokens):
        budget = max(1, session.config.compute.tokens_per_microbatch // 5)
        passes = session.passes.with_settings(
            tokens_per_microbatch=budget, share_prompts=False
        )
        again = passes.score(shard)
    scores = _select(base, here)
    sums = gather_sums(
        session.world, shard, scores.logp, scores.entropy, again.logp, again.entropy
    )
    before, after = (
        as_ratio(
            objective.normalize,
            integrand_tokens(objective.integrand, logp, entropy),
            sample.lengths,
        )
        for logp, entropy in (sums[:2], sums[2:])
    )
    return abs(reweighted(after, sums[2] - sums[0]).value - before.value)


def _sample(session: Session, size: int) -> tuple[Batch, Shard, Tensor]:
    """The sample, this rank's share of it, and where its tokens lie in E's arrays."""
    shard = session.shard(session.batches["E"])
    sample = session.batches["E"].first(size)
    here = shard.positions < len(sample)
    return (
        sample,
        Shard(batch=sample, positions=shard.positions[here]),
        shard.ragged.spread(here),
    )


def _select(scores: DirectionalScores, here: Tensor) -> DirectionalScores:
    names = ("logp", "entropy", "dlogp", "dentropy")
    return DirectionalScores(**{name: getattr(scores, name)[here] for name in names})
