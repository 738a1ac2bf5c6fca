"""Does the gradient-dot form report what one backward pass per sequence gives?

Every X_u and Y_u is formed by plain autograd on the full logits, one sequence or one
group at a time, and everything that is reported from those vectors: norms, products,
variances, the U-statistic. Y_u of a step is also checked to add up, with momentum and
weight decay, to the step that torch takes.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from thread_ranks import run_thread_ranks
from tiny_runs import TinyRun, as_batch, make_run
from torch import Tensor
from unit_vectors import Vectors

from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.model.counting import PassCount
from entropy_ddp.model.response_tokens import DirectionalScores
from entropy_ddp.probe.gradient_dot import (
    GradientDot,
    GradientDotResult,
    gradient_dot,
    obstacle,
    proxy_gradient_norm,
    same_rollouts,
)
from entropy_ddp.probe.opening import open_session
from entropy_ddp.probe.passes import (
    loss_gradient,
    score_after_step,
    score_along_step,
)
from entropy_ddp.probe.session import Session, no_progress
from entropy_ddp.update.decomposition import step_parts
from entropy_ddp.update.step import Step

pytestmark = pytest.mark.usefixtures("models_checked_once")

RTOL = 1e-10  # the contract's bar for float64
E_RESPONSES = [2, 3, 2, 4]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-lora": ("qwen2", {}),
    "gpt2-full-tied": ("gpt2", {"full": True}),
}
LOSSES: dict[str, dict[str, Any]] = {
    "dr_grpo": {"max_grad_norm": 0.1},
    "grpo": {"loss": "grpo", "max_grad_norm": 0.0, "lr_override": 0.02},
    "dapo": {"loss": "dapo", "max_grad_norm": 0.1},
    "nll": {"loss": "nll", "max_grad_norm": 0.1},
    "clipped": {"ratio": "clipped", "length_norm": 7, "max_grad_norm": 0.1},
}
MEASURED = [("qwen2-lora", loss) for loss in LOSSES] + [("gpt2-full-tied", "dr_grpo")]
FORMS = [
    GradientDot(enabled=True, direction=direction, weighting=weighting)
    for direction in ("step", "preconditioned")
    for weighting in ("dr_grpo", "per_token_avg")
]
DIRECTIONS_AND_METHODS = list(
    itertools.product(("step", "preconditioned"), ("jvp", "backward"))
)
RunMaker = Callable[[str], TinyRun]


@pytest.fixture(scope="module")
def make_named_run(tmp_path_factory: pytest.TempPathFactory) -> RunMaker:
    """Each checkpoint is written once; E has groups of two to four responses."""

    @cache
    def make(name: str) -> TinyRun:
        family, options = CASES[name]
        run = make_run(tmp_path_factory.mktemp(name), family, **options)
        vocabulary = run.saved.model.config.vocab_size
        rows = ref.random_rows(
            8, groups=4, responses=E_RESPONSES, vocabulary=vocabulary, with_empty=True
        )
        return replace(run, E=rows)

    return make


# The same by the package


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A session after the passes that a probe makes anyway."""

    session: Session
    gradient: Tensor
    step: Step
    base: DirectionalScores

    @classmethod
    def of(cls, session: Session) -> "Opened":
        gradient, _ = loss_gradient(session)
        step, _, _ = score_after_step(session, gradient)
        base = score_along_step(session, step).scores
        return cls(session=session, gradient=gradient, step=step, base=base)

    def result(self, settings: GradientDot) -> GradientDotResult:
        found = gradient_dot(
            self.session, self.step, self.gradient, self.base, settings
        )
        assert found is not None
        return found

    @property
    def delta(self) -> Tensor:
        return self.step.delta


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A run with its session and its vectors, which are remembered."""

    vectors: Vectors
    opened: Opened
    known: dict[str, Tensor] = field(default_factory=dict)

    def x(self, weighting: str) -> Tensor:
        if f"x {weighting}" not in self.known:
            self.known[f"x {weighting}"] = self.vectors.x(weighting)
        return self.known[f"x {weighting}"]

    def y(self, direction: str) -> Tensor:
        if f"y {direction}" not in self.known:
            clip_coef = self.opened.step.clip_coef
            self.known[f"y {direction}"] = self.vectors.y(direction, clip_coef)
        return self.known[f"y {direction}"]

    def y_bar(self, direction: str) -> Tensor:
        mean = self.y(direction).mean(0)
        return self.opened.delta if direction == "step" else mean


@pytest.fixture(scope="module", params=MEASURED, ids="-".join)
def case(request: pytest.FixtureRequest, make_named_run: RunMaker) -> Case:
    name, loss = request.param
    run = make_named_run(name)
    opened = Opened.of(run.open(update=LOSSES[loss]))
    return Case(vectors=Vectors(run=run, update=LOSSES[loss]), opened=opened)


def assert_close(found: float, expected: float, scale: float | None = None) -> None:
    bar = abs(expected if scale is None else scale)
    assert abs(found - expected) <= RTOL * bar, (found, expected)
    assert bar > 0


def variance(units: Tensor, along: Tensor) -> float:
    """sum_u <u - mean, along>^2 / (B (B - 1)), by a loop."""
    bar = units.mean(0)
    squares = [float((unit - bar) @ along) ** 2 for unit in units]
    return math.fsum(squares) / (len(units) * (len(units) - 1))


def expect(case: Case, settings: GradientDot) -> dict[str, Any]:
    """Every number of the result, from the vectors."""
    x, y = case.x(settings.weighting), case.y(settings.direction)
    x_bar, y_bar = x.mean(0), case.y_bar(settings.direction)
    rate = 1.0
    if settings.direction == "preconditioned":
        rate = case.opened.step.learning_rate
    dot = float(x_bar @ y_bar)
    V_X, V_Y = variance(x, y_bar), variance(y, x_bar)
    return {
        "bars_dot": dot,
        "u_cross": -dot,
        "deltaH1": rate * dot,
        "learning_rate": rate,
        "V_X": V_X,
        "V_Y": V_Y,
        "se_deltaH1": rate * math.sqrt(V_X + V_Y),
        "frac_var": (V_X + V_Y) / dot**2,
        "x_norm": float(x_bar.norm()),
        "y_norm": float(y_bar.norm()),
    }


@pytest.mark.parametrize("method", ["jvp", "backward"])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.direction}-{f.weighting}")
def test_every_number(case: Case, form: GradientDot, method: str) -> None:
    found = asdict(
        case.opened.result(form.model_copy(update={"variance_method": method}))
    )
    expected = expect(case, form)
    size = found["x_norm"] * found["y_norm"]
    scales = {"bars_dot": size, "u_cross": size, "frac_var": expected["frac_var"]}
    scales["deltaH1"] = size * expected["learning_rate"]
    for name, value in expected.items():
        assert_close(found.pop(name), value, scales.get(name))
    assert found == {
        "direction": form.direction,
        "weighting": form.weighting,
        "u_statistic": False,
        "se_paired": None,
    }
    assert min(expected["V_X"], expected["V_Y"]) > 0


def test_shares_of_the_step_add_up(case: Case) -> None:
    """momentum + decay + mean Y_u = delta theta, by the package and by hand."""
    opened, y_bar = case.opened, case.y("step").mean(0)
    momentum, decay, gain = (torch.empty_like(opened.delta) for _ in range(3))
    layout = opened.session.passes.layout
    for name, parts in step_parts(
        opened.session.optimizer,
        opened.session.policy.parameters,
        opened.gradient,
        opened.step,
        opened.session.config.update,
    ):
        layout.views(momentum)[name].copy_(parts.momentum)
        layout.views(decay)[name].copy_(parts.decay)
        layout.views(gain)[name].copy_(parts.gain)
    size = float(opened.delta.norm())
    total = momentum + decay - gain * opened.gradient
    assert float((total - opened.delta).norm()) <= 1e-12 * size
    assert float((total - momentum - decay - y_bar).norm()) <= RTOL * size
    assert min(float(part.norm()) for part in (momentum, decay, y_bar)) > 0.01 * size


# The same rollouts as E and as U


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.direction}-{f.weighting}")
def test_same_rollouts(make_named_run: RunMaker, form: GradientDot) -> None:
    """Pairs of different groups only; momentum and decay have no diagonal."""
    run = make_named_run("qwen2-lora")
    run = replace(run, E=[replace(row, reward=None) for row in run.U])
    update = LOSSES["dr_grpo"]
    case = Case(
        vectors=Vectors(run=run, update=update),
        opened=Opened.of(run.open(update=update)),
    )
    x, y = case.x(form.weighting), case.y(form.direction)
    x_bar, y_bar = x.mean(0), case.y_bar(form.direction)
    count = len(x)
    pairs = [(i, j) for i, j in itertools.product(range(count), repeat=2) if i != j]
    expected = float(x_bar @ (y_bar - y.mean(0)))
    expected += math.fsum(float(x[i] @ y[j]) for i, j in pairs) / len(pairs)
    without = [
        float(x[others].mean(0) @ (y_bar - y.mean(0)))
        + math.fsum(float(x[i] @ y[j]) for i, j in itertools.permutations(others, 2))
        / ((count - 1) * (count - 2))
        for others in ([v for v in range(count) if v != u] for u in range(count))
    ]
    mean = math.fsum(without) / count
    spread = (count - 1) / count * math.fsum((f - mean) ** 2 for f in without)
    results = [
        case.opened.result(form.model_copy(update={"variance_method": method}))
        for method in ("jvp", "backward")
    ]
    assert results[0] == results[1]
    (found, _) = results
    assert found.u_statistic
    assert_close(found.bars_dot, expected, found.x_norm * found.y_norm)
    assert_close(found.V_X, variance(x, y_bar))
    assert_close(found.V_Y, variance(y, x_bar))
    assert found.deltaH1 == found.learning_rate * found.bars_dot
    assert found.se_paired is not None
    assert_close(found.se_paired, found.learning_rate * math.sqrt(spread))
    assert abs(expected - float(x_bar @ y_bar)) > 1e-3 * found.x_norm * found.y_norm


def test_what_counts_as_the_same_rollouts() -> None:
    """Responses, prompts, groups and their order; rewards and group names do not."""
    rows = ref.random_rows(4, groups=3, responses=[2, 3, 2])
    last = rows[-1]
    variations = {
        "as they are": (rows, True),
        "other rewards": ([replace(row, reward=1.0) for row in rows], True),
        "other names": ([replace(row, group=f"g{row.group}") for row in rows], True),
        "reversed": (rows[::-1], False),
        "one less": (rows[:-1], False),
        "one token more": (
            [*rows[:-1], replace(last, response_ids=[*last.response_ids, 3])],
            False,
        ),
        "another prompt": (
            [
                replace(row, prompt_ids=[1, *row.prompt_ids]) if row.group == 0 else row
                for row in rows
            ],
            False,
        ),
        "a group split": ([*rows[:-1], replace(last, group="other")], False),
    }
    for name, (others, expected) in variations.items():
        left, right = as_batch(rows, 13), as_batch(others, 13, "U")
        assert same_rollouts(left, right) == expected, name


# When it is computed


def test_auto_says_why_not_and_true_refuses(make_named_run: RunMaker) -> None:
    run = make_named_run("qwen2-lora")
    single = [row for i, row in enumerate(run.E) if i not in (3, 4)]
    one_group = [row for row in run.U if row.group == 0]
    cases = [
        (replace(run, E=single), r"2 responses .* found 1 in group 1 \(line 3\)"),
        (replace(run, U=one_group), "at least 2 groups in U, found 1"),
    ]
    for broken, reason in cases:
        opened = Opened.of(broken.open(update=LOSSES["dr_grpo"]))
        arguments = (opened.session, opened.step, opened.gradient, opened.base)
        before = dict(opened.session.world.collectives)
        assert gradient_dot(*arguments, GradientDot()) is None
        with pytest.raises(InputError, match=f"gradient_dot: needs.*{reason}"):
            gradient_dot(*arguments, GradientDot(enabled=True))
        found = obstacle(opened.session.batches, {})
        assert found is not None and found.startswith("needs at least 2")
        assert opened.session.world.collectives == before
    opened = Opened.of(run.open(update=LOSSES["dr_grpo"]))
    arguments = (opened.session, opened.step, opened.gradient, opened.base)
    assert obstacle(opened.session.batches, {}) is None
    assert gradient_dot(*arguments, GradientDot(enabled=False)) is None
    assert gradient_dot(*arguments, GradientDot()) is not None


@pytest.mark.parametrize(
    ("form", "passes", "buffers"),
    [
        ({}, {"pull_back": "E", "score order 1": "U"}, 1),
        (
            {"direction": "preconditioned"},
            {"pull_back": "EU", "score order 1": "EU"},
            2,
        ),
        ({"variance_method": "backward"}, {"pull_back": "E|E|U"}, 1),
    ],
)
def test_passes_and_collectives(
    make_named_run: RunMaker,
    form: dict[str, Any],
    passes: dict[str, str],
    buffers: int,
) -> None:
    """No pass too many."""
    run = make_named_run("qwen2-lora")
    opened = Opened.of(run.open(update=LOSSES["dr_grpo"]))
    performed = copy.deepcopy(opened.session.passes.performed)
    world = opened.session.world
    world.collectives.clear()
    opened.result(GradientDot(**form))
    for (kind, split), count in opened.session.passes.performed.items():
        already = performed.get((kind, split), PassCount())
        wanted = passes.get(kind, "").count(split)
        batch = opened.session.batches[split]
        assert count.sequences - already.sequences == wanted * len(batch), kind
        assert count.tokens - already.tokens == wanted * batch.num_tokens, kind
    made = {purpose: number for purpose, (number, _) in world.collectives.items()}
    assert made == {"parameter buffers": buffers, "scalars": 2}
    parameters = opened.session.passes.parameters.values()
    assert all(parameter.grad is None for parameter in parameters)


# What must not matter


@pytest.mark.parametrize("method", ["jvp", "backward"])
@pytest.mark.parametrize("direction", ["step", "preconditioned"])
def test_microbatches_and_order_do_not_matter(
    make_named_run: RunMaker, direction: Any, method: Any
) -> None:
    settings = GradientDot(direction=direction, variance_method=method)
    run, update = make_named_run("qwen2-lora"), LOSSES["dr_grpo"]
    reordered = replace(run, E=run.E[::-1], U=run.U[::-1])
    results = [
        asdict(Opened.of(each.open(update=update, compute=compute)).result(settings))
        for each, compute in (
            (run, {"device": "cpu", "tokens_per_microbatch": 24}),
            (run, {"device": "cpu", "tokens_per_microbatch": 1}),
            (reordered, {"device": "cpu", "tokens_per_microbatch": 10_000}),
        )
    ]
    for found in results[1:]:
        assert_same_numbers(found, results[0])


def assert_same_numbers(found: dict[str, Any], expected: dict[str, Any]) -> None:
    size = expected["x_norm"] * expected["y_norm"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float):
            signed = name in ("bars_dot", "u_cross", "deltaH1")
            assert_close(found[name], value, size if signed else None)
        else:
            assert found[name] == value


def test_float32(make_named_run: RunMaker) -> None:
    """Both methods and both precisions agree as far as float32 goes."""
    run = make_named_run("qwen2-lora")
    results = [
        Opened.of(
            run.open(update=LOSSES["dr_grpo"], precision={"model": dtype})
        ).result(GradientDot(variance_method=method))
        for dtype, method in (
            ("float64", "jvp"),
            ("float32", "jvp"),
            ("float32", "backward"),
        )
    ]
    expected = results[0]
    for found in results[1:]:
        assert math.isclose(found.V_X, expected.V_X, rel_tol=1e-4)
        assert math.isclose(found.V_Y, expected.V_Y, rel_tol=1e-4)
        size = expected.x_norm * expected.y_norm
        assert abs(found.bars_dot - expected.bars_dot) <= 1e-5 * size


# The proxy of the audit


@pytest.mark.parametrize("limit", [64, 3])
def test_proxy_gradient(case: Case, limit: int) -> None:
    """The gradient of mean S over the first sequences is there, and right."""
    session = case.opened.session
    for split, rows in (("E", case.vectors.run.E), ("U", case.vectors.run.U)):
        _, gradients = case.vectors.of_sequences(rows[:limit])
        expected = float(torch.stack(gradients).mean(0).norm())
        assert_close(proxy_gradient_norm(session, split, limit), expected)


# Several ranks


def measured_on(world: World, configs: Sequence[Config]) -> dict[str, Any]:
    """Both directions by both methods, run after run, and how many sequences are held."""
    results = []
    for config in configs:
        session = open_session(config, world, None, no_progress)
        gradient, _ = loss_gradient(session)
        step, _, _ = score_after_step(session, gradient)
        base = score_along_step(session, step).scores
        for direction, method in DIRECTIONS_AND_METHODS:
            settings = GradientDot(direction=direction, variance_method=method)
            found = gradient_dot(session, step, gradient, base, settings)
            results.append(asdict(found))
        results[-1]["proxy"] = proxy_gradient_norm(session)
    held = [len(session.shard(split).positions) for split in session.batches]
    return {"results": results, "held": held}


def test_number_of_ranks_does_not_matter(
    make_named_run: RunMaker, tmp_path: Path
) -> None:
    """Three ranks, of which one holds nothing; also with E = U."""
    run = make_named_run("qwen2-lora")
    E, U = ([row for row in rows if row.group in (0, 1)] for rows in (run.E, run.U))
    run = replace(run, E=E, U=U)
    configs, alone = [], []
    for number, each in enumerate((run, replace(run, E=run.U))):
        folder = tmp_path / f"run {number}"
        folder.mkdir()
        each = replace(each, folder=folder)
        configs.append(each.config(update=LOSSES["dr_grpo"]))
        opened = Opened.of(each.open(update=LOSSES["dr_grpo"]))
        for direction, method in DIRECTIONS_AND_METHODS:
            settings = GradientDot(direction=direction, variance_method=method)
            alone.append(asdict(opened.result(settings)))
        alone[-1]["proxy"] = proxy_gradient_norm(opened.session)
    documents = run_thread_ranks(3, lambda world: measured_on(world, configs))
    assert [0, 0] in [document["held"] for document in documents]
    for document in documents:
        for found, expected in zip(document["results"], alone, strict=True):
            assert_same_numbers(found, expected)
        assert document["results"] == documents[0]["results"]
