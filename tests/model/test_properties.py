"""Whatever the batches, the ranks and the settings: a probe reports what brute force says.

Random ragged batches with empty responses, random groups, one to four ranks, token
budgets, losses, normalisations, integrands, modes of weights and baselines, in float64
against the slow reference.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import run_probe
from reference import LossSettings, Objective
from thread_ranks import run_thread_ranks
from tiny_runs import SAMPLER_NOISE, TinyRun, make_run

from entropy_ddp.results import Results

RTOL = 1e-9
MEAN = "per_sequence_token_mean"
LEARNING_RATE = 0.02
MAX_GRAD_NORM = 0.1
CLIP_C = 1.02


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One random run."""

    seed: int
    E: tuple[int, ...]
    U: tuple[int, ...]
    with_empty: bool
    world_size: int
    budget: int
    share_prompts: bool
    normalize: str
    integrand: str
    temperature: float
    loss: str
    length_norm: str | int
    ratio: str
    kl_coefficient: float
    advantage: str
    mode: int
    estimator: int

    @property
    def modes(self) -> list[str]:
        """Modes of weights that are defined."""
        undefined = self.integrand != "rb" or self.normalize == MEAN
        return ["snis", "clip"] if undefined else ["snis", "clip", "per_decision"]

    @property
    def estimators(self) -> list[tuple[str, str]]:
        """Pairs of score and baseline that are defined and that the reference has."""
        to_go = [] if self.normalize == MEAN else [("to_go", "none"), ("to_go", "hk")]
        return [("full", "none"), *to_go]

    @property
    def loss_settings(self) -> LossSettings:
        """The loss as the reference takes it."""
        return LossSettings(
            loss=self.loss,
            length_norm=self.length_norm,
            ratio=self.ratio,
            kl_coefficient=self.kl_coefficient,
            temperature=self.temperature,
        )

    def objective(self, mode: str) -> Objective:
        """The objective as the reference takes it."""
        return Objective(
            normalize=self.normalize,
            integrand=self.integrand,
            is_mode=mode,
            clip_c=CLIP_C,
            temperature=self.temperature,
        )

    def sections(self) -> dict[str, Any]:
        """The sections of the configuration."""
        score, baseline = self.estimators[self.estimator % len(self.estimators)]
        return {
            "objective": {
                "normalize": self.normalize,
                "integrand": self.integrand,
                "temperature": self.temperature,
            },
            "truth": {
                "is_mode": self.modes[self.mode % len(self.modes)],
                "clip_c": CLIP_C,
                "ess_abort": 0.0,
            },
            "linear": {"score": score, "baseline": baseline},
            "curvature": {"enabled": False},
            "gradient_dot": {"enabled": False},
            "update": {
                "loss": self.loss,
                "length_norm": self.length_norm,
                "ratio": self.ratio,
                "kl_coefficient": self.kl_coefficient,
                "max_grad_norm": MAX_GRAD_NORM,
                "lr_override": LEARNING_RATE,
            },
            "compute": {
                "device": "cpu",
                "tokens_per_microbatch": self.budget,
                "share_prompts": self.share_prompts,
            },
        }


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    """Every combination that is allowed."""
    groups = st.lists(st.integers(1, 4), min_size=2, max_size=5)
    update = st.lists(st.integers(2, 4), min_size=1, max_size=4)
    loss = draw(st.sampled_from(["dr_grpo", "grpo", "dapo", "nll"]))
    ratio = (
        "on_policy"
        if loss == "nll"
        else draw(st.sampled_from(["on_policy", "clipped"]))
    )
    return Draw(
        seed=draw(st.integers(0, 10**6)),
        E=tuple(draw(groups)),
        U=tuple(draw(update)),
        with_empty=draw(st.booleans()),
        world_size=draw(st.integers(1, 4)),
        budget=draw(st.sampled_from([1, 7, 24, 4096])),
        share_prompts=draw(st.booleans()),
        normalize=draw(st.sampled_from(ref.NORMALIZATIONS)),
        integrand=draw(st.sampled_from(["rb", "surprisal"])),
        temperature=draw(st.sampled_from([1.0, 0.7, 1.6])),
        loss=loss,
        length_norm=draw(st.sampled_from(["group_max", 9])),
        ratio=ratio,
        kl_coefficient=draw(st.sampled_from([0.0, 0.1])) if loss != "nll" else 0.0,
        advantage=draw(st.sampled_from(["centered", "standardized"])),
        mode=draw(st.integers(0, 2)),
        estimator=draw(st.integers(0, 2)),
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A checkpoint; its batches are drawn."""
    return make_run(tmp_path_factory.mktemp("tiny"), "qwen2")


def with_batches(tiny: TinyRun, draw: Draw) -> TinyRun:
    """The checkpoint with the drawn batches."""
    evaluation, update = (
        ref.random_rows(
            draw.seed + number,
            groups=len(responses),
            responses=responses,
            vocabulary=17,
            with_empty=draw.with_empty,
        )
        for number, responses in enumerate((draw.E, draw.U))
    )
    update = ref.with_sampling_logprobs(
        tiny.saved.model, update, 5, noise=SAMPLER_NOISE
    )
    return replace(tiny, E=evaluation, U=update)


def require_close(name: str, found: float, expected: float, scale: float) -> None:
    """Equal up to rounding of the terms that were added."""
    assert abs(found - expected) <= RTOL * max(scale, abs(expected)), (
        name,
        found,
        expected,
    )


def require_reference(run: TinyRun, draw: Draw, results: Results) -> None:
    """Step, truth in every mode and slope by every estimator, with their errors."""
    model = run.saved.model
    step = run.naive_step(
        draw.loss_settings,
        max_grad_norm=MAX_GRAD_NORM,
        learning_rate=LEARNING_RATE,
        advantage=draw.advantage,
    )
    length = sum(float(d.square().sum()) for d in step.delta.values()) ** 0.5
    update = results.update
    require_close("step", update.param_update_l2, length, 0.0)
    assert update.grad_norm is not None
    require_close("gradient", update.grad_norm, step.grad_norm, 1e-3)
    old = ref.scores(model, run.E, draw.temperature)
    with ref.parameters_shifted(model, step.delta, 1.0):
        new = ref.scores(model, run.E, draw.temperature)
    entropy = sum(float(h.sum().abs()) + float(p.sum().abs()) for p, h in old)
    for row in results.truth_all:
        truth = ref.delta_h_true(run.E, old, new, draw.objective(row["is_mode"]))
        require_close("truth", row["delta_h_true"], truth.delta_h_true, entropy)
        require_close("its error", row["se"], truth.se, entropy)
        require_close("ESS", row["ess_fraction"], truth.ess / len(run.E), 1.0)
    assert [row["is_mode"] for row in results.truth_all] == draw.modes
    direction = {name: d / LEARNING_RATE for name, d in step.delta.items()}
    tokens = [
        ref.token_derivatives(model, row, direction, draw.temperature) for row in run.E
    ]
    for score, baseline in draw.estimators:
        wanted = {"score": score, "baseline": baseline, "control_variates": False}
        (row,) = (r for r in results.linear_all if wanted.items() <= r.items())
        slope = ref.slope_from_tokens(
            tokens, draw.objective("snis"), score=score, baseline=baseline
        )
        terms = abs(slope.score) + abs(slope.pathwise) + abs(slope.denominator)
        require_close("slope", row["slope"], slope.slope, terms)
        error = ref.slope_standard_error(run.E, slope.pieces, draw.normalize)
        require_close("its error", row["se"], error, terms)


def require_case(tiny: TinyRun, draw: Draw) -> None:
    """A run on the drawn number of ranks against the reference."""
    run = with_batches(tiny, draw)
    with_tokens = {row.group for row in run.E if row.response_ids}
    if len(with_tokens) < 2 or not any(row.response_ids for row in run.U):
        return
    config = run.config(**draw.sections())
    batches = config.batches.model_copy(update={"advantage": draw.advantage})
    config = config.model_copy(update={"batches": batches})
    ranks = run_thread_ranks(
        draw.world_size, lambda world: run_probe(config, world, None, lambda *_: None)
    )
    for probed in ranks:
        assert probed.results.truth_all == ranks[0].results.truth_all
    require_reference(run, draw, ranks[0].results)


def run_cases(tiny: TinyRun, count: int) -> None:
    """The same cases every time; a failing one is printed."""

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(draw=draws())
    def cases(draw: Draw) -> None:
        require_case(tiny, draw)

    cases()


def test_random_runs_are_those_of_brute_force(tiny: TinyRun) -> None:
    """A few on every test run."""
    run_cases(tiny, 6)


@pytest.mark.long
def test_many_random_runs_are_those_of_brute_force(tiny: TinyRun) -> None:
    """More of them."""
    run_cases(tiny, 80)


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    """The meeting of the threads does not wait for one that is gone."""

    def body(world: Any) -> float:
        if world.rank == 1:
            raise ValueError("on purpose")
        return float(world.sum(torch.ones(1, dtype=torch.float64), "scalars"))

    with pytest.raises(ValueError, match="on purpose"):
        run_thread_ranks(3, body)
    assert run_thread_ranks(3, lambda world: world.max(float(world.rank))) == [2.0] * 3
