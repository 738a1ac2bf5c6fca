"""The gradient-dot form of the prediction: its passes, and what ranks exchange.

    Xbar   one backward pass over E; log-probabilities at theta are those of the slope's
           scoring pass
    Ybar   the step that was taken, or one backward pass over U and the preconditioner
    V_X    direction `step`: the derivatives along the step that the slope has used; no
           pass. `preconditioned`: one forward-mode pass over E along Ybar
    V_Y    one forward-mode pass over U along D Xbar, D the diagonal matrix of Y

With `variance_method: backward`, and whenever E and U are the same rollouts (the terms
<X_u, Y_u> that are then removed need both gradients of every unit), V_X and V_Y come from
one backward pass per group of E and one per group of U in place of the last two lines.

A unit's gradient is written as B sum_{t in u} a_t grad log p_t, so that the mean over the
B units is what one pass with weights a gives. See `estimators.gradient_dot`.

Shape legend: P trainable elements, t response tokens of this rank, B units of a batch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entropy_ddp.errors import InputError
from entropy_ddp.estimators.gradient_dot import (
    Weighting,
)
from entropy_ddp.policy.scoring import TokenScores, TokenWeights
from entropy_ddp.probe.phases import SteppedScores
from entropy_ddp.probe.session import Session
from entropy_ddp.rollouts.batch import Batch, Shard
from entropy_ddp.update.decomposition import gradient_gain, preconditioner

Direction = Literal["step", "preconditioned"]
VarianceMethod = Literal["jvp", "backward"]


@dataclass(frozen=True, kw_only=True)
class GradientDotSettings:
    """The `gradient_dot` section of a configuration.

    Attributes:
        enabled: `auto` computes it when E and U allow it.
        direction: Ybar is the `step` itself, or the `preconditioned` gradient of the
            reward.
        weighting: what the log-probability of a response is divided by in X.
        variance_method: one forward-mode pass for all units, or a backward pass each.
    """

    enabled: bool | Literal["auto"] = "auto"
    direction: Direction = "step"
    weighting: Weighting = "dr_grpo"
    variance_method: VarianceMethod = "jvp"


@dataclass(frozen=True, kw_only=True)
class GradientDotResult:
    """The gradient-dot form of the first-order prediction.

    Attributes:
        direction, weighting: which form.
        bars_dot: <Xbar, Ybar>, without its diagonal if `u_statistic`.
        u_cross: -bars_dot.
        deltaH1: learning_rate times bars_dot, in nats (per token of the weighting).
        learning_rate: eta of the first param group; 1 for direction `step`, whose Ybar
            holds it already.
        V_X, V_Y: variance of bars_dot due to the groups of E and of U.
        se_deltaH1: learning_rate sqrt(V_X + V_Y).
        frac_var: (V_X + V_Y) / bars_dot^2; None when bars_dot is 0.
        x_norm, y_norm: Euclidean norms of Xbar and Ybar.
        u_statistic: whether E and U are the same rollouts, so that the diagonal was
            removed.
    """

    direction: Direction
    weighting: Weighting
    bars_dot: float
    u_cross: float
    deltaH1: float
    learning_rate: float
    V_X: float
    V_Y: float
    se_deltaH1: float
    frac_var: float | None
    x_norm: float
    y_norm: float
    u_statistic: bool


@dataclass(frozen=True, kw_only=True)
class Units:
    """The groups of one batch, each with the gradient B sum_{t in u} a_t grad log p_t.

    Attributes:
        shard: this rank's groups.
        weights: gives a_t of this rank's tokens, as `pull_back` wants them.
    """

    shard: Shard
    weights: TokenWeights


def obstacle(batches: dict[str, Batch]) -> str | None:
    """Why the gradient-dot form cannot be computed from E and U; None if it can."""
    for split in ("E", "U"):
        count = batches[split].num_groups
        if count < 2:
            return f"needs at least 2 groups in {split}, found {count}"
    sizes = batches["E"].group_sizes.tolist()
    for sequence in batches["E"].sequences:
        if sizes[sequence.group] < 2:
            return (
                "needs at least 2 responses in every group of E, found 1 in group "
                f"{sequence.group_key!r} (line {sequence.index + 1}); sample E with "
                "responses_per_prompt of 2 or more"
            )
    return None


def is_wanted(settings: GradientDotSettings, batches: dict[str, Batch]) -> bool:
    """Whether to compute it: asked for, or `auto` and possible.

    Raises:
        InputError: `enabled: true`, but E or U does not allow it.
    """
    if settings.enabled is False:
        return False
    reason = obstacle(batches)
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


def gradient_dot(
    session: Session,
    stepped: SteppedScores,
    gradient: Tensor,
    base: TokenScores,
    settings: GradientDotSettings,
) -> GradientDotResult | None:
    """<Xbar, Ybar>, deltaH1 and its standard error, from all ranks.

    Collectives: one parameter buffer (two for direction `preconditioned`), one or two
    tables of scalars.

    Args:
        session: the run; parameters and optimizer are at theta, the step undone.
        stepped: the step that was taken.
        gradient: gradient of the loss on U before clipping, summed over ranks, [P].
        base: this rank's tokens of E at theta, with derivatives along the step.
        settings: which form.

    Returns:
        The result, the same on every rank; None if it is not wanted, or `auto` and not
        possible (see `obstacle`).

    Raises:
        InputError: `enabled: true` and E or U does not allow it; or a preconditioner
            is asked for before the optimizer's first step.
        RunError: a value is not finite.
    """
    if not is_wanted(settings, session.batches):
        return None
    factors = make_factors(session, stepped.step, gradient, base, settings)
    x_bar, y_bar = factors.x_bar, factors.y_bar
    if same_rollouts(session.batches["E"], session.batches["U"]):
        projections = _paired_projections(session, factors)
    elif settings.variance_method == "backward":
        projections = _backward_projections(session, factors)
    else:
        projections = _forward_projections(session, factors)
    estimate = estimate_dot(inner_product(x_bar, y_bar), *projections)
    return GradientDotResult(
        direction=settings.direction,
        weighting=settings.weighting,
        bars_dot=estimate.bars_dot,
        u_cross=-estimate.bars_dot,
        deltaH1=factors.learning_rate * estimate.bars_dot,
        learning_rate=factors.learning_rate,
        V_X=estimate.V_X,
        V_Y=estimate.V_Y,
        se_deltaH1=factors.learning_rate * math.sqrt(estimate.V_X + estimate.V_Y),
        frac_var=estimate.frac_var,
        x_norm=global_norm(x_bar),
        y_norm=global_norm(y_bar),
        u_statistic=estimate.u_statistic,
    )


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Both sides of the inner product.

    Attributes:
        x: groups of E; their mean gradient is Xbar.
        y: groups of U; Y_u is `scale` times their gradient.
        scale: the diagonal matrix of Y, flat, [P].
        x_bar, y_bar: Xbar and Ybar over all ranks, flat, [P]. For direction `step`
            Ybar also has the step's momentum and weight decay.
        learning_rate: what <Xbar, Ybar> is multiplied by.
        along_y_bar: this rank's tokens of E with derivatives along Ybar over
            `along_rate`, where a pass has made them already; else None.
        along_rate: see there.
    """

    x: Units
    y: Units
    scale: Tensor
    x_bar: Tensor
    y_bar: Tensor
    learning_rate: float
    along_y_bar: TokenScores | None
    along_rate: float = 1.0


def make_factors(
    session: Session,
    step: Step,
    gradient: Tensor,
    base: TokenScores,
    settings: GradientDotSettings,
) -> Factors:
    """Xbar and Ybar: one pass and collective for each, none for a step as Ybar."""
    optimizer, parameters = session.optimizer, session.policy.parameters
    x = entropy_units(session, base, settings.weighting)
    x_bar = mean_gradient(session, x, "gradient dot: E")
    if settings.direction == "step":
        update = session.config.update
        return Factors(
            x=x,
            y=loss_units(session),
            scale=gradient_gain(optimizer, parameters, gradient, step, update),
            x_bar=x_bar,
            y_bar=step.delta,
            learning_rate=1.0,
            along_y_bar=base,
            along_rate=step.learning_rate,
        )
    y = reward_units(session)
    scale = preconditioner(optimizer, parameters, session.buffer_dtype)
    return Factors(
        x=x,
        y=y,
        scale=scale,
        x_bar=x_bar,
        y_bar=scale * mean_gradient(session, y, "gradient dot: U"),
        learning_rate=step.learning_rate,
        along_y_bar=None,
    )


def entropy_units(session: Session, base: TokenScores, weighting: Weighting) -> Units:
    """The groups of E with X_u as gradient; `base` holds this rank's tokens of E."""
    shard = session.shard(session.batches["E"])
    coefficients = entropy_coefficients(
        shard.ragged.sum(base.logp), shard.ragged.lengths, _groups(shard), weighting
    )
    return _units(shard, coefficients / shard.batch.num_groups)


def reward_units(session: Session) -> Units:
    """The groups of U with grad J_u as gradient; for loss `nll` every advantage is 1."""
    shard = session.shard(session.batches["U"])
    if session.config.update.loss == "nll":
        advantages = torch.ones(len(shard.positions), dtype=torch.float64)
    else:
        advantages = shard.batch.advantages[shard.positions]
    coefficients = reward_coefficients(advantages, shard.ragged.lengths, _groups(shard))
    return _units(shard, coefficients / shard.batch.num_groups)


def loss_units(session: Session) -> Units:
    """The groups of U with minus B_U times their share of the loss as objective."""
    shard = session.shard(session.batches["U"])
    descent = loss_weights(shard, session.config.update)

    def ascent(token: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        on_logp, on_entropy = descent(token, logp, entropy)
        return -on_logp, on_entropy

    return Units(shard=shard, weights=ascent)


def _units(shard: Shard, coefficients: Tensor) -> Units:
    """Units whose tokens' weights are their sequence's coefficient, [n]."""
    on_logp = shard.ragged.spread(coefficients)
    on_entropy = torch.zeros_like(on_logp)
    return Units(
        shard=shard,
        weights=lambda token, *_: (on_logp[token.cpu()], on_entropy[token.cpu()]),
    )


def _groups(shard: Shard) -> Tensor:
    """Group number of each of this rank's sequences, [n]."""
    return shard.batch.groups[shard.positions]


def mean_gradient(session: Session, units: Units, phase: str) -> Tensor:
    """Mean of the units' gradients over all ranks, flat, [P]; one collective."""
    with session.phase(phase, units.shard.ragged.num_tokens):
        flat, _ = session.passes.gradient(
            units.shard, units.weights, session.buffer_dtype
        )
        return session.world.sum(flat, "parameter buffers")


def unit_gradients(session: Session, units: Units) -> Iterator[tuple[int, Tensor]]:
    """The gradient of each of this rank's units, flat, [P]; one backward pass each.

    Yields:
        Number of the group and its gradient, in the order of the groups.
    """
    shard, groups = units.shard, _groups(units.shard)
    for unit in groups.unique().tolist():
        here = groups == unit
        places = shard.ragged.spread(here).nonzero().squeeze(1)
        flat, _ = session.passes.gradient(
            Shard(batch=shard.batch, positions=shard.positions[here]),
            lambda token, *rest: units.weights(places[token.cpu()], *rest),
            session.buffer_dtype,
        )
        yield unit, flat.mul_(shard.batch.num_groups)


def directional_sums(session: Session, units: Units, scores: TokenScores) -> Tensor:
    """Each unit's derivative along the direction of the scores, [B]; one collective."""
    assert scores.dlogp is not None
    shard, every = units.shard, torch.arange(len(scores.logp))
    weights, _ = units.weights(every, scores.logp, scores.entropy)
    per_sequence = shard.ragged.sum(weights * scores.dlogp) * shard.batch.num_groups
    totals = group_totals(per_sequence, _groups(shard), shard.batch.num_groups)
    return session.world.sum(totals, "scalars")


def _forward_projections(session: Session, factors: Factors) -> tuple[Tensor, Tensor]:
    """<X_u, Ybar> [B_E] and <Y_u, Xbar> [B_U], all units of a batch in one pass."""
    x, y, passes = factors.x, factors.y, session.passes
    along_y_bar = factors.along_y_bar
    if along_y_bar is None:
        with session.phase("gradient dot: E along Y", x.shard.ragged.num_tokens):
            along_y_bar = passes.score(x.shard, passes.layout.views(factors.y_bar))
    with session.phase("gradient dot: U along X", y.shard.ragged.num_tokens):
        direction = passes.layout.views(factors.scale * factors.x_bar)
        along_x_bar = passes.score(y.shard, direction)
    return (
        factors.along_rate * directional_sums(session, x, along_y_bar),
        directional_sums(session, y, along_x_bar),
    )


def _backward_projections(session: Session, factors: Factors) -> tuple[Tensor, Tensor]:
    """<X_u, Ybar> [B_E] and <Y_u, Xbar> [B_U], one backward pass for each unit."""
    against = (factors.y_bar, factors.scale * factors.x_bar)
    products = []
    for units, vector in zip((factors.x, factors.y), against):
        along = torch.zeros(units.shard.batch.num_groups, dtype=torch.float64)
        split, num_tokens = units.shard.batch.split, units.shard.ragged.num_tokens
        with session.phase(f"gradient dot: groups of {split}", num_tokens):
            for unit, flat in unit_gradients(session, units):
                along[unit] = inner_product(flat, vector)
            products.append(session.world.sum(along, "scalars"))
    return products[0], products[1]


def _paired_projections(
    session: Session, factors: Factors
) -> tuple[Tensor, Tensor, Tensor]:
    """<X_u, Ybar>, <Y_u, Xbar> and <X_u, Y_u> of the same rollouts, [B] each.

    One backward pass over each unit for X and one for Y.
    """
    x, y = factors.x, factors.y
    along_y, along_x = factors.y_bar, factors.scale * factors.x_bar
    products = torch.zeros(3, x.shard.batch.num_groups, dtype=torch.float64)
    with session.phase("gradient dot: groups of E", 2 * x.shard.ragged.num_tokens):
        # The same groups on this rank, in the same order: both are dealt out alike.
        pairs = zip(unit_gradients(session, x), unit_gradients(session, y), strict=True)
        for (unit, of_x), (_, of_y) in pairs:
            products[0, unit] = inner_product(of_x, along_y)
            products[1, unit] = inner_product(of_y, along_x)
            products[2, unit] = inner_product(of_x, factors.scale * of_y)
        session.world.sum(products, "scalars")
    return products[0], products[1], products[2]


def proxy_gradient_norm(session: Session, split: str = "U", limit: int = 64) -> float:
    """Norm of the gradient of mean S over the batch's first `limit` sequences.

    0 exactly when no gradient flows from log-probabilities to trainable parameters:
    S is then a constant, and X and Y vanish whatever the rewards. One pass and one
    collective; the sample is the same at every world size.

    Args:
        session: the run.
        split: the batch, "E" or "U".
        limit: size of the sample.

    Raises:
        RunError: a value is not finite.
    """
    batch = session.batches[split]
    shard, sample = session.shard(batch), batch.first(limit)
    part = Shard(batch=sample, positions=shard.positions[shard.positions < len(sample)])
    share = torch.full((len(part.positions),), 1 / len(sample), dtype=torch.float64)
    return global_norm(mean_gradient(session, _units(part, share), "audit: proxy"))
