"""The gradient-dot form of the prediction: its passes, and what ranks exchange.

Groups are units with a gradient each. Unit u of B has the gradient
G_u = B sum_{t in u} a_t grad log p_t, a sum over its tokens, so that one backward pass
with the weights a gives the mean over all units. What the units of E and U stand for:

    entropy_units   G_u = X_u, whose direction raises the entropy
    reward_units    G_u = grad J_u, J_u = mean_g (A_{u,g} / L_u) S_{u,g}
    loss_units      G_u = -B times the gradient of the unit's share of the loss

With D the diagonal matrix that makes Y_u of a unit's gradient (see
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

Shape legend: n sequences and t tokens of this rank, B units of the batch, P trainable
elements.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_ddp.config import GradientDot, Sample, gradient_dot_obstacle
from entropy_ddp.data.batch import RESPONSE, Batch, Block, Shard
from entropy_ddp.errors import InputError
from entropy_ddp.estimators.gradient_dot import (
    Weighting,
    entropy_coefficients,
    estimate_dot,
    reward_coefficients,
)
from entropy_ddp.estimators.standard_errors import group_totals
from entropy_ddp.model.parameters import inner_product
from entropy_ddp.model.response_tokens import (
    DirectionalScores,
    TokenScores,
    TokenWeights,
)
from entropy_ddp.probe.passes import score_along, summed_gradient, update_weights
from entropy_ddp.probe.resume import PassResult
from entropy_ddp.probe.session import Session
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
        if split in batches and batches[split].num_groups < 2:
            count = batches[split].num_groups
            return f"needs at least 2 groups in {split}, found {count}"
    reason = gradient_dot_obstacle(planned)
    if reason is not None or "E" in planned:
        return reason
    batch = batches["E"]
    alone = (batch.group_sizes[batch.groups] < 2).nonzero()
    if not len(alone):
        return None
    sequence = batch.sequences[int(alone[0])]
    return (
        f"needs at least 2 responses in every group of E, found 1 in group "
        f"{sequence.group_key!r} (line {sequence.index + 1}); sample E with "
        "responses_per_prompt of 2 or more"
    )


def is_wanted(
    settings: GradientDot, batches: dict[str, Batch], planned: dict[str, Sample]
) -> bool:
    """Whether to compute it: `true`, or `auto` and possible.

    Args:
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


def require_passes(session: Session) -> None:
    """Check that the passes it needs can be made.

    Raises:
        InputError: E and U are the same rollouts, which need a gradient of each group,
            and gradients of a model in parts are sums over all ranks.
    """
    settings, batches = session.config.gradient_dot, session.batches
    if not session.passes.layers.has_parts or len(batches) < 2:
        return
    if is_wanted(settings, batches, session.planned) and same_rollouts(
        batches["E"], batches["U"]
    ):
        raise InputError(
            "gradient_dot: expected an E of its own, found the rollouts of U, which need "
            "a gradient of each group; compute.shard: full has none: set "
            "gradient_dot.enabled: false, or compute.shard: none"
        )


def same_rollouts(left: Batch, right: Batch) -> bool:
    """Whether two batches hold the same groups of the same responses, in one order."""
    return (
        len(left) == len(right)
        and torch.equal(left.groups, right.groups)
        and all(left.column(name) == right.column(name) for name in RESPONSE)
    )


@dataclass(frozen=True, kw_only=True)
class Units:
    """The groups of one batch that this rank holds, each with its gradient.

    Attributes:
        shard: this rank's groups; may be empty.
        weights: gives a_t of this rank's tokens, as `pull_back` wants them.
        as_trained: whether the gradients are those that the trainer takes.
    """

    shard: Shard
    weights: TokenWeights
    as_trained: bool = False

    @property
    def group(self) -> Tensor:
        """Group number of each of this rank's sequences, [n]."""
        return self.shard.groups

    @property
    def count(self) -> int:
        """Number of units B of the whole batch."""
        return self.shard.batch.num_groups

    def one_by_one(self) -> Iterator[tuple[int, "Units"]]:
        """Each of this rank's units alone, ascending, with its share of the same mean."""
        for unit, block in self.shard.by_group():
            weights = self._weights_of(block)
            yield unit, replace(self, shard=block.shard, weights=weights)

    def _weights_of(self, block: Block) -> TokenWeights:
        return lambda token, *rest: self.weights(block.tokens[token.cpu()], *rest)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Both sides of the inner product.

    Attributes:
        x: groups of E with X_u.
        y: groups of U with a gradient each; Y_u is `scale` times it.
        scale: the diagonal matrix D, flat, [P].
        x_bar, y_bar: Xbar and Ybar over all ranks, flat, [P].
        learning_rate: what <Xbar, Ybar> is multiplied by.
        loss_gradient: flat, [P]; Ybar = C - D times it, where Ybar has a part C that no
            unit of U makes (momentum and decay of a step). None where C = 0.
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
    loss_gradient: Tensor | None = None
    along_y_bar: DirectionalScores | None = None
    per_unit: float = 1.0


def gradient_dot(
    session: Session,
    step: Step,
    gradient: Tensor | None,
    base: DirectionalScores,
    settings: GradientDot,
) -> GradientDotResult | None:
    """<Xbar, Ybar>, deltaH1 and its standard error, from all ranks.

    Collectives: one parameter buffer (two for direction `preconditioned`), two tables
    of scalars (one when E and U are the same rollouts).

    Args:
        session: the run, its parameters and optimizer at theta (the step undone).
        step: that was taken.
        gradient: gradient of the loss on U before clipping, summed over ranks, [P]; None
            where there is no U.
        base: this rank's tokens of E at theta, with derivatives along step / eta.

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
        factors = _step_factors(session, step, gradient, base, settings)
    else:
        factors = _preconditioned_factors(session, step, base, settings)
    passes = session.passes
    dot = passes.inner_product(factors.x_bar, factors.y_bar)
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
        x_norm=passes.norm(factors.x_bar),
        y_norm=passes.norm(factors.y_bar),
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
        loss_gradient=gradient,
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
    def pull_back() -> PassResult:
        return PassResult(vectors={"gradient": mean_gradient(session, units)})

    name = f"gradient dot: gradient of {units.shard.batch.split}"
    return session.pass_over(units.shard, name, pull_back).vectors["gradient"]


def _projections(
    session: Session, factors: Factors, settings: GradientDot
) -> tuple[Tensor, ...]:
    """<X_u, Ybar> [B_E], <Y_u, Xbar> [B_U]; of the same rollouts <X_u, Y_u>, <X_u, C>."""
    if same_rollouts(session.batches["E"], session.batches["U"]):
        return _paired(session, factors)
    x, y = factors.x, factors.y
    if settings.variance_method == "backward":
        return (
            _group_by_group(session, x, factors.y_bar),
            _group_by_group(session, y, factors.scale * factors.x_bar),
        )
    views, along_y = session.passes.layout.views, factors.along_y_bar
    if along_y is None:
        name = "gradient dot: E along Y"
        along_y = score_along(session, x.shard, name, views(factors.y_bar))
    direction = views(factors.scale * factors.x_bar)
    along_x = score_along(session, y.shard, "gradient dot: U along X", direction)
    return (
        factors.per_unit * directional_derivatives(session, x, along_y),
        directional_derivatives(session, y, along_x),
    )


def _group_by_group(session: Session, units: Units, vector: Tensor) -> Tensor:
    """<G_u, vector> of all units, one backward pass for each."""

    def pull_back() -> PassResult:
        products = torch.zeros(units.count, dtype=torch.float64)
        for unit, flat in unit_gradients(session, units):
            products[unit] = inner_product(flat, vector)
        session.world.sum(products, "scalars")
        return PassResult(shared={"products": products})

    name = f"gradient dot: groups of {units.shard.batch.split}"
    return session.pass_over(units.shard, name, pull_back).shared["products"]


def _paired(session: Session, factors: Factors) -> tuple[Tensor, ...]:
    """All four of the same rollouts, one backward pass over each unit for X and Y."""
    x, y = factors.x, factors.y
    onto_y, onto_x = factors.y_bar, factors.scale * factors.x_bar

    def pull_back() -> PassResult:
        products = torch.zeros(4, x.count, dtype=torch.float64)
        # The same groups on this rank, in the same order: both are dealt out alike.
        gradients = unit_gradients(session, x), unit_gradients(session, y)
        for (unit, of_x), (_, of_y) in zip(*gradients, strict=True):
            products[0, unit] = inner_product(of_x, onto_y)
            products[1, unit] = inner_product(of_y, onto_x)
            scaled = factors.scale * of_x
            products[2, unit] = inner_product(scaled, of_y)
            if factors.loss_gradient is not None:
                # <X_u, C>: what is left of <X_u, Ybar> without the units' own part.
                own = -inner_product(scaled, factors.loss_gradient)
                products[3, unit] = products[0, unit] - own
        session.world.sum(products, "scalars")
        return PassResult(shared={"products": products})

    tokens = 2 * x.shard.ragged.num_tokens
    found = session.pass_over(x.shard, "gradient dot: groups", pull_back, tokens=tokens)
    return tuple(found.shared["products"])


def entropy_units(session: Session, base: TokenScores, weighting: Weighting) -> Units:
    """The groups of E with X_u.

    Args:
        base: this rank's tokens of E at theta.
        weighting: what the log-probability of a response is divided by.
    """
    shard = session.shard("E")
    group, ragged = shard.batch.groups[shard.positions], shard.ragged
    logp = ragged.sum(base.logp)
    coefficients = entropy_coefficients(logp, ragged.lengths, group, weighting)
    return _sequence_units(shard, coefficients / shard.batch.num_groups)


def reward_units(session: Session) -> Units:
    """The groups of U with grad J_u; for the loss `nll` every advantage is 1."""
    shard = session.shard("U")
    advantages = torch.ones(len(shard.positions), dtype=torch.float64)
    if session.config.update.loss != "nll":
        advantages = shard.batch.advantages[shard.positions]
    group, lengths = shard.batch.groups[shard.positions], shard.ragged.lengths
    coefficients = reward_coefficients(advantages, lengths, group)
    units = _sequence_units(shard, coefficients / shard.batch.num_groups)
    return replace(units, as_trained=True)


def loss_units(session: Session) -> Units:
    """The groups of U with their share of the configured loss, descending.

    The loss's own normalisation (the number of tokens of U, for `dapo`) is held fixed.

    Raises:
        InputError: `ratio: clipped` and a sequence has no sampling log-probs.
    """
    descent = update_weights(session)

    def ascent(token: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        on_logp, on_entropy = descent(token, logp, entropy)
        return -on_logp, on_entropy

    return Units(shard=session.shard("U"), weights=ascent, as_trained=True)


def _sequence_units(shard: Shard, coefficients: Tensor) -> Units:
    """Units whose tokens have their sequence's coefficient as weight, [n]."""

    def weights(token: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        on_logp = coefficients[shard.ragged.sequence_at(token.cpu())]
        return on_logp, torch.zeros_like(on_logp)

    return Units(shard=shard, weights=weights)


def mean_gradient(session: Session, units: Units) -> Tensor:
    """Mean of the gradients of all units of all ranks, flat, [P]; one collective."""
    flat, _ = summed_gradient(
        session,
        session.passes,
        units.shard,
        units.weights,
        as_trained=units.as_trained,
    )
    return flat


def unit_gradients(session: Session, units: Units) -> Iterator[tuple[int, Tensor]]:
    """The gradient of each of this rank's units, one backward pass for each.

    Yields:
        Number of the unit, ascending, and its gradient, flat, [P].
    """
    passes, dtype = session.passes, session.buffer_dtype
    alone = list(units.one_by_one())
    missing = passes.layers.most(len(alone)) - len(alone)
    trained = units.as_trained
    for unit, one in alone:
        flat, _ = passes.gradient(one.shard, one.weights, dtype, as_trained=trained)
        yield unit, flat.mul_(units.count)
    nothing = units.shard.empty_block().shard
    for _ in range(missing):
        # Another rank's pass over its unit.
        passes.gradient(nothing, units.weights, dtype, as_trained=trained)


def directional_derivatives(
    session: Session, units: Units, scores: DirectionalScores
) -> Tensor:
    """<G_u, d> of all units, [B], d the direction of the scores; one collective.

    Args:
        scores: this rank's tokens at theta with derivatives along d.
    """
    sums = torch.zeros(len(units.shard.positions), dtype=torch.float64)
    for block in units.shard.blocks():
        here = block.tokens
        weights, _ = units.weights(here, scores.logp[here], scores.entropy[here])
        sums[block.sequences] = block.ragged.sum(weights * scores.dlogp[here])
    totals = group_totals(units.count * sums, units.group, units.count)
    return session.world.sum(totals, "scalars")


def proxy_gradient_norm(session: Session, split: str = "U", limit: int = 64) -> float:
    """Norm of the gradient of mean S over the batch's first `limit` sequences.

    0 exactly when no gradient flows from log-probabilities to trainable parameters: X
    and Y then vanish whatever the rewards. The sample is the same at every world size.

    Args:
        split: the batch, "E" or "U".
        limit: size of the sample.

    Raises:
        RunError: a value is not finite.
    """
    shard, sample = session.shard(split), session.batches[split].first(limit)
    positions = shard.positions[shard.positions < len(sample)]
    units = _sequence_units(
        Shard(batch=sample, positions=positions),
        torch.full((len(positions),), 1 / len(sample), dtype=torch.float64),
    )

    def pull_back() -> PassResult:
        norm = session.passes.norm(mean_gradient(session, units))
        return PassResult(shared={"norm": torch.tensor([norm], dtype=torch.float64)})

    found = session.pass_over(
        units.shard,
        "audit: gradient of mean S",
        pull_back,
        kept_as=f"audit: gradient of mean S of {split}",
    )
    return float(found.shared["norm"])
