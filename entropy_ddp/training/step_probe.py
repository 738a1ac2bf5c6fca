"""One optimizer step of a training, probed in two halves around it.

Before the step, at theta: E is sampled; E along the step to come (forward mode), grad H
on E (reverse mode), U along the gradient part. After it, at theta': E again for the
truth, and E at the middle of the step for the second order. The step itself is the
trainer's: it is known beforehand from its gradient and optimizer state,

    delta = momentum + decay - gain g

and held against theta' - theta afterwards.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from entropy_ddp.data.batch import Batch
from entropy_ddp.estimators.entropy import Ratio, as_ratio
from entropy_ddp.estimators.linear import Slope
from entropy_ddp.estimators.midpoint import midpoint_columns, midpoint_slope
from entropy_ddp.estimators.shares import TokenTable
from entropy_ddp.model.parameters import global_norm, inner_product, shifted
from entropy_ddp.model.response_tokens import TokenScores
from entropy_ddp.probe.attribution import score_shares, split_step, token_places
from entropy_ddp.probe.estimates import EntropyEstimates, estimate
from entropy_ddp.probe.passes import AlongStep, gather_sums, score_along_step
from entropy_ddp.probe.reverse_mode import Duality, check_duality
from entropy_ddp.probe.session import Session
from entropy_ddp.training.capture import TrainedBatch
from entropy_ddp.training.live_session import sample_evaluation
from entropy_ddp.training.untouched import lookups_cut
from entropy_ddp.update.decomposition import AdamState, change_of, step_parts
from entropy_ddp.update.step import Step


@dataclass(kw_only=True)
class StepProbe:
    """What is known of one step; the second half is None until it was taken.

    Attributes:
        number: number of the step, from 1.
        trained: U, with the weights of its tokens.
        step: the step as it follows from gradient and optimizer state; its learning
            rate is 1, so that slopes are in nats.
        learning_rate: of the first param group.
        grad_norm: norm of the gradient before clipping.
        clip_coefficient: what clipping multiplied it by.
        evaluation: E.
        entropy: the entropy estimator on E at theta.
        along: E at theta, with derivatives along the step.
        duality: forward against reverse mode on all of E, with grad H.
        momentum, decay, gradient: parts of the first-order change, nats.
        table: every token of U with its share in the gradient part.
        logp_gap: largest difference of log p on U from the trainer's.
        estimates: truth and prediction on E.
        midpoint: prediction from the middle of the step; None if not asked for.
        step_gap: how far the trainer's step is from `step`, relative.
    """

    number: int
    trained: TrainedBatch
    step: Step
    learning_rate: float
    grad_norm: float
    clip_coefficient: float
    evaluation: Batch
    entropy: Ratio
    along: AlongStep
    duality: Duality
    momentum: float
    decay: float
    gradient: float
    table: TokenTable
    logp_gap: float
    before: dict[str, Tensor] = field(repr=False)
    estimates: EntropyEstimates | None = None
    midpoint: Slope | None = None
    step_gap: float | None = None


@dataclass(frozen=True, kw_only=True)
class PendingStep:
    """The step that the trainer is about to take.

    Attributes:
        number: its number, from 1.
        trained: U.
        optimizer: AdamW's state before it.
        gradient: the clipped gradient, flat, [P].
        grad_norm: norm of the gradient before clipping.
        clip_coefficient: what clipping multiplied it by.
        padding: rows of embeddings that the trainer's gradient leaves out.
    """

    number: int
    trained: TrainedBatch
    optimizer: AdamState
    gradient: Tensor
    padding: dict[nn.Embedding, int]
    grad_norm: float
    clip_coefficient: float


def probe_before(session: Session, pending: PendingStep) -> StepProbe:
    """The first half: the parameters are at theta.

    Raises:
        InputError: E has no two groups with tokens.
        RunError: a number is not finite.
    """
    # Read for its groups and its state only.
    session.optimizer = pending.optimizer  # type: ignore[assignment]
    step = _coming_step(session, pending)
    evaluation = sample_evaluation(session, pending.number)
    session.batches = {"E": evaluation, "U": pending.trained.batch}
    along = score_along_step(session, step)
    entropy = _entropy(session, along)
    duality = check_duality(
        session, along.scores, entropy.value, step, None, len(evaluation)
    )
    slope = duality.gradient / entropy.denominator
    split = split_step(session, pending.gradient, step, slope)
    gradients = session.passes.layout.views(pending.gradient)
    gradient = -sum(
        inner_product(z.reshape(-1), gradients[name].reshape(-1))
        for name, z in split.direction.items()
    )
    table, logp_gap = _shares(session, pending, split.direction)
    return StepProbe(
        number=pending.number,
        trained=pending.trained,
        step=step,
        learning_rate=float(pending.optimizer.param_groups[0]["lr"]),
        grad_norm=pending.grad_norm,
        clip_coefficient=pending.clip_coefficient,
        evaluation=evaluation,
        entropy=entropy,
        along=along,
        duality=duality,
        momentum=split.momentum,
        decay=split.decay,
        gradient=gradient,
        table=table,
        logp_gap=logp_gap,
        before={n: p.detach().clone() for n, p in session.passes.parameters.items()},
    )


def probe_after(
    session: Session, probe: StepProbe, *, truth: bool, second_order: bool
) -> None:
    """The second half: the parameters are at theta'.

    Raises:
        RunError: a number is not finite.
    """
    shard = session.shard("E")
    probe.step_gap = _step_gap(session, probe)
    stepped: TokenScores = probe.along.scores
    if truth:
        with session.phase("truth: E after the step", shard.ragged.num_tokens):
            stepped = session.passes.score(shard)
    probe.estimates = estimate(session, probe.along, stepped)
    if second_order:
        probe.midpoint = middle_slope(
            session, probe.step, probe.along, probe.entropy.value, place=1.0
        )
    probe.before.clear()


def measured_entropy(session: Session, number: int) -> Ratio:
    """The policy's entropy on fresh responses, as after the last step."""
    evaluation = sample_evaluation(session, number)
    session.batches = {"E": evaluation}
    shard = session.shard("E")
    scores = session.passes.score(shard)
    (sums,) = gather_sums(session.world, shard, scores.entropy)
    return as_ratio("per_token", sums, evaluation.lengths)


def _coming_step(session: Session, pending: PendingStep) -> Step:
    """The step by the parts of AdamW; the gradient is clipped already."""
    layout, gradient = session.passes.layout, pending.gradient
    step = Step(
        delta=torch.zeros_like(gradient),
        learning_rate=1.0,
        grad_norm=pending.grad_norm,
        clip_coef=1.0,
        num_optimizer_steps=1,
    )
    views, gradients = layout.views(step.delta), layout.views(gradient)
    parameters, update = session.passes.parameters, session.config.update
    for name, parts in step_parts(
        pending.optimizer, parameters, gradient, step, update
    ):
        views[name].copy_(change_of(parts, gradients[name]))
    return step


def _entropy(session: Session, along: AlongStep) -> Ratio:
    evaluation = session.batches["E"]
    shard = session.shard("E")
    (sums,) = gather_sums(session.world, shard, along.scores.entropy)
    return as_ratio("per_token", sums, evaluation.lengths)


def _shares(
    session: Session, pending: PendingStep, direction: dict[str, Tensor]
) -> tuple[TokenTable, float]:
    """Shares of U's tokens before clipping, and the largest gap of log p."""
    trained = pending.trained
    shard = session.shard("U")
    on_logp, on_entropy = (
        trained.token_values(shard, name) for name in ("on_logp", "on_entropy")
    )

    def weights(token: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return on_logp[token.cpu()], on_entropy[token.cpu()]

    with lookups_cut(pending.padding):
        table = score_shares(session, weights, direction)
    everything = trained.batch.shard(0, 1)
    theirs = trained.token_values(everything, "logp")
    ours = table.logp[token_places(trained.batch, everything)]
    gaps = (ours - theirs)[theirs.isfinite()].abs()
    return table, float(gaps.max()) if len(gaps) else 0.0


def _step_gap(session: Session, probe: StepProbe) -> float:
    """||(theta' - theta) - delta|| / ||delta||, less what rounding of theta' can make."""
    layout, parameters = session.passes.layout, session.passes.parameters
    taken = torch.zeros_like(probe.step.delta)
    rounding = 0.0
    for name, view in layout.views(taken).items():
        after = parameters[name].detach()
        view.copy_(after.double() - probe.before[name].double())
        # Decay and step are rounded one after the other, each to half a unit.
        unit = torch.finfo(after.dtype).eps * global_norm(after)
        rounding = math.hypot(rounding, unit)
    size = global_norm(probe.step.delta)
    gap = max(0.0, global_norm(taken - probe.step.delta) - rounding)
    return gap / size if size else gap


def middle_slope(
    session: Session, step: Step, along: AlongStep, mean_entropy: float, place: float
) -> Slope:
    """Delta H by the slope at theta + delta / 2.

    Args:
        session: the run.
        step: the step, of learning rate 1.
        along: E at theta.
        mean_entropy: the entropy on E at theta.
        place: where the parameters are: 0 at theta, 1 at theta'.
    """
    passes, shard = session.passes, session.shard("E")
    direction = step.direction(passes.parameters)
    with (
        session.phase("second order: E at the middle", shard.ragged.num_tokens),
        shifted(passes.parameters, direction, 0.5 - place),
    ):
        scores = passes.score(shard, direction)
    columns = torch.zeros(len(shard.positions), 6, dtype=torch.float64)
    for block in shard.blocks():
        there = scores.at(block.tokens)
        ratio = there.logp - along.scores.logp[block.tokens]
        columns[block.sequences] = midpoint_columns(
            there, ratio, block.ragged, mean_entropy
        )
    rows = session.world.gather_rows(columns, shard.positions, len(shard.batch))
    return midpoint_slope(rows, mean_entropy, shard.batch.groups)
