"""Is the second derivative that of the reference's entropy along the probe's own step?

GPT-2 has layer norm, through which nested forward mode is wrong; Qwen2 has RMS norm and
rotary embeddings.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import pytest
import reference as ref
from reference import Objective
from tiny_runs import TinyRun, make_run

from entropy_ddp.results import CurvatureResult, Probed

pytestmark = pytest.mark.usefixtures("models_checked_once")

RTOL = 1e-6  # ten times below the contract's bar for second differences in float64
FLOAT32_RTOL = 1e-3
DIFFERENCE_STEP = 0.03  # times the direction's norm, extrapolated to 0
LEARNING_RATE = 0.02

SECTIONS: dict[str, Any] = {
    "update": {
        "max_grad_norm": 0.1,
        "lr_override": LEARNING_RATE,
        "save_delta": True,
    },
    "truth": {"is_mode": "snis"},
    "linear": {"score": "full"},
    "curvature": {"method": "taylor"},
    "compute": {"device": "cpu", "tokens_per_microbatch": 10_000},
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-full": ("gpt2", {"full": True}),
    "qwen2": ("qwen2", {}),
}
RunMaker = Callable[[str], TinyRun]


@pytest.fixture(scope="module")
def make_named_run(tmp_path_factory: pytest.TempPathFactory) -> RunMaker:
    """Each checkpoint is written once."""

    @cache
    def make(name: str) -> TinyRun:
        family, options = RUNS[name]
        return make_run(tmp_path_factory.mktemp(name), family, **options)

    return make


@cache
def probe(run: TinyRun, objective: Objective) -> Probed:
    return run.probe(**SECTIONS | {"objective": section(objective)})


def section(objective: Objective) -> dict[str, Any]:
    """The `objective` section of a configuration."""
    keys = ("normalize", "integrand", "temperature")
    return {key: getattr(objective, key) for key in keys}


@cache
def scores_along(run: TinyRun, temperature: float) -> Callable[[float], ref.Scores]:
    """The reference's scores of E along the step that the probe took."""
    probed = probe(run, Objective(temperature=temperature))
    assert probed.delta is not None
    direction = {name: x / LEARNING_RATE for name, x in probed.delta.items()}
    return ref.scores_along(run.saved.model, run.E, direction, temperature)


@dataclass(frozen=True)
class Case:
    """A probe, and the reference's entropy as a function of eta."""

    run: TinyRun
    objective: Objective

    @property
    def probed(self) -> Probed:
        return probe(self.run, self.objective)

    @property
    def curvature(self) -> CurvatureResult:
        curvature = self.probed.results.curvature
        assert curvature is not None
        return curvature

    def second_difference(self, keep: list[int] | None = None) -> float:
        """Second derivative of the entropy of these rows of E, all by default."""
        keep = list(range(len(self.run.E))) if keep is None else keep
        scores_at = scores_along(self.run, self.objective.temperature)
        entropy = ref.entropy_along(
            [self.run.E[i] for i in keep],
            lambda eta: [scores_at(eta)[i] for i in keep],
            self.objective,
        )
        size = self.probed.results.update.param_update_l2 / LEARNING_RATE
        return ref.curvature_by_central_difference(entropy, DIFFERENCE_STEP / size)


OBJECTIVES = [
    Objective(normalize=normalize, integrand=integrand)
    for normalize, integrand in product(ref.NORMALIZATIONS, ("rb", "surprisal"))
]
CASES = [(name, objective) for name in ("gpt2", "qwen2") for objective in OBJECTIVES]
CASES += [("gpt2-full", Objective()), ("qwen2", Objective(temperature=1.3))]


def label(case: tuple[str, Objective]) -> str:
    name, objective = case
    return "-".join((name, *map(str, section(objective).values())))


@pytest.fixture(scope="module", params=CASES, ids=label)
def case(request: pytest.FixtureRequest, make_named_run: RunMaker) -> Case:
    name, objective = request.param
    return Case(make_named_run(name), objective)


def test_second_derivative(case: Case) -> None:
    """H'' is the second central difference of the self-normalised entropy."""
    expected = case.second_difference()
    error = case.curvature.second_derivative - expected
    assert abs(error) <= RTOL * abs(expected)


def test_second_order_change_and_edge(case: Case) -> None:
    """eta slope + eta^2 H'' / 2, and |2 slope / H''|, where both terms are equal."""
    slope, curvature = case.probed.results.linear.slope, case.curvature
    second = curvature.second_derivative
    terms = LEARNING_RATE * slope, LEARNING_RATE**2 * second / 2
    error = curvature.delta_h2 - sum(terms)
    assert abs(error) <= 1e-15 * sum(map(abs, terms))
    edge = curvature.eta_star
    assert edge == abs(2 * slope / second)
    assert abs(edge * slope) == pytest.approx(abs(edge**2 * second / 2), rel=1e-12)


def test_error_of_the_second_derivative(case: Case) -> None:
    """The reference's estimate, made again without each group."""
    expected = ref.jackknife(
        case.run.E, case.second_difference, case.objective.normalize
    )
    assert abs(case.curvature.se - expected) <= RTOL * expected


def test_second_order_is_closer_to_the_truth(make_named_run: RunMaker) -> None:
    """The error of delta_h1 falls with the square of eta, that of delta_h2 faster."""
    run = make_named_run("gpt2")
    errors = []
    for rate in (3e-3, 3e-4):
        update = SECTIONS["update"] | {"lr_override": rate}
        results = run.probe(**SECTIONS | {"update": update}).results
        assert results.curvature is not None
        truth = results.truth.delta_h_true
        first = truth - results.linear.delta_h1
        errors.append((first, truth - results.curvature.delta_h2))
    (first, second), (first_small, second_small) = errors
    assert abs(second) < abs(first) and abs(second_small) < abs(first_small)
    assert first / first_small == pytest.approx(1e2, rel=0.2)
    assert second / second_small == pytest.approx(1e3, rel=0.2)


def test_the_matched_difference_has_no_noise_of_first_order(
    make_named_run: RunMaker,
) -> None:
    """By default truth and slope keep some: what they differ by falls as eta only."""
    run = make_named_run("gpt2")
    found: dict[str, list[float]] = defaultdict(list)
    for rate in (3e-3, 3e-4):
        update = SECTIONS["update"] | {"lr_override": rate}
        results = run.probe(update=update).results
        truth, linear, curvature = results.truth, results.linear, results.curvature
        assert curvature is not None
        matched = linear.matched_difference, curvature.matched_difference
        assert matched[0] is not None and matched[1] is not None
        shown = truth.delta_h_true - linear.delta_h1
        plain = {
            **{row["is_mode"]: row["delta_h_true"] for row in results.truth_all},
            **{row["baseline"]: row["slope"] for row in results.linear_all},
        }
        expected = plain["per_decision"] - rate * plain["hk"]
        assert matched[0]["value"] == pytest.approx(expected, abs=1e-15)
        assert matched[0]["se_jackknife"] < linear.difference_se_jackknife
        low, high = matched[0]["interval"]
        assert low < matched[0]["value"] < high
        found["shown"].append(shown)
        found["first order"].append(matched[0]["value"])
        found["second order"].append(matched[1]["value"])
    ratios = {name: large / small for name, (large, small) in found.items()}
    assert ratios["first order"] == pytest.approx(1e2, rel=0.2)
    # As eta^3 or faster.
    assert ratios["second order"] > 900
    assert ratios["shown"] < 50


@pytest.mark.parametrize("name", RUNS)
def test_float32_is_close_to_float64(make_named_run: RunMaker, name: str) -> None:
    """To 1e-3, and delta_h2 to 1e-3 of the two terms that cancel in it."""
    run = make_named_run(name)
    results = probe(run, Objective()).results
    exact, first = results.curvature, abs(results.linear.delta_h1)
    rounded = run.probe(**SECTIONS | {"precision": {"model": "float32"}})
    found = rounded.results.curvature
    assert exact is not None and found is not None
    for key in ("second_derivative", "se", "eta_star"):
        value, expected = getattr(found, key), getattr(exact, key)
        assert abs(value - expected) <= FLOAT32_RTOL * abs(expected), key
    terms = first + abs(exact.delta_h2 - results.linear.delta_h1)
    assert abs(found.delta_h2 - exact.delta_h2) <= FLOAT32_RTOL * terms


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_without_curvature_its_passes_are_saved(
    make_named_run: RunMaker, name: str
) -> None:
    """The key is absent, two passes fewer are made, and no other number changes."""
    run = make_named_run(name)
    with_it = probe(run, Objective()).results
    without = run.probe(**SECTIONS | {"curvature": {"enabled": False}}).results
    documents = [results.to_dict() for results in (with_it, without)]
    assert "curvature" in documents[0] and "curvature" not in documents[1]
    made = [document["run"]["passes"] for document in documents]
    saved = [row for row in made[0] if row not in made[1]]
    assert [row for row in made[1] if row not in made[0]] == []
    assert [(row["pass"], row["batch"]) for row in saved] == [("score order 2", "E")]
    assert not any("curvature" in name for name in documents[1]["run"]["seconds"])
    for key in ("truth", "truth_all", "linear", "linear_all", "update"):
        assert documents[0][key] == documents[1][key], key
    assert not any(row["name"] == "eta / eta*" for row in documents[1]["audit"])
