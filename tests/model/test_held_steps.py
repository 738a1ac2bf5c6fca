"""Would the members of each family have held the entropy, as brute force takes them?

Weights, gradients, AdamW's step and first-order changes are made again from their written
formulas in float64, one token at a time, and every parameter is searched for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from jobs import run_attribution
from naive_attribution import (
    LEARNING_RATE,
    Direction,
    effect_along,
    naive_block_gradients,
    naive_blocks,
    naive_parts,
)
from reference import LossSettings
from thread_ranks import run_thread_ranks
from tiny_runs import TinyRun, make_run
from torch import Tensor

from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.model.parameters import fingerprint
from entropy_ddp.probe import holding, pipeline
from entropy_ddp.probe.session import Session
from entropy_ddp.results import Probed
from entropy_ddp.update.step import optimizer_tensors

pytestmark = pytest.mark.usefixtures("models_checked_once")

RTOL = 1e-8  # of a parameter that two searches find
VERIFIED_RTOL = 1e-7  # of a change of the entropy by a step that two searches find
BLOCKS = 4
MAX_GRAD_NORM = 0.1
NEUTRAL = {
    "repo": 0.0,
    "improbable_failures": 1.0,
    "tokens_left_out": 0.0,
    "entropy_coefficient": 0.0,
    "projection": 0.0,
    "learning_rate": 1.0,
}
TOKEN_FAMILIES = ("repo", "improbable_failures", "tokens_left_out")
SOLVED = (*TOKEN_FAMILIES, "entropy_coefficient")
LIMITS = {
    "repo": (-1.0, 1.0),
    "improbable_failures": (-1.0, 1.0),
    "entropy_coefficient": (-1.0, 1.0),
}
# As shares of the plain change; the last is out of reach of all but some.
TARGETS = {"less": 0.85, "more": 1.02, "much": -3.0}


@dataclass(frozen=True, kw_only=True, eq=False)
class OtherRun(TinyRun):
    """A run whose loss has other weights, [T], and a bonus on U's mean entropy."""

    weights: Tensor
    bonus: float = 0.0

    def gradient(
        self, settings: LossSettings, advantage: str = "centered"
    ) -> dict[str, Tensor]:
        """The plain one and what weights and bonus change, term by term."""
        plain = super().gradient(settings, advantage)
        more = torch.zeros((), dtype=torch.float64)
        terms = zip(token_terms(self), self.weights.tolist(), strict=True)
        for (loss, entropy), weight in terms:
            more = more + (weight - 1) * loss - self.bonus * entropy
        parameters = ref.trainable(self.saved.model)
        values = torch.autograd.grad(more, list(parameters.values()))
        return {
            name: plain[name] + value
            for name, value in zip(parameters, values, strict=True)
        }


def token_terms(run: TinyRun) -> list[tuple[Tensor, Tensor]]:
    """-A log p / (N_b G_b L_b) and H / T of every token of U, differentiable."""
    total = sum(len(row.response_ids) for row in run.U)
    num_groups = len({row.group for row in run.U})
    terms = []
    for row, advantage in zip(run.U, ref.advantages(run.U, "centered"), strict=True):
        lengths = [len(r.response_ids) for r in run.U if r.group == row.group]
        divisor = num_groups * len(lengths) * max(lengths)
        logp, entropy = ref.token_scores(run.saved.model, row, 1.0)
        terms += [
            (-advantage * x / divisor, h / total)
            for x, h in zip(logp, entropy, strict=True)
        ]
    return terms


@dataclass(frozen=True, kw_only=True)
class Naive:
    """A run by brute force.

    `effects` [T, K] and `bonus` [K] are what blocks of E add to shares and to a unit of
    the bonus, `others` [K] to momentum and decay, `sizes` [K] to the denominator.
    """

    run: TinyRun
    loss: LossSettings
    effects: Tensor
    bonus: Tensor
    others: Tensor
    sizes: Tensor
    blocks: list[Direction]
    gain: Direction
    delta: Direction
    logp: Tensor
    advantage: Tensor

    def wanted(self, places: list[int], target: float) -> float:
        return target * float(self.sizes[places].sum())

    def weights(
        self, family: str, distance: float, places: list[int], target: float
    ) -> Tensor:
        """The weights of a member, token by token."""
        if family == "tokens_left_out":
            return self.left_out(distance, places, target)
        found = []
        for x, a in zip(self.logp.tolist(), self.advantage.tolist(), strict=True):
            sign = (a > 0) - (a < 0)
            if family == "repo":
                found.append(max(0.0, 1 - distance * sign * x))
            else:
                chosen = a < 0 and math.exp(x) < 0.5
                found.append(1 + distance if chosen else 1.0)
        return torch.tensor(found, dtype=torch.float64)

    def left_out(self, count: float, places: list[int], target: float) -> Tensor:
        shares = self.effects[:, places].sum(1)
        # To three digits: what differs by rounding is equal.
        digits = [float(f"{share:.3g}") for share in shares.tolist()]
        value = float(self.others[places].sum() + shares.sum())
        sign = 1 if self.wanted(places, target) > value else -1
        weights = torch.ones_like(shares)
        for t in sorted(range(len(digits)), key=lambda t: sign * digits[t]):
            if sign * digits[t] >= 0:
                break
            weights[t] -= min(1.0, max(0.0, count))
            count -= 1
        return weights

    def added(
        self, family: str, distance: float, places: list[int], target: float
    ) -> Tensor:
        """What every block adds to the first-order change of a member, [K]."""
        plain = self.others + self.effects.sum(0)
        if family == "entropy_coefficient":
            return plain + distance * self.bonus
        weights = self.weights(family, distance, places, target)
        return self.others + weights @ self.effects

    def limits(self, family: str) -> tuple[float, float]:
        return LIMITS.get(family, (0.0, float(len(self.effects))))

    def search(self, family: str, places: list[int], target: float) -> float:
        """The nearest distance at which it is what is wanted; or nearest to that."""
        wanted = self.wanted(places, target)

        def missed(distance: float) -> float:
            added = self.added(family, distance, places, target)
            return float(added[places].sum()) - wanted

        low, high = self.limits(family)
        found, grids = [], []
        for end in (high, low):
            grid = [end * k / 300 for k in range(301)]
            values = [missed(x) for x in grid]
            grids += list(zip(map(abs, values), grid, strict=True))
            for a, b, left, right in zip(
                grid, grid[1:], values, values[1:], strict=False
            ):
                if left * right < 0:
                    found.append(bisected(missed, a, b))
                    break
        return min(found, key=abs) if found else min(grids)[1]

    def other_run(
        self, family: str, distance: float, places: list[int], target: float
    ) -> OtherRun:
        """The run with the loss of a member."""
        weights, bonus = torch.ones(len(self.effects), dtype=torch.float64), 0.0
        if family == "entropy_coefficient":
            bonus = distance
        else:
            weights = self.weights(family, distance, places, target)
        return OtherRun(**vars(self.run), weights=weights, bonus=bonus)

    def step(self, run: TinyRun) -> Direction:
        return run.naive_step(
            self.loss, max_grad_norm=MAX_GRAD_NORM, learning_rate=LEARNING_RATE
        ).delta

    def seen(self, delta: Direction, places: list[int]) -> float:
        """First-order change by a step as some blocks see it."""
        whole = math.fsum(effect_along(self.blocks[b], delta) for b in places)
        return whole / float(self.sizes[places].sum())

    def truth(self, delta: Direction, number: int) -> ref.Truth:
        """What a step does to the rows of the even (0) or the odd (1) blocks."""
        places = naive_blocks(self.run.E, BLOCKS)
        pairs = zip(self.run.E, places, strict=True)
        rows = [row for row, block in pairs if block % 2 == number]
        model = self.run.saved.model
        old = ref.scores(model, rows, 1.0)
        with ref.parameters_shifted(model, delta, 1.0):
            new = ref.scores(model, rows, 1.0)
        return ref.delta_h_true(rows, old, new, ref.Objective())


def bisected(missed: Callable[[float], float], low: float, high: float) -> float:
    left = missed(low)
    for _ in range(100):
        middle = (low + high) / 2
        value = missed(middle)
        if value * left > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@cache
def naive(run: TinyRun, loss: LossSettings) -> Naive:
    """Every token's gradient, and what blocks of E see of it."""
    parameters = ref.trainable(run.saved.model)
    gradient = run.gradient(loss)
    parts = naive_parts(run, gradient, MAX_GRAD_NORM)
    blocks = naive_block_gradients(run, BLOCKS)

    def seen(value: Tensor) -> list[float]:
        own = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
        direction = parts.of_gradient(dict(zip(parameters, own, strict=True)))
        return [effect_along(block, direction) for block in blocks]

    terms = token_terms(run)
    sizes = torch.zeros(BLOCKS, dtype=torch.float64)
    for block, row in zip(naive_blocks(run.E, BLOCKS), run.E, strict=True):
        sizes[block] += len(row.response_ids)
    scored = [ref.token_scores(run.saved.model, row, 1.0)[0].detach() for row in run.U]
    values = ref.advantages(run.U, "centered")
    found = Naive(
        run=run,
        loss=loss,
        effects=torch.tensor([seen(loss) for loss, _ in terms], dtype=torch.float64),
        bonus=-torch.tensor([seen(h) for _, h in terms], dtype=torch.float64).sum(0),
        others=torch.tensor(
            [
                effect_along(block, parts.momentum) + effect_along(block, parts.decay)
                for block in blocks
            ],
            dtype=torch.float64,
        ),
        sizes=sizes / sizes.sum(),
        blocks=blocks,
        gain=parts.gain,
        delta={},
        logp=torch.cat(scored),
        advantage=torch.tensor(
            [a for a, x in zip(values, scored, strict=True) for _ in x],
            dtype=torch.float64,
        ),
    )
    return replace(found, delta=found.step(run))


def quiet(phase: str, done: int, total: int) -> None:
    """Shows no progress."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """With an E of which either half says nearly the same."""
    found = make_run(tmp_path_factory.mktemp("gpt2"), "gpt2")
    drawn = ref.random_rows(3, groups=200, responses=1, vocabulary=13, with_empty=True)
    return replace(
        found,
        E=ref.drawn_from(found.saved.model, drawn, 6),
        U=[*found.U[::3], *found.U[1::3], *found.U[2::3]],
    )


@pytest.fixture(scope="module")
def small(run: TinyRun) -> TinyRun:
    """The same with less of E."""
    return replace(run, E=run.E[:40])


@pytest.fixture(scope="module")
def taken(run: TinyRun) -> dict[str, dict[str, Any]]:
    """The families, corrected and taken; they leave the session as it was."""
    opened: list[tuple[Session, str]] = []
    open_session = pipeline.open_session

    def open_and_remember(*arguments: Any) -> Session:
        session = open_session(*arguments)
        opened.append((session, session_fingerprint(session)))
        return session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "open_session", open_and_remember)
        rows = rows_of(attribute(run, hold=target_of(run, "less"), verify=True))
    ((session, before),) = opened
    assert session_fingerprint(session) == before
    return rows


def config_of(run: TinyRun, *, hold: float, **attribution: Any) -> Config:
    return run.config(
        compute={"device": "cpu", "tokens_per_microbatch": 250},
        update={"max_grad_norm": MAX_GRAD_NORM, "lr_override": LEARNING_RATE},
        truth={"is_mode": "snis"},
        linear={"score": "full", "baseline": "none"},
        attribution={"blocks": BLOCKS, "hold": hold, **attribution},
    )


def attribute(run: TinyRun, **settings: Any) -> Probed:
    return run_attribution(config_of(run, **settings), World(), None, quiet)


def rows_of(probed: Probed) -> dict[str, dict[str, Any]]:
    """The families of an attribution, by name."""
    found = probed.results.to_dict()["attribution"]["would_hold"]
    return {row["family"]: row for row in found["families"]}


@cache
def plain_change(run: TinyRun) -> float:
    found = naive(run, LossSettings())
    return float(found.others.sum() + found.effects.sum())


def target_of(run: TinyRun, name: str) -> float:
    return TARGETS[name] * plain_change(run)


@pytest.mark.parametrize("name", TARGETS)
def test_parameters_are_those_that_a_search_finds(run: TinyRun, name: str) -> None:
    """The gain held fixed; on all of E, and either half's judged by the other."""
    target = target_of(run, name)
    brute, rows = naive(run, LossSettings()), rows_of(attribute(run, hold=target))
    assert list(rows) == list(NEUTRAL)
    whole = list(range(BLOCKS))
    reached = []
    for family in SOLVED:
        row = rows[family]
        distance = brute.search(family, whole, target)
        low, high = brute.limits(family)
        assert row["parameter"] == pytest.approx(
            NEUTRAL[family] + distance,
            rel=RTOL,
            abs=(high - low) / 299 * row["saturated"],
        )
        value = float(brute.added(family, distance, whole, target).sum())
        assert row["saturated"] == (abs(value - target) > 1e-12)
        reached.append(not row["saturated"])
        if row["saturated"]:
            continue
        assert row["delta_h1"] == pytest.approx(target, rel=RTOL)
        added = torch.zeros(BLOCKS, dtype=torch.float64)
        for half in (0, 1):
            other = whole[1 - half :: 2]
            own = brute.search(family, other, target)
            found = brute.added(family, own, other, target)
            added[half::2] = found[half::2]
        crossed = float(added.sum())
        scale = abs(target)
        assert row["delta_h1_cross_fitted"] == pytest.approx(crossed, abs=RTOL * scale)
        squares = (added - crossed * brute.sizes).square().sum()
        error = math.sqrt(BLOCKS / (BLOCKS - 1) * float(squares))
        assert row["se"] == pytest.approx(error, rel=1e-6)
        at = brute.added(family, distance, whole, target)
        squares = (at - target * brute.sizes).square().sum()
        step = 1e-6
        rise = (
            float(brute.added(family, distance + step, whole, target).sum())
            - float(brute.added(family, distance - step, whole, target).sum())
        ) / (2 * step)
        own_error = math.sqrt(BLOCKS / (BLOCKS - 1) * float(squares)) / abs(rise)
        assert row["parameter_se"] == pytest.approx(own_error, rel=1e-4)
    assert all(reached) == (name != "much")
    scale = 1 - target / plain_change(run)
    assert rows["learning_rate"]["saturated"] == (name == "much")
    if name != "much":
        assert rows["learning_rate"]["parameter"] == pytest.approx(1 - scale, rel=RTOL)


def test_shares_of_tokens_that_change(
    run: TinyRun, taken: dict[str, dict[str, Any]]
) -> None:
    """Weights that differ from 1 by more than a hundredth."""
    target, brute = target_of(run, "less"), naive(run, LossSettings())
    for family in TOKEN_FAMILIES:
        distance = taken[family]["parameter"] - NEUTRAL[family]
        weights = brute.weights(family, distance, list(range(BLOCKS)), target)
        changed = sum(abs(w - 1) > 0.01 for w in weights.tolist())
        assert taken[family]["token_fraction"] == changed / len(weights)
    assert "token_fraction" not in taken["projection"]


def secants(
    value_at: Callable[[float], float], plain: float, guess: float, target: float,
    limits: tuple[float, float], tolerance: float, most: int,
) -> float:  # fmt: skip
    """The documented search, written again."""
    points = [(0.0, plain)]
    x = guess
    while len(points) <= most:
        if abs(points[-1][1] - target) <= tolerance * abs(plain - target):
            break
        x = min(max(x, limits[0]), limits[1])
        if x in [distance for distance, _ in points]:
            break
        points.append((x, value_at(x)))
        (a, left), (b, right) = points[-2:]
        x = b + (target - right) * (b - a) / (right - left)
    return min(points, key=lambda point: abs(point[1] - target))[0]


def test_members_are_corrected_and_taken(
    run: TinyRun, taken: dict[str, dict[str, Any]]
) -> None:
    """By naive gradients and naive steps of AdamW, its denominator and clipping anew."""
    target = target_of(run, "less")
    brute = naive(run, LossSettings())
    plain_gradient = run.gradient(LossSettings())
    halves = ([0, 2], [1, 3])
    sizes = [float(brute.sizes[places].sum()) for places in halves]
    for family in SOLVED:
        exact = family in ("improbable_failures", "entropy_coefficient")
        parameter = linear = truth = error = cosine = changed = 0.0
        reached = []
        for number, places in enumerate(halves):

            def value_at(
                distance: float,
                family: str = family,
                places: list[int] = places,
            ) -> float:
                other = brute.other_run(family, distance, places, target)
                return brute.seen(brute.step(other), places)

            distance = secants(
                value_at,
                brute.seen(brute.delta, places),
                brute.search(family, places, target),
                target,
                brute.limits(family),
                1e-5 if exact else 0.01,
                40 if exact else 4,
            )
            other = brute.other_run(family, distance, places, target)
            delta, size = brute.step(other), sizes[number]
            missed = brute.seen(delta, places) - target
            missing = brute.seen(brute.delta, places) - target
            reached.append(abs(missed) <= (1e-5 if exact else 0.01) * abs(missing))
            parameter += size * (NEUTRAL[family] + distance)
            judge = 1 - number
            linear += sizes[judge] * brute.seen(delta, halves[judge])
            found = brute.truth(delta, judge)
            truth += sizes[judge] * found.delta_h_true
            error = math.hypot(error, sizes[judge] * found.se)
            cosine += (
                size
                * effect_along(delta, brute.delta)
                / (length(delta) * length(brute.delta))
            )
            gradient = other.gradient(LossSettings())
            more = {n: g - plain_gradient[n] for n, g in gradient.items()}
            changed += size * length(more) / length(plain_gradient)
        row = taken[family]
        # An exact search ends where the one here does, to the rounding of its steps.
        assert row["parameter_taken"] == pytest.approx(parameter, rel=1e-6), family
        for key, value in (
            ("delta_h1_taken", linear),
            ("delta_h_true", truth),
            ("delta_h_true_se", error),
            ("cosine", cosine),
            ("gradient_change", changed),
        ):
            assert row[key] == pytest.approx(value, rel=1e-5), (family, key)
        assert row["saturated_taken"] == (not all(reached))
        assert all(reached), family
    scales = [target / brute.seen(brute.delta, places) for places in halves]
    row = taken["learning_rate"]
    mean = sum(s * size for s, size in zip(scales, sizes, strict=True))
    assert row["parameter_taken"] == pytest.approx(mean, rel=RTOL)
    assert row["cosine"] == pytest.approx(1.0)
    truth = sum(
        sizes[judge]
        * brute.truth(
            {n: scales[1 - judge] * d for n, d in brute.delta.items()}, judge
        ).delta_h_true
        for judge in (0, 1)
    )
    assert row["delta_h_true"] == pytest.approx(truth, rel=VERIFIED_RTOL)


def length(direction: Direction) -> float:
    return math.sqrt(effect_along(direction, direction))


def session_fingerprint(session: Session) -> str:
    """Hash of every parameter and of every tensor of the optimizer state."""
    assert session.optimizer is not None
    state = optimizer_tensors(session.optimizer)
    return fingerprint([*session.policy.model.named_parameters(), *state])


def test_projection_is_along_the_products_of_different_blocks(
    run: TinyRun, taken: dict[str, dict[str, Any]]
) -> None:
    """And its length is that of the change over the step's, in the gain's metric."""
    target, row = target_of(run, "less"), taken["projection"]
    brute = naive(run, LossSettings())

    def product(left: Direction, right: Direction) -> float:
        return sum(float((left[n] * brute.gain[n] * right[n]).sum()) for n in left)

    def along(places: list[int]) -> tuple[float, Direction, float]:
        """mu, the change, and its length over the step's; 0 where up is not known."""
        pairs = [
            product(brute.blocks[a], brute.blocks[b])
            for a in places
            for b in places
            if a != b
        ]
        count, size = len(places), float(brute.sizes[places].sum())
        slope = count / (count - 1) * math.fsum(pairs) / size**2
        mu = 0.0
        if slope > 0:
            mu = (target - brute.seen(brute.delta, places)) / slope
        change = {
            n: mu * brute.gain[n] * sum(brute.blocks[b][n] for b in places) / size
            for n in brute.gain
        }
        return mu, change, metric(change) / metric(brute.delta)

    def metric(direction: Direction) -> float:
        return math.sqrt(
            sum(float((d.square() / brute.gain[n]).sum()) for n, d in direction.items())
        )

    *_, relative = along(list(range(BLOCKS)))
    assert row["parameter"] == pytest.approx(relative, rel=1e-6)
    halves = ([0, 2], [1, 3])
    sizes = [float(brute.sizes[places].sum()) for places in halves]
    of_halves = [along(places) for places in halves]
    mean = sum(s * x for s, (*_, x) in zip(sizes, of_halves, strict=True))
    assert row["parameter_taken"] == pytest.approx(mean, rel=1e-6)
    known = [bool(mu) for mu, *_ in of_halves]
    assert row["saturated_taken"] == (not all(known)) and any(known)
    assert not row["saturated"]
    truth = 0.0
    for judge in (0, 1):
        _, change, _ = of_halves[1 - judge]
        delta = {n: d + change[n] for n, d in brute.delta.items()}
        truth += sizes[judge] * brute.truth(delta, judge).delta_h_true
    assert row["delta_h_true"] == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(("target", "known"), [(0.0, True), (0.1, True), (-9.0, False)])
def test_a_projection_has_an_error_where_the_change_s_is_the_larger(
    target: float, known: bool
) -> None:
    """That of the slope is not in it: it would be a tenth of a parameter of hundreds."""
    blocks = torch.ones(8, dtype=torch.float64)
    projection = holding._Projection(
        total=(blocks + 0.1 * torch.arange(-4, 4)) / 80,
        size=blocks / 8,
        own=blocks / 100,
        squares=[1.0],
        step=1.0,
    )
    row = projection.row(target)
    assert row["parameter"] > 0 and not row["saturated"]
    assert ("parameter_se" in row) == known


def test_three_ranks_find_what_one_does(run: TinyRun) -> None:
    """One of them has no sequence of U."""
    few = replace(run, E=run.E[:40], U=[row for row in run.U if row.group < 2][:2])
    config = config_of(few, hold=0.97 * plain_change(run), verify=True)
    alone = rows_of(run_attribution(config, World(), None, quiet))
    ranks = run_thread_ranks(
        3, lambda world: rows_of(run_attribution(config, world, None, quiet))
    )
    for found in ranks:
        assert found.keys() == alone.keys()
        for family, row in found.items():
            assert row.keys() == alone[family].keys()
            for key, value in row.items():
                expected = alone[family][key]
                if isinstance(value, float):
                    expected = pytest.approx(expected, rel=1e-6, abs=1e-12)
                assert value == expected, (family, key)


def test_without_a_gradient_the_weights_hold_nothing(small: TinyRun) -> None:
    """Equal rewards: only a bonus, a projection or another learning rate does."""
    equal = replace(small, U=[replace(row, reward=0.1) for row in small.U])
    rows = rows_of(attribute(equal, hold=0.0, verify=True))
    for family in TOKEN_FAMILIES:
        row = rows[family]
        assert row["parameter"] == row["parameter_taken"] == NEUTRAL[family]
        assert row["saturated"] and row["saturated_taken"]
        assert row["token_fraction"] == 0
        assert "gradient_change" not in row
    row = rows["learning_rate"]
    assert row["parameter"] == row["delta_h_true"] == 0
    assert "cosine" not in row


def test_no_step_has_no_change_to_project(tmp_path: Path) -> None:
    """Before the first step, without decay and with equal rewards: only a bonus acts."""
    run = make_run(tmp_path, "gpt2")
    optimizer = run.saved.optimizer
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for entry in optimizer.state.values():
        entry["exp_avg"].zero_()
    torch.save(optimizer.state_dict(), run.saved.folder / "optimizer.pt")
    still = replace(run, U=[replace(row, reward=0.1) for row in run.U])
    rows = rows_of(attribute(still, hold=1e-4))
    for family in ("repo", "improbable_failures", "tokens_left_out", "learning_rate"):
        assert rows[family]["saturated"]
    assert rows["projection"] == {
        "family": "projection",
        "parameter": 0.0,
        "saturated": True,
        "delta_h1": 0.0,
    }
    assert rows["entropy_coefficient"]["parameter"] != 0


def test_what_the_step_does_needs_no_change(small: TinyRun) -> None:
    first = attribute(small, hold=0.0).results.attribution
    assert first is not None
    rows = rows_of(attribute(small, hold=first.total))
    for family, row in rows.items():
        assert row["parameter"] == pytest.approx(NEUTRAL[family], abs=1e-9), family
        assert not row["saturated"]


@pytest.mark.parametrize("blocks", [2, 3])
def test_few_blocks(small: TinyRun, blocks: int) -> None:
    """Of two there is no error, and of less than four no half of a projection."""
    rows = rows_of(attribute(small, hold=0.0, verify=True, blocks=blocks))
    assert ("se" in rows["entropy_coefficient"]) == (blocks > 2)
    assert "parameter_taken" not in rows["projection"]
    assert "parameter_taken" in rows["repo"]


def test_a_KL_term_is_weighed_by_nothing(run: TinyRun) -> None:
    """What weighs advantages leaves it; a token that is left out has none of it."""
    loss = LossSettings(kl_coefficient=0.5)
    brute = naive(run, loss)
    parts = naive_parts(run, run.gradient(loss), MAX_GRAD_NORM)
    total = sum(effect_along(block, brute.delta) for block in brute.blocks)
    config = config_of(run, hold=0.99 * total)
    update = config.update.model_copy(update={"kl_coefficient": 0.5})
    probed = run_attribution(
        config.model_copy(update={"update": update}), World(), None, quiet
    )
    # What the advantages' terms do, with the gain of the whole loss; and the KL term's.
    kl = total - float(brute.others.sum() + brute.effects.sum())
    assert abs(kl) > 0
    brute = replace(
        brute,
        others=brute.others + kl * brute.sizes,
        gain=parts.gain,
    )
    rows = rows_of(probed)
    for family in ("repo", "improbable_failures"):
        distance = brute.search(family, list(range(BLOCKS)), 0.99 * total)
        assert not rows[family]["saturated"]
        assert rows[family]["parameter"] == pytest.approx(
            NEUTRAL[family] + distance, rel=1e-6
        )
