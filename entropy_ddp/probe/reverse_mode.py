"""The slope again by reverse mode, and E scored again: what audits need passes for.

In a probe they run on the first sequences of E (`audit_sample`), the same at every world
size, and share one backward pass: it gives the gradient, and log p and H once more. The
`audit` command runs them on all of E, and an attribution the first of them, whose
gradient it needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entropy_ddp.data.batch import Batch, Block, Shard
from entropy_ddp.estimators.entropy import (
    Ratio,
    as_ratio,
    integrand_tokens,
    reweighted,
)
from entropy_ddp.estimators.linear import (
    Slope,
    SlopeWeights,
    centred_part,
    sequence_terms,
    slope_from_terms,
    slope_weights,
    terms_less_prediction,
)
from entropy_ddp.estimators.standard_errors import Draws, relative_difference
from entropy_ddp.model.response_tokens import DirectionalScores, TokenWeights
from entropy_ddp.model.scoring import Passes
from entropy_ddp.probe.estimates import Predictions
from entropy_ddp.probe.passes import gather_sums, reweighting, summed_gradient
from entropy_ddp.probe.resume import PassResult
from entropy_ddp.probe.session import Session
from entropy_ddp.update.step import Step, one_step

# The audits' sample has few tokens, whatever the size of E and of its sequences: their
# cost is that of a few microbatches. Enough for every layer, expert and kernel to be in
# it, and never fewer than the least number of sequences.
SAMPLE_SEQUENCES, SAMPLE_TOKENS = 64, 1024
LEAST_SEQUENCES = 4
# What of E they are on: a sample; all of it where the gradient of its entropy is needed,
# with the noise floor of a sample; everything.
Audited = Literal["sample", "gradient", "everything"]
# Gives the gradient of sum(a log p + b H) over a shard and all ranks, flat, [P].
GradientOf = Callable[[Shard, TokenWeights], Tensor]


def audit_sample(batch: Batch) -> int:
    """How many of the first sequences of E the audits with a pass of their own are on.

    As many as have at most `SAMPLE_TOKENS` tokens together, prompts included, but at
    least `LEAST_SEQUENCES` and at most `SAMPLE_SEQUENCES`.
    """
    lengths = (batch.prompt_lengths + batch.lengths)[:SAMPLE_SEQUENCES]
    within = int((lengths.cumsum(0) <= SAMPLE_TOKENS).sum())
    return min(len(lengths), max(within, LEAST_SEQUENCES))


@dataclass(frozen=True, kw_only=True)
class Duality:
    """Forward against reverse mode on a sample of E.

    Attributes:
        gap: relative difference of the two slopes.
        gradient: gradient of the entropy estimator on the sample, times its
            denominator, flat, [P].
        denominator: denominator of the estimator on the sample.
        num_sequences: size of the sample.
        noise_floor: what rounding makes of Delta H of the sample, from the scores of the
            backward pass in other microbatches than the pass along the step; None if it
            ran in the same.
    """

    gap: float
    gradient: Tensor
    denominator: float
    num_sequences: int
    noise_floor: float | None


def check_duality(
    session: Session,
    base: DirectionalScores,
    mean_entropy: float,
    step: Step,
    predictions: Predictions | None,
    features: dict[str, Tensor],
    size: int,
    *,
    cut_otherwise: bool = False,
    gradient_of: GradientOf | None = None,
) -> Duality:
    """<grad, v> from a backward pass against the slope from the forward-mode pass.

    The weights c and the pathwise weights are shared; both slopes are of the sample's
    terms with the whole batch's mean entropy and denominator left out.

    Args:
        base: this rank's tokens of E, with derivatives along v.
        mean_entropy: Hbar over all of E.
        step: the step along v.
        predictions: the configured baseline's predictions of the sample's tokens; None
            for a baseline without.
        features: what was kept of the sample's tokens, by name, [s] each.
        size: number of sequences in the sample.
        cut_otherwise: run the backward pass in other microbatches, for the noise floor.
        gradient_of: gives the gradient in its own passes; None for one backward pass.
    """
    objective = session.config.objective
    sample = session.first_sequences(size)
    weights, terms = _configured_weights(
        session, base, mean_entropy, sample, predictions, features
    )
    gathered = session.world.gather_rows(terms, sample.positions, len(sample.batch))
    centred, score, pathwise, counts = gathered.sum(0).tolist()

    def pull_back() -> PassResult:
        passes = _otherwise(session) if cut_otherwise else session.passes
        flat, scores = summed_gradient(session, passes, sample, weights)
        tokens = scores.arrays() if cut_otherwise else {}
        return PassResult(tokens=tokens, vectors={"gradient": flat})

    if gradient_of is None:
        found = session.pass_over(sample, "audit: reverse mode", pull_back)
        gradient = found.vectors["gradient"]
    else:
        assert not cut_otherwise
        found, gradient = PassResult(), gradient_of(sample, weights)
    product = session.passes.inner_product(gradient, step.delta)
    reverse = product / step.learning_rate
    scale = max(map(abs, (centred, score, pathwise, mean_entropy * counts)))
    return Duality(
        gap=relative_difference(reverse, centred, scale),
        gradient=gradient,
        denominator=as_ratio(
            objective.normalize,
            torch.zeros(len(sample.batch), dtype=torch.float64),
            sample.batch.lengths,
        ).denominator,
        num_sequences=len(sample.batch),
        noise_floor=_change_of_rounding(session, base, sample, found.tokens)
        if cut_otherwise
        else None,
    )


def other_budget(session: Session) -> int:
    """Tokens of a microbatch where it is to be another than in the other passes."""
    return max(1, session.passes.fill // 5)


def _otherwise(session: Session) -> Passes:
    """The passes in smaller microbatches, of one sequence a row."""
    return session.passes.with_settings(
        tokens_per_microbatch=other_budget(session), share_prompts=False
    )


def _configured_weights(
    session: Session,
    base: DirectionalScores,
    mean_entropy: float,
    sample: Shard,
    predictions: Predictions | None,
    features: dict[str, Tensor],
) -> tuple[TokenWeights, Tensor]:
    """Weights of the configured slope's surrogate, and the terms they make [n, 4]."""
    objective = session.config.objective
    on_logp, on_entropy = torch.zeros(2, sample.ragged.num_tokens, dtype=torch.float64)
    of_means = None
    if predictions is not None and predictions.of_means is not None:
        of_means = centred_part(predictions.of_means, mean_entropy, objective.normalize)
    terms = torch.zeros(len(sample.positions), 4, dtype=torch.float64)
    surprisal = objective.integrand == "surprisal"
    for block in sample.blocks():
        # The sample's tokens are the first of E's.
        here = block.tokens
        tokens = base.at(here)
        tokens.features = {name: values[here] for name, values in features.items()}
        weights, terms[block.sequences] = _block_terms(
            session, block, tokens, mean_entropy, predictions
        )
        weighting = reweighting(session, block, tokens.logp)
        if of_means is not None and weighting is not None:
            of_means[here] *= weighting.before[:, None]
        through_logp = weights.pathwise if surprisal else 0.0
        on_logp[here] = weights.centred - through_logp
        on_entropy[here] = 0.0 if surprisal else weights.pathwise

    def surrogate(token: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        place = token.cpu()
        found = (on_logp[place], on_entropy[place])
        return found if of_means is None else (*found, of_means[place])

    return surrogate, terms


def _block_terms(
    session: Session,
    block: Block,
    tokens: DirectionalScores,
    mean_entropy: float,
    predictions: Predictions | None,
) -> tuple[SlopeWeights, Tensor]:
    """Weights of the configured slope, and the terms they make of a block, [n, 4].

    Args:
        tokens: the block's, with derivatives along any direction; with the feature
            `dembedding` along it for a baseline that knows the token.
        mean_entropy: Hbar over all of E.
        predictions: of the tokens that the block's places are of.
    """
    objective, ragged = session.config.objective, block.ragged
    integrand, normalize = objective.integrand, objective.normalize
    kind = (integrand, normalize, *session.config.slope_estimator)
    weighting = reweighting(session, block, tokens.logp)
    after = None if predictions is None else predictions.after_token[block.tokens]
    weights = slope_weights(tokens, ragged, mean_entropy, kind, after, weighting)
    terms = sequence_terms(tokens, ragged, weights, integrand)
    # A block without a token has no features.
    if predictions is None or predictions.of_means is None or not ragged.num_tokens:
        return weights, terms
    of_means = predictions.of_means[block.tokens]
    values, steps = (
        (tokens.features["dembedding"] * of_means[:, :, c]).sum(1) for c in (0, 1)
    )
    if weighting is not None:
        values, steps = values * weighting.before, steps * weighting.before
    columns = torch.stack([ragged.sum(values), ragged.sum(steps)], dim=1)
    # A prediction of which the mean is put back: what is less is more.
    return weights, terms_less_prediction(terms, -columns, mean_entropy, normalize)


def slope_along(
    session: Session,
    direction: dict[str, Tensor],
    name: str,
    original: Ratio,
    predictions: Predictions | None,
) -> Slope:
    """The configured slope along another direction than the step, weights and all.

    Its weights are those of the slope along the step, predictions included, so that the
    slopes along parts of a direction sum to that along the whole. One forward-mode pass.

    Args:
        direction: tangent of each trainable parameter by name.
        name: of the phase.
        original: the entropy estimator at theta.
        predictions: the configured baseline's predictions of all tokens of E; None for
            a baseline without.
    """
    shard, passes = session.shard("E"), session.passes
    knows_token = predictions is not None and predictions.of_means is not None

    def score_blocks() -> PassResult:
        terms = torch.zeros(len(shard.positions), 4, dtype=torch.float64)
        for block in passes.blocks(shard):
            tokens = passes.score(block.shard, direction, with_features=knows_token)
            _, terms[block.sequences] = _block_terms(
                session, block, tokens, original.value, predictions
            )
        return PassResult(sequences={"terms": terms})

    found = session.pass_over(shard, name, score_blocks)
    rows = session.world.gather_rows(
        found.sequences["terms"], shard.positions, len(shard.batch)
    )
    estimator = session.config.slope_estimator
    return slope_from_terms(rows, original, session.draws, estimator)


def learning_rate_ratios(
    session: Session, gradient: Tensor, step: Step, slope_gradient: Tensor
) -> tuple[float, float]:
    """Norm of the change and <grad H, change> at lr, each over the same at lr / 10."""
    with one_step(
        session.optimizer,
        session.policy.parameters,
        gradient,
        session.config.update,
        session.snapshot_device,
        rate_scale=0.1,
        totals=session.passes.layers.totals,
    ) as smaller:
        delta = smaller.delta
    norm, product = session.passes.norm, session.passes.inner_product
    pairs = (
        (norm(step.delta), norm(delta)),
        (product(slope_gradient, step.delta), product(slope_gradient, delta)),
    )
    ratios = [large / small if small else 0.0 for large, small in pairs]
    return ratios[0], ratios[1]


def measure_noise_floor(session: Session, base: DirectionalScores) -> float:
    """What rounding makes of Delta H of the audits' sample: it is only scored again.

    The number is of the sample's size: that of all of E is smaller, as the rounding of
    sequences is independent.
    """
    sample = session.first_sequences(audit_sample(session.batches["E"]))

    def score() -> PassResult:
        return PassResult(tokens=_otherwise(session).score(sample).arrays())

    again = session.pass_over(sample, "audit: noise floor", score).tokens
    return _change_of_rounding(session, base, sample, again)


def _change_of_rounding(
    session: Session,
    base: DirectionalScores,
    sample: Shard,
    rescored: dict[str, Tensor],
) -> float:
    """|Delta H| of a sample from its scores to what the same model gave once more.

    Importance weights and all: their logarithms are pure rounding. Sequences round
    independently, and can cancel by luck: it is at least the standard error that they
    give it.
    """
    objective = session.config.objective
    scores = base.first(sample.ragged.num_tokens)
    arrays = (scores.logp, scores.entropy, rescored["logp"], rescored["entropy"])
    sums = gather_sums(session.world, sample, *arrays)
    before, after = (
        as_ratio(
            objective.normalize,
            integrand_tokens(objective.integrand, logp, entropy),
            sample.batch.lengths,
        )
        for logp, entropy in (sums[:2], sums[2:])
    )
    again = reweighted(after, sums[2] - sums[0])
    each = Draws(groups=torch.arange(len(sample.batch)))
    change = again.estimate(each).minus(before.estimate(each))
    return max(abs(change.value), change.se)
