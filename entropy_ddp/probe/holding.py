"""What would have held the entropy: six families of changes to the step, solved for it.

The parameters come from the shares that an attribution has, without any pass, the gain of
the step held fixed. With `verify` they are corrected for what the gain becomes: gradients
with other weights (a backward pass over U each; one for all members of a family that is
linear in its parameter), the step that AdamW makes of them, its first-order change, and
secants until that is what is wanted; then the step is taken. Each half of E finds a member
that the other half judges, as with other choices by share.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from entropy_ddp.estimators.entropy import EntropyChange
from entropy_ddp.estimators.hold_parameters import (
    LineFamily,
    TokenFamily,
    between_blocks,
    corrected,
    fraction_changed,
    solve_line,
)
from entropy_ddp.estimators.holding import FAMILIES
from entropy_ddp.estimators.share_blocks import BlockShares, standard_error
from entropy_ddp.estimators.shares import TokenTable
from entropy_ddp.model.parameters import inner_product
from entropy_ddp.model.response_tokens import TokenWeights
from entropy_ddp.model.scoring import Passes
from entropy_ddp.probe.attribution import (
    Evaluation,
    halves_of_E,
    token_places,
    truth_after,
)
from entropy_ddp.probe.measurements import HoldSums, Measurements
from entropy_ddp.probe.passes import policy_weights, summed_gradient, update_weights
from entropy_ddp.probe.resume import PassResult
from entropy_ddp.probe.session import Session
from entropy_ddp.update.decomposition import StepParts, step_parts
from entropy_ddp.update.step import clip_coefficient, given_change

LEFT_OUT, BONUS = "tokens_left_out", "entropy_coefficient"
PROJECTION, RATE = "projection", "learning_rate"
# The parameter of the plain loss.
NEUTRAL = {name: weights.neutral for name, weights in FAMILIES.items()} | {
    LEFT_OUT: 0.0, BONUS: 0.0, PROJECTION: 0.0, RATE: 1.0,
}  # fmt: skip
# Of the distance from it: TRL's adaptive coefficient is never above 1; the learning rate
# goes from no step at all to twice the step.
BONUS_LIMITS = RATE_LIMITS = (-1.0, 1.0)
# Families whose gradient is the plain one plus the parameter times another.
SUMS_OF_TWO = ("improbable_failures", BONUS)
# How near the first-order change of the step taken comes to what is wanted, of what is
# missing. Where a gradient is the sum of two, no pass is needed to come nearer.
TOLERANCE, FINE_TOLERANCE = 0.01, 1e-5
MOST_GRADIENTS, MOST_SUMS = 4, 40

Row = dict[str, Any]


def would_hold(session: Session, measured: Measurements) -> None:
    """Add to an attribution the members of all families that hold the entropy."""
    assert measured.attribution is not None and measured.block_shares is not None
    blocks, settings = measured.block_shares, session.config.attribution
    families = _families(measured)
    projection = _Projection.of(session, measured)
    rows = [
        _row(name, family, blocks, settings.hold) for name, family in families.items()
    ]
    rows.insert(-1, projection.row(settings.hold))
    if settings.verify:
        verification = _Verification.of(session, measured, families)
        for row in rows:
            row |= verification.row(row["family"], projection)
    measured.attribution = replace(
        measured.attribution,
        would_hold={"target": settings.hold, "families": rows},
    )


def _families(measured: Measurements) -> dict[str, TokenFamily | LineFamily]:
    """The families that the shares alone can solve, by name."""
    table, blocks, sums = _found(measured)
    others = blocks.momentum + blocks.decay
    # What weighs advantages leaves the KL term as it is.
    by_advantage = sums.policy_part[:, None] * blocks.share
    rest = others + (blocks.share - by_advantage).sum(0)
    found: dict[str, TokenFamily | LineFamily] = {
        name: TokenFamily(
            rest=rest,
            share=by_advantage,
            coefficient=weights.slope(table.logp, table.advantage, weights.neutral),
            limits=(
                weights.limits[0] - weights.neutral,
                weights.limits[1] - weights.neutral,
            ),
        )
        for name, weights in FAMILIES.items()
    }
    found[LEFT_OUT] = TokenFamily(
        rest=others,
        share=blocks.share,
        coefficient=None,
        limits=(0.0, float(len(blocks.share))),
    )
    found[BONUS] = LineFamily(
        total=blocks.total, change=sums.bonus, limits=BONUS_LIMITS
    )
    found[RATE] = LineFamily(
        total=blocks.total, change=blocks.total, limits=RATE_LIMITS
    )
    return found


def _row(
    name: str, family: TokenFamily | LineFamily, blocks: BlockShares, target: float
) -> Row:
    """What the shares say of a family."""
    size, whole = blocks.size, torch.arange(blocks.count)
    found = family.solve(whole, target)
    row: Row = {"family": name, "parameter": NEUTRAL[name] + found.distance}
    error = standard_error(family.added(whole, target, found.distance), size)
    if error is not None and found.slope and not found.saturated:
        row["parameter_se"] = error / abs(found.slope)
    row["saturated"] = found.saturated
    if isinstance(family, TokenFamily):
        weights = family.weights(whole, target, found.distance)
        row["token_fraction"] = fraction_changed(weights)
    row["delta_h1"] = found.value
    if blocks.count < 2:
        return row
    added = torch.zeros_like(size)
    for half in (0, 1):
        # The other half chooses.
        places = whole[1 - half :: 2]
        wanted = target * float(size[places].sum())
        distance = family.solve(places, wanted).distance
        added[half::2] = family.added(places, wanted, distance)[half::2]
    row["delta_h1_cross_fitted"] = float(added.sum())
    error = standard_error(added, size)
    return row if error is None else row | {"se": error}


@dataclass(frozen=True, kw_only=True)
class _Slopes:
    """grad H of all of E, and of its even blocks alone, by parameter name.

    Attributes:
        whole, even: times the denominator; `even` is None without `verify`.
        denominator: of all of E.
    """

    whole: dict[str, Tensor]
    even: dict[str, Tensor] | None
    denominator: float

    @classmethod
    def of(cls, session: Session, measured: Measurements) -> "_Slopes":
        """As an attribution left them."""
        layout, (_, _, sums) = session.passes.layout, _found(measured)
        return cls(
            whole=layout.views(measured.duality.gradient),
            even=None if sums.even is None else layout.views(sums.even),
            denominator=measured.estimates.original.denominator,
        )

    def values_of(self, name: str) -> list[Tensor]:
        """Of a parameter, float64: of all blocks, of the even and of the odd ones."""
        whole = self.whole[name].double() / self.denominator
        if self.even is None:
            return [whole]
        even = self.even[name].double() / self.denominator
        return [whole, even, whole - even]


@dataclass(frozen=True, kw_only=True)
class _Projection:
    """The shortest change of the step, in the metric of its gain: mu gain * grad H.

    Attributes:
        total: what each block adds to the first-order change, [K].
        size: the blocks' parts of the denominator, [K].
        own: <g_b, gain * g_b>, [K].
        squares: <g, gain * g> of all blocks; with `verify` of the even and odd ones too.
        step: length of the step in that metric.
    """

    total: Tensor
    size: Tensor
    own: Tensor
    squares: list[float]
    step: float

    @classmethod
    def of(cls, session: Session, measured: Measurements) -> "_Projection":
        """Products of vectors in parameter space, without a pass."""
        _, blocks, sums = _found(measured)
        slopes = _Slopes.of(session, measured)
        delta = session.passes.layout.views(measured.step.delta)
        squares, step = [0.0] * (1 if slopes.even is None else 3), 0.0
        for name, parts in _plain_parts(session, measured):
            gain, of_step = parts.gain.cpu(), delta[name].double()
            step += inner_product(of_step, of_step / gain.abs())
            for number, slope in enumerate(slopes.values_of(name)):
                squares[number] += inner_product(slope, slope * gain)
        step, *squares = session.passes.layers.totals([step, *squares])
        return cls(
            total=blocks.total,
            size=blocks.size,
            own=sums.own,
            squares=squares,
            step=math.sqrt(step),
        )

    def solve(self, number: int, target: float) -> float | None:
        """mu by all blocks (0), by the even (1) or the odd ones (2).

        None where they do not tell which way is up, or there is no step to change.
        """
        places = slice(None) if number == 0 else slice(number - 1, None, 2)
        part = float(self.size[places].sum())
        missing = target - float(self.total[places].sum()) / part
        if not missing:
            return 0.0
        slope = between_blocks(self.squares[number], self.own[places])
        if slope is None or slope <= 0 or not self.step:
            return None
        return missing * part**2 / slope

    def length(self, number: int, mu: float | None) -> float:
        """The change over the step."""
        part = float(self.size[number - 1 :: 2].sum()) if number else 1.0
        size = abs(mu or 0.0) * math.sqrt(abs(self.squares[number])) / part
        return size / self.step if size else 0.0

    def row(self, target: float) -> Row:
        """What the blocks say.

        The error is that of the change in proportion. That of the slope is not in it,
        and is the larger one where far more is missing than the change.
        """
        total, mu = float(self.total.sum()), self.solve(0, target)
        row: Row = {"family": PROJECTION, "parameter": self.length(0, mu)}
        error, missing = standard_error(self.total, self.size), abs(target - total)
        if mu and error is not None and missing <= abs(total):
            row["parameter_se"] = row["parameter"] * error / missing
        row["saturated"] = mu is None
        return row | {"delta_h1": total if mu is None else target}


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A member of a family, as a half of E chose it.

    Attributes:
        parameter: its parameter.
        reached: whether the half's first-order change is what is wanted.
        change: what it makes of the step, flat, [P].
        gradient_change: by how much of its norm the gradient is changed; None where it is
            not, or where there is none.
    """

    parameter: float
    reached: bool
    change: Tensor
    gradient_change: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Verification:
    """Steps of the families, corrected and taken.

    Attributes:
        session: the run.
        measured: what it gave.
        families: those that the shares alone can solve.
        slopes: grad H.
        parts: the even and the odd blocks' parts of the denominator.
    """

    session: Session
    measured: Measurements
    families: dict[str, TokenFamily | LineFamily]
    slopes: _Slopes
    parts: tuple[float, float]

    @classmethod
    def of(
        cls,
        session: Session,
        measured: Measurements,
        families: dict[str, TokenFamily | LineFamily],
    ) -> "_Verification":
        """Nothing is taken yet."""
        _, blocks, _ = _found(measured)
        parts = (float(blocks.size[0::2].sum()), float(blocks.size[1::2].sum()))
        slopes = _Slopes.of(session, measured)
        return cls(
            session=session,
            measured=measured,
            families=families,
            slopes=slopes,
            parts=parts,
        )

    @property
    def _target(self) -> float:
        return self.session.config.attribution.hold

    @cached_property
    def _plain(self) -> tuple[float, float]:
        """First-order change of the step, as either half sees it."""
        return self._first_orders(self.measured.step.delta)

    def row(self, name: str, projection: _Projection) -> Row:
        """What comes of a family: the parameter, what it changes, first order, truth."""
        if name == PROJECTION:
            members = self._projected(projection)
        elif name == RATE:
            members = self._rescaled()
        else:
            members = self._reweighted(name)
        if members is None:
            return {}
        row: Row = {
            "parameter_taken": self._mean([m.parameter for m in members]),
            "saturated_taken": not all(m.reached for m in members),
        }
        changes = [m.gradient_change for m in members if m.gradient_change is not None]
        if len(changes) == len(members):
            row["gradient_change"] = self._mean(changes)
        step = self.measured.step.delta
        cosines = [_cosine(self.session.passes, m.change, step) for m in members]
        if None not in cosines:
            row["cosine"] = self._mean([c for c in cosines if c is not None])
        return row | self._judged(name, members)

    def _mean(self, of_halves: list[float]) -> float:
        """Of what the halves chose, each counted by its part of the denominator."""
        return math.fsum(p * x for p, x in zip(self.parts, of_halves, strict=True))

    def _judged(self, name: str, members: list[_Member]) -> Row:
        """First order and truth of either half's member, by the other half."""
        halves = halves_of_E(self.session, self.measured.base)
        linear = truth = error = 0.0
        for judge, half in enumerate(halves):
            change, part = members[1 - judge].change, self.parts[judge]
            values = self._first_orders(change)
            linear += part * values[judge]
            if self.session.passes.is_zero(change):
                continue
            found = _truth(half, change, f"{name}, half {judge + 1}")
            truth += part * found.value
            error = math.hypot(error, part * found.se)
        return {
            "delta_h1_taken": linear,
            "delta_h_true": truth,
            "delta_h_true_se": error,
        }

    def _rescaled(self) -> list[_Member]:
        """The step as many times as large."""
        delta, found = self.measured.step.delta, []
        for value in self._plain:
            scale = solve_line(value, value, self._target, RATE_LIMITS)
            found.append(
                _Member(
                    parameter=NEUTRAL[RATE] + scale.distance,
                    reached=not scale.saturated,
                    change=(1 + scale.distance) * delta,
                )
            )
        return found

    def _projected(self, projection: _Projection) -> list[_Member] | None:
        """The step with the shortest change; None where halves are of one block."""
        if len(projection.size) < 4:
            return None
        lengths = [projection.solve(number, self._target) for number in (1, 2)]
        changes = [self.measured.step.delta.clone() for _ in lengths]
        layout = self.session.passes.layout
        views = [layout.views(change) for change in changes]
        for name, parts in _plain_parts(self.session, self.measured):
            _, *slopes = self.slopes.values_of(name)
            for half, (view, slope) in enumerate(zip(views, slopes, strict=True)):
                mu = (lengths[half] or 0.0) / self.parts[half]
                view[name] += (mu * parts.gain.cpu() * slope).to(view[name])
        return [
            _Member(
                parameter=projection.length(1 + half, mu),
                reached=mu is not None,
                change=change,
            )
            for half, (mu, change) in enumerate(zip(lengths, changes, strict=True))
        ]

    def _reweighted(self, name: str) -> list[_Member]:
        """The step of a gradient with other weights, or with a bonus."""
        _, blocks, _ = _found(self.measured)
        family, plain = self.families[name], self.measured.gradient
        assert plain is not None
        slope = None
        if name in SUMS_OF_TWO:
            slope = self._gradient(self._slope_weights(name), f"{name}, its slope")
        found = []
        for half, part in enumerate(self.parts):
            places, wanted = torch.arange(half, blocks.count, 2), self._target * part
            asked: list[float] = []

            def gradient_at(
                distance: float,
                places: Tensor = places,
                wanted: float = wanted,
                asked: list[float] = asked,
                label: str = f"{name}, half {half + 1}",
            ) -> Tensor:
                if slope is not None:
                    return torch.add(plain, slope, alpha=distance)
                assert isinstance(family, TokenFamily)
                asked.append(distance)
                weights = family.weights(places, wanted, distance)
                return self._gradient(
                    self._other_weights(name, weights), f"{label}, {len(asked)}"
                )

            guess = family.solve(places, wanted).distance
            found.append(self._corrected(name, half, guess, gradient_at))
        return found

    def _corrected(
        self,
        name: str,
        half: int,
        guess: float,
        gradient_at: Callable[[float], Tensor],
    ) -> _Member:
        """The member whose own step has the first-order change that is wanted.

        Args:
            guess: its distance from the plain loss, with the gain held fixed.
            gradient_at: the gradient at a distance.
        """
        plain, exact = self.measured.gradient, name in SUMS_OF_TWO
        assert plain is not None
        # The best of those that were asked: how far off, and its gradient.
        best = (abs(self._plain[half] - self._target), plain)

        def value_at(distance: float) -> float:
            nonlocal best
            gradient = gradient_at(distance)
            value = self._first_orders(self._step_of(gradient))[half]
            if abs(value - self._target) < best[0]:
                best = (abs(value - self._target), gradient)
            return value

        distance, _, reached = corrected(
            value_at,
            self._plain[half],
            guess,
            self._target,
            self.families[name].limits,
            tolerance=FINE_TOLERANCE if exact else TOLERANCE,
            most=MOST_SUMS if exact else MOST_GRADIENTS,
        )
        _, gradient = best
        norm_of = self.session.passes.norm
        norm = norm_of(plain)
        return _Member(
            parameter=NEUTRAL[name] + distance,
            reached=reached,
            change=self._step_of(gradient),
            gradient_change=norm_of(gradient - plain) / norm if norm else None,
        )

    def _step_of(self, gradient: Tensor) -> Tensor:
        """The change of the parameters that AdamW makes of a gradient, flat, [P]."""
        session, update = self.session, self.session.config.update
        assert session.optimizer is not None
        clip = clip_coefficient(update.max_grad_norm, session.passes.norm(gradient))
        layout = session.passes.layout
        change = torch.empty_like(self.measured.step.delta)
        views, gradients = layout.views(change), layout.views(gradient)
        for name, parts in step_parts(
            session.optimizer,
            session.passes.parameters,
            gradient,
            replace(self.measured.step, clip_coef=clip),
            update,
        ):
            views[name].copy_(parts.change(gradients[name]))
        return change

    def _first_orders(self, change: Tensor) -> tuple[float, float]:
        """First-order change by a change of the parameters, as either half sees it."""
        views = self.session.passes.layout.views(change)
        sums = [0.0, 0.0]
        for name, view in views.items():
            _, *slopes = self.slopes.values_of(name)
            for half, slope in enumerate(slopes):
                sums[half] += inner_product(slope, view)
        sums = self.session.passes.layers.totals(sums)
        return sums[0] / self.parts[0], sums[1] / self.parts[1]

    def _gradient(self, weights: TokenWeights, name: str) -> Tensor:
        """Gradient over U with other weights, flat, [P]."""
        session = self.session
        shard = session.shard("U")

        def pull_back() -> PassResult:
            flat, _ = summed_gradient(
                session, session.passes, shard, weights, as_trained=True
            )
            return PassResult(vectors={"gradient": flat})

        phase = "what would hold: gradient of U"
        found = session.pass_over(shard, phase, pull_back, kept_as=f"{phase}, {name}")
        return found.vectors["gradient"]

    def _other_weights(self, name: str, weights: Tensor) -> TokenWeights:
        """dL / d log p of every token with other weights, [T] of all of U.

        Those of advantages leave the KL term as it is; a token that is left out has none.
        """
        session = self.session
        own = weights[token_places(session.batches["U"], session.shard("U"))]
        whole = update_weights(session)
        weighed = whole if name == LEFT_OUT else policy_weights(session)

        def weights_of(
            token: Tensor, logp: Tensor, entropy: Tensor
        ) -> tuple[Tensor, Tensor]:
            on_logp, on_entropy = whole(token, logp, entropy)
            part, _ = weighed(token, logp, entropy)
            return on_logp + (own[token.cpu()].to(part) - 1) * part, on_entropy

        return weights_of

    def _slope_weights(self, name: str) -> TokenWeights:
        """The derivative of a family's dL / d log p and dL / dH by its parameter."""
        session, family = self.session, self.families[name]
        if isinstance(family, LineFamily):
            share = -1 / max(session.batches["U"].num_tokens, 1)

            def bonus(
                token: Tensor, logp: Tensor, entropy: Tensor
            ) -> tuple[Tensor, Tensor]:
                return torch.zeros_like(logp), torch.full_like(entropy, share)

            return bonus
        assert family.coefficient is not None
        places = token_places(session.batches["U"], session.shard("U"))
        own, weighed = family.coefficient[places], policy_weights(session)

        def slope(
            token: Tensor, logp: Tensor, entropy: Tensor
        ) -> tuple[Tensor, Tensor]:
            part, on_entropy = weighed(token, logp, entropy)
            return own[token.cpu()].to(part) * part, on_entropy

        return slope


def _truth(half: Evaluation, change: Tensor, name: str) -> EntropyChange:
    """The change of the entropy of a half of E by a change of the parameters."""
    session, phase = half.session, "what would hold: step taken"
    take = partial(
        given_change,
        session.policy.parameters,
        change,
        session.config.update,
        session.snapshot_device,
        session.passes.layers.totals,
    )
    return truth_after(half, take, phase, kept_as=f"{phase}, {name}")


def _found(measured: Measurements) -> tuple[TokenTable, BlockShares, HoldSums]:
    """What an attribution left."""
    assert measured.token_table is not None and measured.block_shares is not None
    assert measured.hold_sums is not None
    return measured.token_table, measured.block_shares, measured.hold_sums


def _plain_parts(
    session: Session, measured: Measurements
) -> Iterator[tuple[str, StepParts]]:
    """The parts of the step as it was taken."""
    assert measured.gradient is not None and session.optimizer is not None
    return step_parts(
        session.optimizer,
        session.passes.parameters,
        measured.gradient,
        measured.step,
        session.config.update,
    )


def _cosine(passes: Passes, one: Tensor, other: Tensor) -> float | None:
    """Of the angle between two vectors; None if either is 0."""
    norms = passes.norm(one) * passes.norm(other)
    return passes.inner_product(one, other) / norms if norms else None
