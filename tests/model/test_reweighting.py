"""Is an E that another policy wrote weighed as written, in truth, slope and audits?"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import reference as ref
from reference import Objective
from thread_ranks import run_thread_ranks
from tiny_runs import TinyRun, make_run

from entropy_ddp.errors import InputError
from entropy_ddp.probe.pipeline import run as run_job
from entropy_ddp.results import Probed

pytestmark = pytest.mark.usefixtures("models_checked_once")

RTOL = 1e-9  # float64, the same sums in another order
DIFFERENCE_RTOL = 1e-6  # central differences
DIFFERENCE_STEP = 1e-4
LEARNING_RATE = 0.02
NOISE = 0.2  # nats a token between the sampler and the checkpoint
SECTIONS: dict[str, Any] = {
    "update": {"max_grad_norm": 0.1, "lr_override": LEARNING_RATE, "save_delta": True},
    "compute": {"device": "cpu", "tokens_per_microbatch": 40},
}
HK = {"linear": {"score": "to_go", "baseline": "hk"}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """E is as another policy reports it, whose log-probabilities are off by noise."""
    made = make_run(tmp_path_factory.mktemp("qwen2"), "qwen2")
    rows = ref.random_rows(
        7,
        groups=12,
        responses=[1, 2] * 6,
        vocabulary=made.saved.model.config.vocab_size,
    )
    sampled = ref.with_sampling_logprobs(made.saved.model, rows, 3, noise=NOISE)
    return replace(made, E=sampled)


@cache
def probe(run: TinyRun, normalize: str = "per_token", baseline: str = "auto") -> Probed:
    sections = SECTIONS | {"objective": {"normalize": normalize}}
    if baseline == "hk":
        sections |= HK
    return run.probe(**sections | reweighted(run))


def reweighted(run: TinyRun) -> dict[str, Any]:
    """The section of the batches, with E weighed."""
    batches = run.config(**SECTIONS).model_dump()["batches"]
    batches["E"]["reweight"] = "sampler"
    return {"batches": batches}


def entropy_along(run: TinyRun, normalize: str) -> Callable[[float], float]:
    """The reference's weighted entropy along the probe's own step."""
    probed = probe(run, normalize, "hk")
    assert probed.delta is not None
    direction = {name: x / LEARNING_RATE for name, x in probed.delta.items()}
    scores_at = ref.scores_along(run.saved.model, run.E, direction, 1.0)
    objective = Objective(normalize=normalize, is_mode="per_decision")
    sampler = [
        (entropy.new_tensor(row.sampling_logprobs), entropy)
        for row, (_, entropy) in zip(run.E, scores_at(0.0), strict=True)
    ]
    return lambda eta: ref.entropy_value(run.E, sampler, scores_at(eta), objective)


@pytest.mark.parametrize("normalize", ["per_token", "per_sequence", "sum"])
def test_truth_slope_and_second_order_by_the_reference(
    run: TinyRun, normalize: str
) -> None:
    """Weights of prefixes against the sampler; slopes by central differences."""
    results, entropy = (
        probe(run, normalize, "hk").results,
        entropy_along(run, normalize),
    )
    (plain,) = results.truth_all
    before, after = entropy(0.0), entropy(LEARNING_RATE)
    assert results.truth.H_orig == pytest.approx(before, rel=RTOL)
    assert plain["is_mode"] == "per_decision"
    assert plain["delta_h_true"] == pytest.approx(after - before, rel=1e-7)
    size = results.update.param_update_l2 / LEARNING_RATE

    def derivative(eta: float) -> float:
        step = 10 * DIFFERENCE_STEP / size
        return (entropy(eta + step) - entropy(eta - step)) / (2 * step)

    assert results.linear.slope == pytest.approx(derivative(0.0), rel=DIFFERENCE_RTOL)
    curvature = results.curvature
    assert curvature is not None
    middle = LEARNING_RATE * derivative(LEARNING_RATE / 2)
    assert curvature.delta_h2 == pytest.approx(middle, rel=DIFFERENCE_RTOL)


def test_the_effective_sample_size_of_the_sampler_s_weights(run: TinyRun) -> None:
    results = probe(run).results
    scores = ref.scores(run.saved.model, run.E, 1.0)
    weights = [
        float((logp.sum() - sum(row.sampling_logprobs or [])).exp())
        for row, (logp, _) in zip(run.E, scores, strict=True)
    ]
    expected = ref.effective_sample_size(weights)
    assert results.truth.sampler is not None
    assert results.truth.sampler["ess"] == pytest.approx(expected, rel=RTOL)
    assert expected < 0.98 * len(run.E)


def test_forward_and_reverse_mode_agree(run: TinyRun) -> None:
    """With what knows the token, its mean put back with the weight of the prefix."""
    for baseline in ("auto", "hk"):
        linear = probe(run, baseline=baseline).results.linear
        assert linear.baseline == ("hk" if baseline == "hk" else "action_value")
        assert linear.duality_gap < RTOL
    slopes = {row["baseline"]: row["slope"] for row in probe(run).results.linear_all}
    assert len(set(slopes.values())) == len(slopes) == 4


def test_a_sampler_of_the_same_policy_changes_nothing(run: TinyRun) -> None:
    same = replace(run, E=ref.with_sampling_logprobs(run.saved.model, run.E, 3))
    for sections in (SECTIONS, SECTIONS | HK):
        plain = same.probe(**sections).results
        weighed = same.probe(**sections | reweighted(same)).results
        assert weighed.truth.H_orig == pytest.approx(plain.truth.H_orig, rel=RTOL)
        for name in ("delta_h_true", "se", "se_jackknife", "H_upd"):
            found, expected = (getattr(r.truth, name) for r in (weighed, plain))
            assert found == pytest.approx(expected, rel=1e-7), name
        for name in ("slope", "se", "se_jackknife"):
            found, expected = (getattr(r.linear, name) for r in (weighed, plain))
            assert found == pytest.approx(expected, rel=1e-7), name


def test_three_ranks_weigh_alike(run: TinyRun) -> None:
    expected = probe(run).results
    config = run.config(**SECTIONS | reweighted(run))
    probed, *_ = run_thread_ranks(
        3, lambda world: run_job("probe", config, world, None, lambda *_: None)
    )
    found = probed.results
    for name in ("H_orig", "delta_h_true", "se_jackknife", "ess"):
        value = getattr(expected.truth, name)
        assert getattr(found.truth, name) == pytest.approx(value, rel=RTOL), name
    assert found.linear.slope == pytest.approx(expected.linear.slope, rel=RTOL)


def test_another_policy_is_no_fault_where_it_is_weighed(run: TinyRun) -> None:
    def complaints(results: Any) -> set[str]:
        return {row.name for row in results.audit if row.verdict == "fail"}

    assert not complaints(probe(run).results)
    unweighed = run.probe(**SECTIONS).results
    assert any("sampler mismatch" in name for name in complaints(unweighed))


def test_rows_without_the_sampler_s_numbers_are_refused(run: TinyRun) -> None:
    rows = [replace(run.E[0], sampling_logprobs=None), *run.E[1:]]
    with pytest.raises(InputError, match=r"reweight: sampler needs .* of E; line 1"):
        lacking = replace(run, E=rows)
        lacking.probe(**SECTIONS | reweighted(lacking))


@pytest.mark.parametrize(
    "sections",
    [
        {"truth": {"is_mode": "snis"}},
        {"linear": {"score": "full"}},
        {"linear": {"control_variates": True}},
        {"objective": {"integrand": "surprisal"}},
        {"curvature": {"method": "taylor"}},
    ],
)
def test_what_has_no_weighted_form_is_refused(
    run: TinyRun, sections: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"reweight weighs the prefixes"):
        run.config(**SECTIONS | sections | reweighted(run))
