"""Does a whole probe report what the reference says?

Every number of a run on a checkpoint on disk is compared with the slow reference: the
step, the truth in every mode, the slope by every estimator, all errors and all
per-sequence shares. Slopes are compared a second time, with central differences of the
reference's entropy along the probe's own direction.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import reference as ref
import torch
from reference import LossSettings, Objective
from tiny_runs import NaiveStep, TinyRun, make_run
from torch import Tensor

from entropy_ddp.results import Probed

pytestmark = pytest.mark.usefixtures("models_checked_once")

RTOL = 1e-10  # the contract's bar for float64, relative to the scale named with it
SUM_ATOL = 1e-14  # a sum of a dozen shares of order 0.1 in another order
DIFFERENCE_RTOL = 1e-7  # the contract's bar for central differences
CURVATURE_RTOL = 1e-5  # the contract's bar for second differences
DIFFERENCE_STEP = 0.02  # times the direction's norm
LEARNING_RATE = 0.02  # large: every mode of weights gives a change of its own
MAX_GRAD_NORM = 0.1
CLIP_C = 1.02  # clips some weights and not others

DOUBLE = torch.float64
MEAN = "per_sequence_token_mean"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-lora": ("gpt2", {}),
    "qwen2-lora": ("qwen2", {}),
    "llama-full": ("llama", {"full": True}),
    "qwen2-lora-v": ("qwen2", {"targets": ["v_proj"]}),
    "gpt2-full-tied": ("gpt2", {"full": True}),
    "qwen2-full-tied": ("qwen2", {"full": True}),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run is asked for."""

    normalize: str = "per_token"
    integrand: str = "rb"
    temperature: float = 1.0
    is_mode: str = "snis"
    score: str = "full"
    baseline: str = "none"

    def objective(self, is_mode: str | None = None) -> Objective:
        return Objective(
            normalize=self.normalize,
            integrand=self.integrand,
            is_mode=is_mode or self.is_mode,
            clip_c=CLIP_C,
            temperature=self.temperature,
        )

    @property
    def modes(self) -> list[str]:
        """The modes of importance weights that are defined."""
        undefined = self.integrand != "rb" or self.normalize == MEAN
        return ["snis", "clip"] if undefined else ["snis", "clip", "per_decision"]

    @property
    def estimators(self) -> list[tuple[str, str]]:
        """The pairs of score and baseline that are defined."""
        to_go = [] if self.normalize == MEAN else [("to_go", "none"), ("to_go", "hk")]
        return [("full", "none"), *to_go]

    def sections(self) -> dict[str, Any]:
        """The sections of the configuration."""
        return {
            "objective": {
                "normalize": self.normalize,
                "integrand": self.integrand,
                "temperature": self.temperature,
            },
            "truth": {"is_mode": self.is_mode, "clip_c": CLIP_C},
            "linear": {"score": self.score, "baseline": self.baseline},
            "curvature": {"method": "taylor"},
            "update": {
                "max_grad_norm": MAX_GRAD_NORM,
                "lr_override": LEARNING_RATE,
                "save_delta": True,
            },
        }


def make_settings() -> list[Setting]:
    """Four normalisations, two integrands, two temperatures.

    At the second temperature the headline is the last mode and the last estimator that
    are defined, so that each of them is the headline of some run.
    """
    settings = []
    for normalize, integrand in product(ref.NORMALIZATIONS, ("rb", "surprisal")):
        plain = Setting(normalize=normalize, integrand=integrand)
        score, baseline = plain.estimators[-1]
        other = replace(
            plain,
            temperature=1.3,
            is_mode=plain.modes[-1],
            score=score,
            baseline=baseline,
        )
        settings += [plain, other]
    settings.append(Setting(is_mode="clip", score="to_go"))
    return settings


# What is normalised and weighed hangs on the scores alone: one checkpoint has every
# setting, and each of the others the plain one and the one that is least like it.
ALL = "qwen2-lora"
TWO = [Setting(), make_settings()[1]]
SETTINGS = {name: make_settings() if name == ALL else TWO for name in CASES}


@cache
def probe(run: TinyRun, setting: Setting) -> Probed:
    return run.probe(**setting.sections())


@cache
def naive_step(run: TinyRun, temperature: float) -> NaiveStep:
    return run.naive_step(
        LossSettings(temperature=temperature),
        max_grad_norm=MAX_GRAD_NORM,
        learning_rate=LEARNING_RATE,
    )


@cache
def scores(run: TinyRun, temperature: float, eta: float) -> ref.Scores:
    """The reference's scores of E at theta + eta delta."""
    delta = naive_step(run, temperature).delta
    with ref.parameters_shifted(run.saved.model, delta, eta):
        return ref.scores(run.saved.model, run.E, temperature)


@cache
def token_derivatives(run: TinyRun, temperature: float) -> list[ref.TokenDerivatives]:
    """Values and derivatives along v = delta / eta of every row of E."""
    delta = naive_step(run, temperature).delta
    direction = {name: change / LEARNING_RATE for name, change in delta.items()}
    return [
        ref.token_derivatives(run.saved.model, row, direction, temperature)
        for row in run.E
    ]


@dataclass(frozen=True)
class Case:
    """A checkpoint with its batches, what was asked for and what a probe gave."""

    run: TinyRun
    setting: Setting
    probed: Probed

    def rows(self, split: str) -> list[dict[str, Any]]:
        return [row for row in self.probed.sequences if row["split"] == split]

    def linear(self, score: str, baseline: str) -> dict[str, Any]:
        """A row of `linear_all` without control variates."""
        wanted = {"score": score, "baseline": baseline, "control_variates": False}
        rows = self.probed.results.linear_all
        (row,) = (row for row in rows if wanted.items() <= row.items())
        return row

    def scores(self) -> tuple[ref.Scores, ref.Scores]:
        """The reference's scores of E at theta and after the step."""
        temperature = self.setting.temperature
        return scores(self.run, temperature, 0.0), scores(self.run, temperature, 1.0)

    def truth(self, is_mode: str | None = None) -> ref.Truth:
        objective = self.setting.objective(is_mode)
        return ref.delta_h_true(self.run.E, *self.scores(), objective)

    def slope(self, score: str, baseline: str) -> ref.Slope:
        return ref.slope_from_tokens(
            token_derivatives(self.run, self.setting.temperature),
            self.setting.objective("snis"),
            score=score,
            baseline=baseline,
        )

    def headline_slope(self) -> ref.Slope:
        return self.slope(self.setting.score, self.setting.baseline)


RunMaker = Callable[[str], TinyRun]


@pytest.fixture(scope="module")
def make_named_run(tmp_path_factory: pytest.TempPathFactory) -> RunMaker:
    """Each checkpoint is written once."""

    @cache
    def make(name: str) -> TinyRun:
        family, options = CASES[name]
        return make_run(tmp_path_factory.mktemp(name), family, **options)

    return make


RUNS = [(name, setting) for name in CASES for setting in SETTINGS[name]]


def label(value: tuple[str, Setting]) -> str:
    name, setting = value
    parts = (setting.normalize, setting.integrand, setting.temperature, setting.is_mode)
    return "-".join((name, *map(str, parts)))


@pytest.fixture(scope="module", params=RUNS, ids=label)
def case(request: pytest.FixtureRequest, make_named_run: RunMaker) -> Case:
    name, setting = request.param
    run = make_named_run(name)
    return Case(run, setting, probe(run, setting))


def close(value: float, expected: float, scale: float | None = None) -> bool:
    """Equal up to RTOL of the scale, which is the expected value unless it is given."""
    return abs(value - expected) <= RTOL * abs(expected if scale is None else scale)


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors.values()))


# Against the reference


def test_step_is_the_naive_one(case: Case) -> None:
    expected = naive_step(case.run, case.setting.temperature)
    update = case.probed.results.update
    assert close(update.param_update_l2, norm(expected.delta))
    assert close(update.grad_norm, expected.grad_norm)
    assert close(update.clip_coef, expected.clip_coef)
    assert update.learning_rate_used == LEARNING_RATE
    assert update.num_optimizer_steps == 1
    delta = case.probed.delta
    assert delta is not None
    assert delta.keys() == expected.delta.keys()
    for name, change in expected.delta.items():
        assert norm({name: delta[name] - change}) <= RTOL * norm({name: change})
    sizes = sorted((norm({n: d}) for n, d in expected.delta.items()), reverse=True)
    for row, size in zip(update.top_parameters, sizes[:10], strict=True):
        assert close(row["l2"], size)
        assert close(row["l2"], norm({row["name"]: expected.delta[row["name"]]}))


def test_truth(case: Case) -> None:
    truth, expected = case.probed.results.truth, case.truth()
    names = ("H_orig", "H_upd", "H_orig_se", "H_upd_se", "delta_h_true", "se", "ess")
    for name in names:
        assert close(getattr(truth, name), getattr(expected, name)), name
    assert truth.H_upd - truth.H_orig == truth.delta_h_true
    assert truth.ess_fraction == truth.ess / len(case.run.E)
    weights = torch.tensor(expected.log_weights, dtype=DOUBLE)
    middle = weights.sort().values[len(weights) // 2 - 1 : len(weights) // 2 + 1]
    largest = float(weights.abs().max())
    for name, value in (
        ("min", weights.min()),
        ("median", middle.mean()),
        ("max", weights.max()),
    ):
        assert close(truth.log_weight[name], float(value), largest), name
    clipped = [weight > math.log(CLIP_C) for weight in expected.log_weights]
    assert truth.clip_fraction == sum(clipped) / len(clipped)
    assert 0 < truth.clip_fraction < 1


def test_truth_in_every_mode(case: Case) -> None:
    rows = {row["is_mode"]: row for row in case.probed.results.truth_all}
    assert list(rows) == case.setting.modes
    for mode, row in rows.items():
        expected = case.truth(mode)
        assert close(row["delta_h_true"], expected.delta_h_true)
        assert close(row["se"], expected.se)
        assert close(row["ess_fraction"], expected.ess / len(case.run.E))
    assert len({row["delta_h_true"] for row in rows.values()}) == len(rows)


def test_sequences_of_E(case: Case) -> None:
    """Every row, in file order; empty responses with their zeros."""
    rows, (old, new) = case.rows("E"), case.scores()
    for number, (row, given, before, after) in enumerate(
        zip(rows, case.run.E, old, new, strict=True)
    ):
        assert (row["index"], row["tag"]) == (number, f"row {number}")
        assert row["group"] == given.group
        assert row["num_tokens"] == len(given.response_ids)
        (logp, entropy), (logp_upd, entropy_upd) = before, after
        for name, values in (
            ("logp", logp),
            ("entropy", entropy),
            ("logp_upd", logp_upd),
            ("entropy_upd", entropy_upd),
        ):
            assert close(row[name], float(values.sum())), name
        weight = float(logp_upd.sum() - logp.sum())
        assert close(row["log_weight"], weight, float(logp.sum()))
    assert sum(row["num_tokens"] == 0 for row in rows) == 2


def test_sequences_of_U(case: Case) -> None:
    run, temperature = case.run, case.setting.temperature
    scored = ref.scores(run.saved.model, run.U, temperature)
    advantages = ref.advantages(run.U, "centered")
    for row, (logp, entropy), advantage, given in zip(
        case.rows("U"), scored, advantages, run.U, strict=True
    ):
        assert close(row["logp"], float(logp.sum()))
        assert close(row["entropy"], float(entropy.sum()))
        assert close(row["advantage"], advantage, 1.0)
        assert row["reward"] == given.reward


def test_true_contributions(case: Case) -> None:
    expected = case.truth()
    largest = max(map(abs, expected.contributions))
    shares = [row["contribution_true"] for row in case.rows("E")]
    for share, value in zip(shares, expected.contributions, strict=True):
        assert close(share, value, largest)
    truth = case.probed.results.truth
    difference = math.fsum(shares) - truth.delta_h_true
    assert abs(difference) <= SUM_ATOL * max(1, truth.H_orig)


def test_linear_contributions(case: Case) -> None:
    linear, expected = case.probed.results.linear, case.headline_slope()
    largest = max(map(abs, expected.contributions))
    shares = [row["contribution_linear"] for row in case.rows("E")]
    for share, value in zip(shares, expected.contributions, strict=True):
        assert close(share, LEARNING_RATE * value, LEARNING_RATE * largest)
    size = case.probed.results.truth.H_orig
    assert abs(math.fsum(shares) - linear.delta_h1) <= SUM_ATOL * max(1, size)


def test_slope(case: Case) -> None:
    setting, linear = case.setting, case.probed.results.linear
    expected = case.headline_slope()
    scale = max(map(abs, (expected.score, expected.pathwise, expected.denominator)))
    assert close(linear.slope, expected.slope, scale)
    for name in ("score", "pathwise", "denominator"):
        assert close(linear.terms[name], getattr(expected, name), scale), name
    assert close(math.fsum(linear.terms.values()), linear.slope, scale)
    assert linear.delta_h1 == LEARNING_RATE * linear.slope
    rows, pieces = case.run.E, expected.pieces
    error = ref.slope_standard_error(rows, pieces, setting.normalize)
    jackknife = ref.slope_jackknife(rows, pieces, setting.normalize)
    assert close(linear.se, error)
    assert close(linear.se_jackknife, jackknife)
    assert linear.duality_gap <= RTOL


def test_slope_by_every_estimator(case: Case) -> None:
    for score, baseline in case.setting.estimators:
        row = case.linear(score, baseline)
        expected = case.slope(score, baseline)
        scale = max(map(abs, (expected.score, expected.pathwise, expected.denominator)))
        assert close(row["slope"], expected.slope, scale)
        error = ref.slope_standard_error(
            case.run.E, expected.pieces, case.setting.normalize
        )
        assert close(row["se"], error)


def test_error_of_truth_minus_prediction(case: Case) -> None:
    """Delta method by autograd: group g counted w_g times in both estimates at once."""
    setting, batch = case.setting, case.run.E
    old, new = case.scores()
    before, after = (
        torch.tensor(ref.ratio_parts(batch, old, x, setting.objective()), dtype=DOUBLE)
        for x in (old, new)
    )
    pieces = case.headline_slope().pieces
    index = torch.tensor([row.group for row in batch])
    group_weights = torch.ones(int(index.max()) + 1, dtype=DOUBLE, requires_grad=True)
    w = group_weights[index]

    def over(numerator: Tensor, size: Tensor) -> Tensor:
        return (w @ numerator) / (1.0 if setting.normalize == "sum" else w @ size)

    change = over(*after) - over(*before)
    mean = over(pieces.value, pieces.size)
    slope = over(pieces.score + pieces.pathwise, pieces.size) - mean * over(
        pieces.remaining, pieces.size
    )
    (influence,) = torch.autograd.grad(change - LEARNING_RATE * slope, group_weights)
    n = len(influence)
    spread = float((influence - influence.mean()).square().sum())
    expected = math.sqrt(n / (n - 1) * spread)
    assert close(case.probed.results.linear.difference_se, expected)


def test_no_audit_fails(case: Case) -> None:
    document = case.probed.results.to_dict()
    assert [row["name"] for row in document["audit"] if row["verdict"] == "fail"] == []
    assert document["status"] == "ok"
    sizes = {"num_groups": 6, "num_sequences": 10}
    assert sizes.items() <= document["E"].items()
    tokens = sum(len(row.response_ids) for row in case.run.E)
    assert document["E"]["num_tokens"] == tokens


# Against central differences along the probe's own direction

PAIRS = {("full", "none"): "snis", ("to_go", "hk"): "per_decision"}
DIFFERENCED = [
    (name, setting)
    for name in ("gpt2-lora", "qwen2-lora")
    for setting in SETTINGS[name]
    if setting.integrand == "rb" and (setting.score, setting.baseline) in PAIRS
]


@dataclass(frozen=True)
class Along:
    """The reference's truth as a function of eta, along the probe's own direction."""

    case: Case
    scores_at: Callable[[float], ref.Scores]
    step: float

    def derivative(self, value: Callable[[ref.Truth], float], is_mode: str) -> float:
        objective, old = self.case.setting.objective(is_mode), self.scores_at(0.0)

        def at(eta: float) -> float:
            rows = self.case.run.E
            return value(ref.delta_h_true(rows, old, self.scores_at(eta), objective))

        return ref.slope_by_central_difference(at, self.step)


@pytest.fixture(scope="module", params=DIFFERENCED, ids=label)
def along(request: pytest.FixtureRequest, make_named_run: RunMaker) -> Along:
    name, setting = request.param
    run = make_named_run(name)
    probed = probe(run, setting)
    assert probed.delta is not None
    direction = {n: change / LEARNING_RATE for n, change in probed.delta.items()}
    scores_at = ref.scores_along(run.saved.model, run.E, direction, setting.temperature)
    step = DIFFERENCE_STEP / norm(direction)
    return Along(Case(run, setting, probed), scores_at, step)


def test_slope_is_the_derivative_of_its_partner(along: Along) -> None:
    for estimator in PAIRS.keys() & set(along.case.setting.estimators):
        slope = along.case.linear(*estimator)["slope"]
        difference = along.derivative(lambda t: t.delta_h_true, PAIRS[estimator])
        assert abs(slope - difference) <= DIFFERENCE_RTOL * abs(difference), estimator


def test_curvature_is_the_second_derivative_of_snis(along: Along) -> None:
    case, step = along.case, along.step
    rows, objective = case.run.E, case.setting.objective("snis")
    entropy = ref.entropy_along(rows, along.scores_at, objective)
    difference = ref.curvature_by_central_difference(entropy, step)
    curvature = case.probed.results.curvature
    assert curvature is not None
    found = curvature.second_derivative
    assert abs(found - difference) <= CURVATURE_RTOL * abs(difference)
    slope = case.probed.results.linear.slope
    second = LEARNING_RATE * slope + 0.5 * LEARNING_RATE**2 * found
    assert curvature.delta_h2 == pytest.approx(second, rel=1e-12)
    assert curvature.eta_star == pytest.approx(abs(2 * slope / found), rel=1e-12)


def test_linear_contributions_are_derivatives_of_the_true_ones(along: Along) -> None:
    setting = along.case.setting
    mode = PAIRS[setting.score, setting.baseline]
    shares = [row["contribution_linear"] for row in along.case.rows("E")]
    largest = max(map(abs, shares))
    for i, share in enumerate(shares):
        change = along.derivative(lambda t, i=i: t.contributions[i], mode)
        assert abs(share - LEARNING_RATE * change) <= DIFFERENCE_RTOL * largest
