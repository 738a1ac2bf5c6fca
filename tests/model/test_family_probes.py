"""Is the whole probe exact for other families of models: the step, and both matched pairs?

The families whose passes are tested in tests/model/test_families.py, from a checkpoint
on disk to the results, in float64.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from checkpoints import save_checkpoint
from families import VOCABULARY, plain_model
from jobs import run_sweep
from reference import LossSettings, Objective, delta_h_true, random_rows, scores_along
from tiny_runs import E_RESPONSES, U_RESPONSES, TinyRun

from entropy_ddp.distributed import World
from entropy_ddp.results import Probed

STEP_RTOL = 1e-10  # of the largest change
TRUTH_RTOL = 1e-12  # of the entropy
PAIR_RTOL = 1e-7  # of the largest term of the slope
DUALITY = 1e-10
RATE = 1e-3
CLIP_C = 1.002  # clips some weights and not others
# Coarse steps of the differences; a mixture's must not change the routing.
ETAS = (4e-4, 2e-4)
DORA = "llama, DoRA"
CASES: dict[str, tuple[str, list[str] | None]] = {
    "mistral, v": ("mistral", ["v_proj"]),
    "qwen3, full": ("qwen3", None),
    "gemma2, q and v": ("gemma2", ["q_proj", "v_proj"]),
    "gemma3, v": ("gemma3", ["v_proj"]),
    "phi3, qkv": ("phi3", ["qkv_proj"]),
    "olmo2, full": ("olmo2", None),
    "gpt-neox, qkv": ("gpt-neox", ["query_key_value"]),
    "gpt-neox, full": ("gpt-neox", None),
    "cohere, q and v": ("cohere", ["q_proj", "v_proj"]),
    "granite, full": ("granite", None),
    "mixtral, v": ("mixtral", ["v_proj"]),
    "mixtral, full": ("mixtral", None),
    "mamba, in and x": ("mamba", ["in_proj", "x_proj"]),
    "gemma2, full": ("gemma2", None),
    "qwen3-moe, q and v": ("qwen3-moe", ["q_proj", "v_proj"]),
    # The step by PEFT's gradient, the slope by the true derivative.
    DORA: ("llama", ["q_proj", "down_proj"]),
}
# By the mode of weights of the truth.
PAIRS: dict[str, dict[str, Any]] = {
    "snis": {"linear": {"score": "full", "baseline": "none"}},
    "per_decision": {"linear": {"score": "to_go", "baseline": "hk"}},
}


@pytest.fixture(scope="module", params=CASES)
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    family, targets = CASES[request.param]
    root = tmp_path_factory.mktemp("run")
    model = plain_model(family)
    # The rows hold every token: none of them is padding, whose embedding is not trained.
    model.config.pad_token_id = None
    model.get_input_embeddings().padding_idx = None
    saved = save_checkpoint(
        root,
        family,
        targets=targets,
        full=targets is None,
        model=model,
        **({"use_dora": True} if request.param == DORA else {}),
    )
    evaluation, update = (
        random_rows(
            seed,
            responses=responses,
            groups=len(responses),
            vocabulary=VOCABULARY,
            with_empty=True,
        )
        for seed, responses in ((3, E_RESPONSES), (4, U_RESPONSES))
    )
    return TinyRun(saved=saved, E=evaluation, U=update, folder=root)


Swept = Callable[[str], Probed]


@pytest.fixture(scope="module")
def swept(run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """A probe with a sweep of the step sizes `ETAS`, by the name of its pair."""

    @cache
    def sweep(pair: str) -> Probed:
        sections = PAIRS[pair]
        config = run.config(
            compute={"device": "cpu", "tokens_per_microbatch": 40},
            update={"max_grad_norm": 0.5, "lr_override": RATE, "save_delta": True},
            curvature={"enabled": False},
            truth={"clip_c": CLIP_C, "is_mode": pair},
            sweep={"etas": list(ETAS), "symmetric": True},
            **sections,
        )
        out = tmp_path_factory.mktemp("out")
        return run_sweep(config, World(), out, lambda *_: None)

    return sweep


def test_the_step_is_that_of_torch(run: TinyRun, swept: Swept) -> None:
    """By a training loop of torch on the brute-force loss."""
    found = swept("snis")
    assert found.delta is not None
    expected = run.torch_step(LossSettings(), max_grad_norm=0.5, learning_rate=RATE)
    largest = max(float(change.abs().max()) for change in expected.values())
    assert found.delta.keys() == expected.keys()
    for name, change in expected.items():
        error = float((found.delta[name] - change).abs().max())
        assert error <= STEP_RTOL * largest, name
    assert found.results.linear.duality_gap <= DUALITY


def test_the_truth_is_that_of_the_reference(run: TinyRun, swept: Swept) -> None:
    """In every mode of weights, after the step by torch's AdamW."""
    step = run.torch_step(LossSettings(), max_grad_norm=0.5, learning_rate=RATE)
    scores_at = scores_along(run.saved.model, run.E, step, 1.0)
    results = swept("snis").results
    assert {row["is_mode"] for row in results.truth_all} >= PAIRS.keys()
    for row in results.truth_all:
        objective = Objective(is_mode=row["is_mode"], clip_c=CLIP_C)
        expected = delta_h_true(run.E, scores_at(0.0), scores_at(1.0), objective)
        size = expected.H_orig
        assert abs(results.truth.H_orig - size) <= TRUTH_RTOL * size
        error = abs(row["delta_h_true"] - expected.delta_h_true)
        assert error <= TRUTH_RTOL * size, row["is_mode"]


@pytest.mark.parametrize("mode", PAIRS)
def test_the_slope_is_the_derivative_of_its_truth(swept: Swept, mode: str) -> None:
    """Central differences of the measured change, extrapolated to step size zero."""
    results = swept(mode).results
    change = {point.eta: point.delta_h_true for point in results.sweep or []}
    coarse, fine = ((change[eta] - change[-eta]) / (2 * eta) for eta in ETAS)
    terms = max(map(abs, results.linear.terms.values()))
    difference = (4 * fine - coarse) / 3
    assert abs(results.linear.slope - difference) <= PAIR_RTOL * terms


def test_a_mixture_counts_its_flips(run: TinyRun, swept: Swept) -> None:
    """The audit is there for mixtures, and only for them."""
    rows = [row.name for row in swept("snis").results.audit]
    is_mixture = run.saved.model.config.model_type in ("mixtral", "qwen3_moe")
    name = "tokens of E that the step routes to other experts"
    assert (name in rows) == is_mixture
