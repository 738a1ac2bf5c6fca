"""Is a sweep what independent measurements give, and what is left of it when it stops?

Every point is compared with the reference along the step that the reference takes. A
sweep that is interrupted and started again measures only what is missing.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from jobs import run_sweep
from reference import LossSettings, Objective
from safetensors.torch import load_file, save_file
from thread_ranks import run_thread_ranks
from tiny_runs import TinyRun, make_run
from torch import Tensor

from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.estimators.quantiles import two_sided
from entropy_ddp.results import UNFINISHED, Probed, Results

pytestmark = pytest.mark.usefixtures("models_checked_once")

RTOL = 1e-9  # of the change itself, in float64
LEARNING_RATE = 0.002  # none of the points: that one would need no pass
ETAS = [0.03, 0.001, 0.01, 0.003]
CLIP_C = 1.02  # clips some weights and not others
SECTIONS: dict[str, Any] = {
    "update": {"max_grad_norm": 0.1, "lr_override": LEARNING_RATE},
    "compute": {"device": "cpu", "tokens_per_microbatch": 10_000},
    "sweep": {"etas": ETAS},
}


@dataclass
class Watch:
    """Told of every phase; stops the run within a phase of this number.

    `points` are the phases that measured a point.
    """

    stop_at: int | None = None
    points: list[str] = field(default_factory=list)

    def __call__(self, phase: str, done: int, total: int) -> None:
        if not phase.startswith("sweep:"):
            return
        if done == 0:
            self.points.append(phase)
        elif len(self.points) == self.stop_at:
            raise KeyboardInterrupt  # the parameters are moved at this moment


def sweep(
    run: TinyRun, out: Path, watch: Watch | None = None, **sections: Any
) -> Results:
    """A sweep on one rank."""
    config = run.config(**SECTIONS | sections)
    return run_sweep(config, World(), out, watch or Watch()).results


def points(results: Results) -> list[dict[str, Any]]:
    """The rows of `sweep` in results.json."""
    return results.to_dict()["sweep"]


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("qwen2"), "qwen2")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("gpt2"), "gpt2", full=True)


# Against the reference


@dataclass(frozen=True)
class Line:
    """The reference's entropy of E along its own step."""

    run: TinyRun
    objective: Objective

    @cached_property
    def scores_at(self) -> Callable[[float], ref.Scores]:
        """The function eta -> scores of E."""
        direction = naive_direction(self.run)
        return ref.scores_along(self.run.saved.model, self.run.E, direction, 1.0)

    def truth(self, eta: float) -> ref.Truth:
        old, new = self.scores_at(0.0), self.scores_at(eta)
        return ref.delta_h_true(self.run.E, old, new, self.objective)


@cache
def naive_direction(run: TinyRun) -> dict[str, Tensor]:
    """v = delta / eta of the reference's own AdamW."""
    step = run.naive_step(
        LossSettings(), max_grad_norm=0.1, learning_rate=LEARNING_RATE
    )
    return {name: change / LEARNING_RATE for name, change in step.delta.items()}


MODES: dict[str, tuple[dict[str, Any], Objective, tuple[str, str]]] = {
    "snis": (
        {"truth": {"is_mode": "snis"}, "linear": {"score": "full"}},
        Objective(),
        ("full", "none"),
    ),
    "clip": (
        {"truth": {"is_mode": "clip", "clip_c": CLIP_C}, "linear": {"score": "full"}},
        Objective(is_mode="clip", clip_c=CLIP_C),
        ("full", "none"),
    ),
    "per_decision": (
        {
            "truth": {"is_mode": "per_decision"},
            "linear": {"score": "to_go", "baseline": "hk"},
            "objective": {"normalize": "per_sequence"},
        },
        Objective(normalize="per_sequence", is_mode="per_decision"),
        ("to_go", "hk"),
    ),
    "surprisal, sum": (
        {
            "truth": {"is_mode": "snis"},
            "linear": {"score": "full"},
            "objective": {"normalize": "sum", "integrand": "surprisal"},
        },
        Objective(normalize="sum", integrand="surprisal"),
        ("full", "none"),
    ),
}
FAMILIES = [("qwen2", mode) for mode in MODES] + [("gpt2", "snis")]


@dataclass(frozen=True)
class Case:
    """A symmetric sweep, and the reference along the same line."""

    run: TinyRun
    results: Results
    line: Line
    slope: float


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    family, mode = request.param
    run = request.getfixturevalue(family)
    sections, objective, (score, baseline) = MODES[mode]
    given = {"etas": ETAS, "symmetric": True}
    results = sweep(run, tmp_path_factory.mktemp("sweep"), sweep=given, **sections)
    slope = ref.slope(
        run.saved.model,
        run.E,
        naive_direction(run),
        replace(objective, is_mode="snis"),
        score=score,
        baseline=baseline,
    )
    return Case(run, results, Line(run, objective), slope.slope)


def test_the_grid_is_sorted_and_mirrored(case: Case) -> None:
    etas = [row["eta"] for row in points(case.results)]
    assert etas == [s * eta for eta in sorted(ETAS) for s in (1, -1)]


def test_every_point_is_what_the_reference_measures(case: Case) -> None:
    """Truth, its error and the effective sample size on both sides."""
    size = len(case.run.E)
    for row in points(case.results):
        truth = case.line.truth(row["eta"])
        for key, expected in (
            ("delta_h_true", truth.delta_h_true),
            ("se", truth.se),
            ("ess_fraction", truth.ess / size),
        ):
            assert abs(row[key] - expected) <= RTOL * abs(expected), (row["eta"], key)
    assert min(row["ess_fraction"] for row in points(case.results)) < 0.99


def test_every_point_is_the_entropy_along_the_step(case: Case) -> None:
    """The same as a difference of two values of one function of eta."""
    entropy = ref.entropy_along(case.run.E, case.line.scores_at, case.line.objective)
    for row in points(case.results):
        expected = entropy(row["eta"]) - entropy(0.0)
        assert abs(row["delta_h_true"] - expected) <= RTOL * abs(expected)


def test_predictions_of_every_point(case: Case) -> None:
    """eta slope, and eta slope + eta^2 H'' / 2, with the slope of the reference."""
    linear, curvature = case.results.linear, case.results.curvature
    assert curvature is not None
    for row in points(case.results):
        eta = row["eta"]
        first = eta * case.slope
        second = eta**2 * curvature.second_derivative / 2
        assert abs(row["delta_h1"] - first) <= RTOL * abs(first)
        assert row["delta_h1_se"] == pytest.approx(abs(eta) * linear.se, rel=RTOL)
        scale = abs(first) + abs(second)
        assert abs(row["delta_h2"] - (first + second)) <= RTOL * scale


def test_summary(case: Case) -> None:
    """Exponent by least squares, agreement from the smallest up, odd parts."""
    rows = points(case.results)
    summary = case.results.to_dict()["sweep_summary"]
    truth = {row["eta"]: row["delta_h_true"] for row in rows}
    num_groups = case.results.E.num_groups
    etas = sorted(ETAS)
    design = torch.tensor([[math.log(eta), 1.0] for eta in etas], dtype=torch.float64)
    sizes = torch.tensor([[math.log(abs(truth[eta]))] for eta in etas])
    fitted = torch.linalg.lstsq(design, sizes.double()).solution
    assert summary["exponent"] == pytest.approx(float(fitted[0]), rel=1e-6)
    agreeing = [
        abs(r["delta_h_true"] - r["delta_h1"])
        <= two_sided(num_groups - 1) * r["se_jackknife"]
        for r in rows[::2]
    ]
    last = agreeing.index(False) if False in agreeing else len(etas)
    assert summary.get("agreement") == ([etas[0], etas[last - 1]] if last else None)
    odd = [(e, (truth[e] - truth[-e]) / 2) for e in etas]
    assert [(row["eta"], row["delta_h"]) for row in summary["odd"]] == odd
    errors = {row["eta"]: row["se"] for row in rows}
    for row in summary["odd"]:
        eta = row["eta"]
        # Of two numbers that share their noise: at most the mean of both errors.
        assert 0 < row["se"] <= (errors[eta] + errors[-eta]) / 2 * (1 + RTOL)
    assert summary["exponent_se"] > 0
    assert all(row["trusted"] and row["delta_h2_se"] > 0 for row in rows)
    assert summary["noise_floor"] < 1e-12


def test_what_first_order_misses_has_the_error_of_leaving_groups_out(
    qwen2: TinyRun, tmp_path: Path
) -> None:
    """1 - eta slope / Delta H, anew by the reference without each group."""
    sections, objective, (score, baseline) = MODES["snis"]
    eta, direction = ETAS[0], naive_direction(qwen2)
    given = {"etas": [eta]}
    (row,) = points(sweep(qwen2, tmp_path, sweep=given, **sections))
    line = Line(qwen2, objective)
    before, after = line.scores_at(0.0), line.scores_at(eta)

    def missed(kept: list[int]) -> float:
        rows, old, new = (
            [values[i] for i in kept] for values in (qwen2.E, before, after)
        )
        truth = ref.delta_h_true(rows, old, new, objective).delta_h_true
        slope = ref.slope(
            qwen2.saved.model,
            rows,
            direction,
            objective,
            score=score,
            baseline=baseline,
        ).slope
        return 1 - eta * slope / truth

    groups = [r.group for r in qwen2.E]
    assert row["missed"] == pytest.approx(missed([*range(len(groups))]), rel=1e-7)
    without = [
        missed([i for i, group in enumerate(groups) if group != left])
        for left in dict.fromkeys(groups)
    ]
    count, mean = len(without), math.fsum(without) / len(without)
    spread = math.fsum((value - mean) ** 2 for value in without)
    expected = math.sqrt((count - 1) / count * spread)
    assert row["missed_se"] == pytest.approx(expected, rel=1e-7)


# A grid that is chosen


@pytest.mark.parametrize("num_points", [2, 5])
def test_a_grid_is_chosen_from_ess_and_noise(
    qwen2: TinyRun, tmp_path: Path, num_points: int
) -> None:
    """Evenly spaced logarithms up to where ESS / N is predicted to be `ess_warn`.

    The smallest is a thousandth of the largest, as float64 has no noise to speak of.
    """
    etas = [
        row["eta"]
        for row in points(sweep(qwen2, tmp_path, sweep={"num_points": num_points}))
    ]
    assert len(etas) == num_points
    direction = naive_direction(qwen2)
    weights = [
        float(ref.token_derivatives(qwen2.saved.model, row, direction, 1.0)[2].sum())
        for row in qwen2.E
    ]

    def ess_fraction(eta: float) -> float:
        linear = [math.exp(eta * derivative) for derivative in weights]
        return ref.effective_sample_size(linear) / len(linear)

    assert ess_fraction(etas[-1]) == pytest.approx(0.5, abs=1e-5)
    ratios = [math.log(b / a) for a, b in pairwise(etas)]
    step = math.log(1e3) / (num_points - 1)
    assert ratios == pytest.approx([step] * (num_points - 1), abs=1e-5)


def test_the_smallest_of_a_chosen_grid_is_above_the_noise(
    qwen2: TinyRun, tmp_path: Path
) -> None:
    """In float32 the predicted change is at least ten times the noise floor."""
    results = sweep(qwen2, tmp_path, sweep={}, precision={"model": "float32"})
    assert results.sweep_summary is not None
    smallest = points(results)[0]
    noise = results.sweep_summary.noise_floor
    assert noise > 0
    assert abs(smallest["delta_h1"]) >= 9.99 * noise


# One step, one direction


def test_the_point_at_the_step_itself_is_the_headline(
    qwen2: TinyRun, tmp_path: Path
) -> None:
    """theta + eta v is theta_after up to one rounding of every weight.

    At the next larger learning rate: at its own nothing is measured.
    """
    etas = [math.nextafter(LEARNING_RATE, 1.0)]
    results = sweep(qwen2, tmp_path, sweep={"etas": etas})
    (row,) = points(results)
    truth = results.truth
    for name in ("delta_h_true", "se", "ess_fraction"):
        expected = getattr(truth, name)
        assert abs(row[name] - expected) <= RTOL * abs(expected), name
    assert row["delta_h1"] == pytest.approx(results.linear.delta_h1, rel=1e-14)
    assert results.curvature is not None
    assert row["delta_h2"] == pytest.approx(results.curvature.delta_h2, rel=1e-14)
    assert row["difference_se"] == pytest.approx(results.linear.difference_se, rel=1e-6)


def test_a_point_is_the_headline_of_a_probe_with_that_rate(
    qwen2: TinyRun, tmp_path: Path
) -> None:
    """AdamW's change is linear in the learning rate, weight decay included."""
    rows = points(sweep(qwen2, tmp_path))
    for row in rows[1::2]:
        update = SECTIONS["update"] | {"lr_override": row["eta"]}
        results = qwen2.probe(**SECTIONS | {"update": update}).results
        error = row["delta_h_true"] - results.truth.delta_h_true
        assert abs(error) <= RTOL * abs(row["delta_h_true"])


def test_curvature_can_be_left_out(qwen2: TinyRun, tmp_path: Path) -> None:
    results = sweep(qwen2, tmp_path, curvature={"enabled": False})
    document = results.to_dict()
    assert "curvature" not in document
    assert all("delta_h2" not in row for row in document["sweep"])
    assert len(document["sweep"]) == len(ETAS)


# Interrupted, and started again


def test_an_interrupted_sweep_continues(qwen2: TinyRun, tmp_path: Path) -> None:
    """Stopped within the third point: two are kept, two are measured afterwards.

    What comes out is what a sweep that was never stopped gives, bit for bit.
    """
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    watch = Watch()
    expected = sweep(qwen2, whole, watch)
    assert len(watch.points) == len(ETAS)
    with pytest.raises(KeyboardInterrupt):
        sweep(qwen2, stopped, Watch(stop_at=3))
    assert len(list((stopped / UNFINISHED).glob("sweep-eta*"))) == 2
    watch = Watch()
    found = sweep(qwen2, stopped, watch)
    assert watch.points == ["sweep: eta = 0.01", "sweep: eta = 0.03"]
    # Two of the four points, and nothing else, are of this start.
    (scored,) = found.run.passes
    assert (scored["pass"], scored["batch"]) == ("score order 0", "E")
    assert scored["sequences"] == 2 * len(qwen2.E)
    for key in ("sweep", "sweep_summary", "truth", "linear", "curvature"):
        assert found.to_dict()[key] == expected.to_dict()[key], key


def test_a_finished_sweep_measures_nothing_again(
    qwen2: TinyRun, tmp_path: Path
) -> None:
    expected = sweep(qwen2, tmp_path)
    watch = Watch()
    found = sweep(qwen2, tmp_path, watch)
    assert watch.points == []
    assert points(found) == points(expected)


def test_another_grid_or_budget_may_continue(qwen2: TinyRun, tmp_path: Path) -> None:
    """A grid that is extended and other microbatches: the results are the same."""
    expected = points(sweep(qwen2, tmp_path))
    watch = Watch()
    compute = SECTIONS["compute"] | {"tokens_per_microbatch": 24}
    found = sweep(
        qwen2,
        tmp_path,
        watch,
        sweep={"etas": [*ETAS, 0.005], "symmetric": True},
        compute=compute,
    )
    assert len(watch.points) == 2 * (len(ETAS) + 1) - len(ETAS)
    kept = {row["eta"]: row for row in points(found)}
    assert [kept[row["eta"]] for row in expected] == expected


@pytest.fixture(scope="module")
def begun(qwen2: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished points."""
    out = tmp_path_factory.mktemp("begun")
    with pytest.raises(KeyboardInterrupt):
        sweep(qwen2, out, Watch(stop_at=3))
    return out


Change = Callable[[TinyRun], tuple[TinyRun, dict[str, Any]]]


def with_sections(**sections: Any) -> Change:
    return lambda run: (run, sections)


def other_response(run: TinyRun) -> tuple[TinyRun, dict[str, Any]]:
    """One token of E is another one."""
    ids = [(run.E[0].response_ids[0] + 1) % 17, *run.E[0].response_ids[1:]]
    return replace(run, E=[replace(run.E[0], response_ids=ids), *run.E[1:]]), {}


def other_reward(run: TinyRun) -> tuple[TinyRun, dict[str, Any]]:
    """One reward of U is another one."""
    row = replace(run.U[0], reward=(run.U[0].reward or 0.0) + 1.0)
    return replace(run, U=[row, *run.U[1:]]), {}


def other_group(run: TinyRun) -> tuple[TinyRun, dict[str, Any]]:
    """One row of E is a group of its own: only standard errors change."""
    return replace(run, E=[*run.E[:-2], replace(run.E[-2], group=99), run.E[-1]]), {}


def other_file(name: str, change: Callable[[Path], None]) -> Change:
    """A file of the checkpoint or of its base is replaced under its old name."""

    def spoil(run: TinyRun) -> tuple[TinyRun, dict[str, Any]]:
        change(next(run.folder.rglob(name)))
        return run, {}

    return spoil


def nudge_weights(path: Path) -> None:
    """Every weight of a safetensors file is a little larger."""
    save_file({n: 1.01 * x for n, x in load_file(path).items()}, path, {"format": "pt"})


def nudge_moments(path: Path) -> None:
    """Every first moment of a saved optimizer is a little larger."""
    state = torch.load(path, weights_only=True)
    for entry in state["state"].values():
        entry["exp_avg"] *= 1.01
    torch.save(state, path)


OTHERS: dict[str, Change] = {
    "temperature": with_sections(objective={"temperature": 1.1}),
    "normalisation": with_sections(objective={"normalize": "sum"}),
    "weights": with_sections(truth={"is_mode": "per_decision"}),
    "estimator": with_sections(linear={"score": "to_go", "baseline": "hk"}),
    "loss": with_sections(update=SECTIONS["update"] | {"loss": "grpo"}),
    "curvature": with_sections(curvature={"enabled": False}),
    "precision": with_sections(precision={"model": "float32"}),
    "a response of E": other_response,
    "a group of E": other_group,
    "a reward of U": other_reward,
    "the adapter": other_file("adapter_model.safetensors", nudge_weights),
    "the base model": other_file("model.safetensors", nudge_weights),
    "the optimizer": other_file("optimizer.pt", nudge_moments),
}


@pytest.mark.parametrize("name", OTHERS)
def test_points_of_another_run_are_refused(tmp_path: Path, name: str) -> None:
    """Whatever a point depends on beside its eta must be the same."""
    run = make_run(tmp_path / "run", "qwen2")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        sweep(run, out, Watch(stop_at=2))
    before = sorted((out / UNFINISHED).iterdir())
    changed, sections = OTHERS[name](run)
    watch = Watch()
    with pytest.raises(InputError, match="another configuration, checkpoint or batch"):
        sweep(changed, out, watch, **sections)
    assert watch.points == []
    assert sorted((out / UNFINISHED).iterdir()) == before


# Ranks


def test_three_ranks_give_the_sweep_of_one(
    qwen2: TinyRun, begun: Path, tmp_path: Path
) -> None:
    """From the start, and continuing what one rank has begun."""
    (tmp_path / "alone").mkdir()
    expected = sweep(qwen2, tmp_path / "alone")
    outs = [tmp_path / "new", tmp_path / "continued"]
    outs[0].mkdir()
    shutil.copytree(begun, outs[1])
    config = qwen2.config(**SECTIONS)
    found = []
    for out, num_begun in zip(outs, (4, 2), strict=True):
        phases: list[tuple[Any, ...]] = []

        def body(
            world: World, out: Path = out, phases: list[tuple[Any, ...]] = phases
        ) -> Probed:
            def told(*phase: Any) -> None:
                if world.is_main:
                    phases.append(phase)

            return run_sweep(config, world, out, told)

        probed, *_ = run_thread_ranks(3, body)
        names = [name for name, done, *_ in phases if not done]
        assert sum(name.startswith("sweep:") for name in names) == num_begun
        found.append(probed.results.to_dict())
    assert found[1]["sweep"][:2] == points(expected)[:2]
    for document in found:
        assert document["run"]["world_size"] == 3
        for row, other in zip(document["sweep"], points(expected), strict=True):
            assert row.keys() == other.keys()
            for key, value in other.items():
                size = max(map(abs, value)) if isinstance(value, list) else abs(value)
                assert row[key] == pytest.approx(value, rel=0, abs=RTOL * size), key
