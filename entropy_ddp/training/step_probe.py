"""One optimizer step of a training, probed in two halves around it.

Before the step, at theta: E is sampled; E along the step to come (forward mode), grad H
on E (reverse mode), U along the gradient part. After it, at theta': E again for the
truth, and E at the middle of the step for the second order. The step itself is the
trainer's: it is known beforehand from its gradient and optimizer state,

    delta = momentum + decay - gain g

and held against theta' - theta afterwards.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from entropy_ddp.estimators.entropy import Ratio, as_ratio
from entropy_ddp.estimators.linear import Slope
from entropy_ddp.estimators.shares import TokenTable
from entropy_ddp.model.parameters import global_norm, inner_product
from entropy_ddp.model.response_tokens import TokenScores
from entropy_ddp.probe.attribution import score_shares, split_step, token_places
from entropy_ddp.probe.estimates import EntropyEstimates, estimate, slope_elsewhere
from entropy_ddp.probe.passes import (
    AlongStep,
    gather_sums,
    score,
    score_along_step,
    score_in_the_middle,
)
from entropy_ddp.probe.reverse_mode import check_duality
from entropy_ddp.probe.session import Session
from entropy_ddp.training.capture import TrainedBatch
from entropy_ddp.training.live_session import sample_evaluation
from entropy_ddp.training.untouched import lookups_cut
from entropy_ddp.update.decomposition import AdamState, step_parts
from entropy_ddp.update.step import Step


@dataclass(kw_only=True)
class StepProbe:
    """What is known of one step; the second half is None until it was taken.

    E and U are the session's batches.

    Attributes:
        number: number of the step, from 1.
        step: the step as it follows from gradient and optimizer state; its learning
            rate is 1, so that slopes are in nats.
        learning_rate: of the first param group.
        clip_coefficient: what clipping multiplied the gradient by.
        along: E at theta, with derivatives along the step.
        duality_gap: forward against reverse mode on all of E.
        parts: {momentum, decay, gradient} of the first-order change, nats.
        table: every token of U with its share in the gradient part, before clipping.
        floor_change: what the weights of a floor changed of the gradient's part, before
            clipping, nats; None where there were none.
        logp_gap: largest difference of log p on U from the trainer's.
        before: theta, by parameter name.
        estimates: truth and prediction on E.
        midpoint: prediction from the middle of the step; None if not asked for.
        step_gap: how far the trainer's step is from `step`, relative.
    """

    number: int
    step: Step
    learning_rate: float
    clip_coefficient: float
    along: AlongStep
    duality_gap: float
    parts: dict[str, float]
    table: TokenTable
    floor_change: float | None
    logp_gap: float
    before: dict[str, Tensor] = field(repr=False)
    estimates: EntropyEstimates | None = None
    midpoint: Slope | None = None
    step_gap: float | None = None


def probe_before(
    session: Session,
    *,
    number: int,
    trained: TrainedBatch,
    optimizer: AdamState,
    gradient: Tensor,
    grad_norm: float,
    clip_coefficient: float,
    padding: dict[nn.Embedding, int],
    floor_weights: Tensor | None = None,
) -> StepProbe:
    """The first half: the parameters are at theta.

    Args:
        number: number of the step that the trainer is about to take, from 1.
        trained: U.
        optimizer: AdamW's state before the step.
        gradient: the clipped gradient, flat, [P].
        grad_norm: norm of the gradient before clipping.
        clip_coefficient: what clipping multiplied it by.
        padding: rows of embeddings that the trainer's gradient leaves out.
        floor_weights: by what a floor has multiplied the term of each token of U in the
            gradient since the trainer's backward pass, [T]; None for nothing.

    Raises:
        InputError: E has no two groups with tokens.
        RunError: a number is not finite.
    """
    # Read for its groups and its state only.
    session.optimizer = optimizer  # type: ignore[assignment]
    step = coming_step(session, optimizer, gradient, grad_norm)
    evaluation = sample_evaluation(session, number)
    session.batches = {"E": evaluation, "U": trained.batch}
    along = score_along_step(session, step)
    entropy = _entropy(session, along.scores)
    duality = check_duality(
        session, along.scores, entropy.value, step, None, {}, len(evaluation)
    )
    slope = duality.gradient / entropy.denominator
    parts, direction = split_by_part(session, gradient, step, slope)
    table, logp_gap = _shares(session, trained, padding, direction)
    floor_change = None
    if floor_weights is not None:
        weighted = floor_weights * table.share
        floor_change = float((weighted - table.share).sum())
        table = replace(table, share=weighted)
    return StepProbe(
        number=number,
        step=step,
        learning_rate=float(optimizer.param_groups[0]["lr"]),
        clip_coefficient=clip_coefficient,
        along=along,
        duality_gap=duality.gap,
        parts=parts,
        table=table,
        floor_change=floor_change,
        logp_gap=logp_gap,
        before={n: p.detach().clone() for n, p in session.passes.parameters.items()},
    )


def flat_gradient(session: Session) -> Tensor:
    """The gradients as one flat CPU buffer, zero where there is none, [P]."""
    layout = session.passes.layout
    flat = torch.zeros(layout.numel, dtype=session.buffer_dtype)
    for name, view in layout.views(flat).items():
        gradient = session.passes.parameters[name].grad
        if gradient is not None:
            view.copy_(gradient)
    return flat


def split_by_part(
    session: Session, gradient: Tensor, step: Step, slope: Tensor
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """{momentum, decay, gradient} of the first-order change in nats, and z by name.

    Args:
        gradient: the gradient that the step was made of, flat, [P].
        slope: grad H on all of E, flat, [P].
    """
    split = split_step(session, gradient, step, slope)
    gradients = session.passes.layout.views(gradient)
    # The step descends: its gradient part is -gain g.
    of_gradient = -sum(
        inner_product(z, gradients[name]) for name, z in split.direction.items()
    )
    parts = {
        "momentum": split.momentum,
        "decay": split.decay,
        "gradient": of_gradient,
    }
    return parts, split.direction


def probe_after(
    session: Session, probe: StepProbe, *, truth: bool, second_order: bool
) -> None:
    """The second half: the parameters are at theta'.

    Raises:
        RunError: a number is not finite.
    """
    probe.step_gap = _step_gap(session, probe)
    stepped: TokenScores = probe.along.scores
    if truth:
        stepped = score(session, session.shard("E"), "truth: E after the step")
    eta = probe.step.learning_rate
    probe.estimates, _ = estimate(session, eta, probe.along, stepped)
    if second_order:
        there = score_in_the_middle(session, probe.step, place=1.0)
        mean = probe.estimates.original.value
        probe.midpoint = slope_elsewhere(session, probe.along.scores, there, mean)
    probe.before.clear()


def measured_entropy(session: Session, number: int) -> Ratio:
    """The policy's entropy on fresh responses, as after the last step."""
    evaluation = sample_evaluation(session, number)
    session.batches = {"E": evaluation}
    return _entropy(session, session.passes.score(session.shard("E")))


def _entropy(session: Session, scores: TokenScores) -> Ratio:
    evaluation = session.batches["E"]
    (sums,) = gather_sums(session.world, session.shard("E"), scores.entropy)
    return as_ratio("per_token", sums, evaluation.lengths)


def coming_step(
    session: Session, optimizer: AdamState, gradient: Tensor, grad_norm: float
) -> Step:
    """The step by the parts of AdamW; the gradient is clipped already."""
    layout = session.passes.layout
    step = Step(
        delta=torch.zeros_like(gradient),
        learning_rate=1.0,
        grad_norm=grad_norm,
        clip_coef=1.0,
        num_optimizer_steps=1,
    )
    views, gradients = layout.views(step.delta), layout.views(gradient)
    parameters, update = session.passes.parameters, session.config.update
    for name, parts in step_parts(optimizer, parameters, gradient, step, update):
        views[name].copy_(parts.change(gradients[name]))
    return step


def _shares(
    session: Session,
    trained: TrainedBatch,
    padding: dict[nn.Embedding, int],
    direction: dict[str, Tensor],
) -> tuple[TokenTable, float]:
    """Shares of U's tokens before clipping, and the largest gap of log p."""
    shard = session.shard("U")
    on_logp, on_entropy = (
        trained.token_values(shard, name) for name in ("on_logp", "on_entropy")
    )

    def weights(token: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return on_logp[token.cpu()], on_entropy[token.cpu()]

    with lookups_cut(padding):
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
