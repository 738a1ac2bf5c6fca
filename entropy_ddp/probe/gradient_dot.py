"""The gradient-dot form of the prediction: its passes, and what ranks exchange.

With D the diagonal matrix that makes Y_u of a unit's gradient (see `units` and
`estimators.gradient_dot`),

    Xbar   one backward pass over E; the log-probabilities at theta that weigh it are
           those of the slope's scoring pass
    Ybar   direction `step`: the step that was taken; no pass. `preconditioned`: one
           backward pass over U, times D = P
    V_X    direction `step`: the derivatives along the step that the slope has used; no
           pass. `preconditioned`: one forward-mode pass over E along Ybar
    V_Y    one forward-mode pass over U along D Xbar

For direction `step`, Y_u is what group u adds to the step when the saved state, the clip
coefficient and the denominator of the full gradient are held fixed: D is the gain of
`update.decomposition`, and Ybar = momentum part + decay part + mean Y_u.

With `variance_method: backward`, the last two lines are one backward pass per group of E
and one per group of U in their place. So they are, whatever the method, when E and U are
the same rollouts: the terms <X_u, Y_u> to be removed need both gradients of every group.

Shape legend: P trainable elements, B units (groups) of a batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_ddp.config import GradientDot, Sample
from entropy_ddp.data.batch import Batch
from entropy_ddp.errors import InputError
from entropy_ddp.estimators.gradient_dot import estimate_dot
from entropy_ddp.model.parameters import global_norm, inner_product
from entropy_ddp.model.response_tokens import DirectionalScores
from entropy_ddp.probe.phases import SteppedScores
from entropy_ddp.probe.session import Session
from entropy_ddp.probe.unfinished import Record
from entropy_ddp.probe.units import (
    Units,
    directional_derivatives,
    entropy_units,
    loss_units,
    mean_gradient,
    reward_units,
    unit_gradients,
)
from entropy_ddp.results import GradientDotResult
from entropy_ddp.update.decomposition import gradient_gain, preconditioner
from entropy_ddp.update.step import Step


def obstacle(batches: dict[str, Batch], planned: dict[str, Sample]) -> str | None:
    """Why the gradient-dot form cannot be computed from E and U; None if it can.

    Args:
        batches: what there is of E and U.
        planned: by split, what is still to be sampled.
    """
    if "U" not in batches | planned:
        return "needs an update batch U; with update.delta there is none"
    for split in ("E", "U"):
        if split in planned:
            count = planned[split].num_prompts
        else:
            count = batches[split].num_groups
        if count < 2:
            return f"needs at least 2 groups in {split}, found {count}"
    if "E" in planned:
        if planned["E"].responses_per_prompt >= 2:
            return None
        return (
            "needs at least 2 responses in every group of E, found "
            "batches.E.sample.responses_per_prompt of 1"
        )
    sizes = batches["E"].group_sizes.tolist()
    for sequence in batches["E"].sequences:
        if sizes[sequence.group] < 2:
            return (
                "needs at least 2 responses in every group of E, found 1 in group "
                f"{sequence.group_key!r} (line {sequence.index + 1}); sample E with "
                "responses_per_prompt of 2 or more"
            )
    return None


def is_wanted(
    settings: GradientDot, batches: dict[str, Batch], planned: dict[str, Sample]
) -> bool:
    """Whether to compute it: `true`, or `auto` and possible.

    Args:
        settings: which form.
        batches: what there is of E and U.
        planned: by split, what is still to be sampled.

    Raises:
        InputError: `enabled: true`, but E or U does not allow it.
    """
    if settings.enabled is False:
        return False
    reason = obstacle(batches, planned)
    if settings.enabled is True and reason is not None:
        raise InputError(f"gradient_dot: {reason}; or set gradient_dot.enabled: auto")
    return reason is None


def same_rollouts(left: Batch, right: Batch) -> bool:
    """Whether two batches hold the same groups of the same responses, in one order."""
    return (
        len(left) == len(right)
        and torch.equal(left.groups, right.groups)
        and all(
            torch.equal(a.prompt_ids, b.prompt_ids)
            and torch.equal(a.response_ids, b.response_ids)
            for a, b in zip(left.sequences, right.sequences)
        )
    )


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Both sides of the inner product.

    Attributes:
        x: groups of E with X_u.
        y: groups of U with a gradient each; Y_u is `scale` times it.
        scale: the diagonal matrix D, flat, [P].
        x_bar, y_bar: Xbar and Ybar over all ranks, flat, [P].
        learning_rate: what <Xbar, Ybar> is multiplied by.
        along_y_bar: this rank's tokens of E with derivatives along Ybar / `per_unit`,
            where a pass has made them already.
        per_unit: see there.
    """

    x: Units
    y: Units
    scale: Tensor
    x_bar: Tensor
    y_bar: Tensor
    learning_rate: float
    along_y_bar: DirectionalScores | None = None
    per_unit: float = 1.0


def gradient_dot(
    session: Session,
    stepped: SteppedScores,
    gradient: Tensor | None,
    base: DirectionalScores,
    settings: GradientDot,
) -> GradientDotResult | None:
    """<Xbar, Ybar>, deltaH1 and its standard error, from all ranks.

    Collectives: one parameter buffer (two for direction `preconditioned`), two tables
    of scalars (one when E and U are the same rollouts).

    Args:
        session: the run, its parameters and optimizer at theta (the step undone).
        stepped: the step that was taken.
        gradient: gradient of the loss on U before clipping, summed over ranks, [P]; None
            where there is no U.
        base: this rank's tokens of E at theta, with derivatives along step / eta.
        settings: which form.

    Returns:
        The result, the same on every rank; None if it is not wanted, or `auto` and not
        possible (`obstacle` says why).

    Raises:
        InputError: `enabled: true` and E or U does not allow it; or a preconditioner
            is asked for before the optimizer's first step.
        RunError: a value is not finite.
    """
    if not is_wanted(settings, session.batches, session.planned):
        return None
    assert gradient is not None
    if settings.direction == "step":
        factors = _step_factors(session, stepped.step, gradient, base, settings)
    else:
        factors = _preconditioned_factors(session, stepped.step, base, settings)
    dot = inner_product(factors.x_bar, factors.y_bar)
    estimate = estimate_dot(dot, *_projections(session, factors, settings))
    learning_rate, paired = factors.learning_rate, estimate.paired_variance
    return GradientDotResult(
        direction=settings.direction,
        weighting=settings.weighting,
        bars_dot=estimate.bars_dot,
        u_cross=-estimate.bars_dot,
        deltaH1=learning_rate * estimate.bars_dot,
        learning_rate=learning_rate,
        V_X=estimate.V_X,
        V_Y=estimate.V_Y,
        se_deltaH1=learning_rate * math.sqrt(estimate.V_X + estimate.V_Y),
        frac_var=estimate.frac_var,
        x_norm=global_norm(factors.x_bar),
        y_norm=global_norm(factors.y_bar),
        u_statistic=estimate.u_statistic,
        se_paired=None if paired is None else learning_rate * math.sqrt(paired),
    )


def _step_factors(
    session: Session,
    step: Step,
    gradient: Tensor,
    base: DirectionalScores,
    settings: GradientDot,
) -> Factors:
    """Xbar, and the step as Ybar."""
    x = entropy_units(session, base, settings.weighting)
    return Factors(
        x=x,
        y=loss_units(session),
        scale=gradient_gain(
            session.optimizer,
            session.policy.parameters,
            gradient,
            step,
            session.config.update,
        ),
        x_bar=_mean_gradient(session, x),
        y_bar=step.delta,
        learning_rate=1.0,
        along_y_bar=base,
        per_unit=step.learning_rate,
    )


def _preconditioned_factors(
    session: Session, step: Step, base: DirectionalScores, settings: GradientDot
) -> Factors:
    """Xbar, and the preconditioned gradient of the reward as Ybar."""
    x, y = entropy_units(session, base, settings.weighting), reward_units(session)
    scale = preconditioner(
        session.optimizer, session.policy.parameters, session.buffer_dtype
    )
    return Factors(
        x=x,
        y=y,
        scale=scale,
        x_bar=_mean_gradient(session, x),
        y_bar=scale * _mean_gradient(session, y),
        learning_rate=step.learning_rate,
    )


def _mean_gradient(session: Session, units: Units) -> Tensor:
    split = units.shard.batch.split

    def pull_back() -> Record:
        phase = f"gradient dot: gradient of {split}"
        with session.phase(phase, units.shard.ragged.num_tokens):
            return Record(shared={"gradient": mean_gradient(session, units)})

    kept = session.kept(f"gradient-dot-{split}", units.shard, pull_back)
    return kept.shared["gradient"]


def _projections(
    session: Session, factors: Factors, settings: GradientDot
) -> tuple[Tensor, ...]:
    """<X_u, Ybar> [B_E], <Y_u, Xbar> [B_U] and, of the same rollouts, <X_u, Y_u> [B]."""
    if same_rollouts(session.batches["E"], session.batches["U"]):
        return _paired(session, factors)
    if settings.variance_method == "backward":
        against = (factors.y_bar, factors.scale * factors.x_bar)
        pairs = zip((factors.x, factors.y), against)
        return tuple(_group_by_group(session, units, v) for units, v in pairs)
    return _forward(session, factors)


def _forward(session: Session, factors: Factors) -> tuple[Tensor, Tensor]:
    """All units of a batch in one forward-mode pass."""
    x, y, passes = factors.x, factors.y, session.passes
    along_y_bar = factors.along_y_bar

    def along_y() -> Record:
        with session.phase("gradient dot: E along Y", x.shard.ragged.num_tokens):
            direction = passes.layout.views(factors.y_bar)
            return Record(tokens=passes.score(x.shard, direction).arrays())

    def along_x() -> Record:
        with session.phase("gradient dot: U along X", y.shard.ragged.num_tokens):
            direction = passes.layout.views(factors.scale * factors.x_bar)
            scores = passes.score(y.shard, direction, as_trained=True)
            return Record(tokens=scores.arrays())

    if along_y_bar is None:
        kept = session.kept("gradient-dot-along-Y", x.shard, along_y)
        along_y_bar = DirectionalScores(**kept.tokens)
    kept = session.kept("gradient-dot-along-X", y.shard, along_x)
    along_x_bar = DirectionalScores(**kept.tokens)
    return (
        factors.per_unit * directional_derivatives(session, x, along_y_bar),
        directional_derivatives(session, y, along_x_bar),
    )


def _group_by_group(session: Session, units: Units, vector: Tensor) -> Tensor:
    """<G_u, vector> of all units, one backward pass for each."""
    split = units.shard.batch.split

    def pull_back() -> Record:
        products = torch.zeros(units.count, dtype=torch.float64)
        phase = f"gradient dot: groups of {split}"
        with session.phase(phase, units.shard.ragged.num_tokens):
            for unit, flat in unit_gradients(session, units):
                products[unit] = inner_product(flat, vector)
            session.world.sum(products, "scalars")
        return Record(shared={"products": products})

    kept = session.kept(f"gradient-dot-groups-{split}", units.shard, pull_back)
    return kept.shared["products"]


def _paired(session: Session, factors: Factors) -> tuple[Tensor, ...]:
    """All three of the same rollouts, one backward pass over each unit for X and Y."""
    x, y = factors.x, factors.y
    onto_y, onto_x = factors.y_bar, factors.scale * factors.x_bar

    def pull_back() -> Record:
        products = torch.zeros(3, x.count, dtype=torch.float64)
        with session.phase("gradient dot: groups", 2 * x.shard.ragged.num_tokens):
            # The same groups on this rank, in the same order: both are dealt out alike.
            gradients = unit_gradients(session, x), unit_gradients(session, y)
            for (unit, of_x), (_, of_y) in zip(*gradients, strict=True):
                products[0, unit] = inner_product(of_x, onto_y)
                products[1, unit] = inner_product(of_y, onto_x)
                products[2, unit] = inner_product(of_x, factors.scale * of_y)
            session.world.sum(products, "scalars")
        return Record(shared={"products": products})

    kept = session.kept("gradient-dot-groups", x.shard, pull_back)
    return tuple(kept.shared["products"])
