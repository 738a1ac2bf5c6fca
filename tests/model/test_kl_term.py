"""The KL term of the loss: its gradient, its reference policy, what it costs."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from jobs import run_attribution
from peft import LoraConfig, get_peft_model
from reference import LossSettings, Row
from tiny_runs import TinyRun, as_batch, make_passes, make_run
from torch import Tensor

from entropy_ddp.checkpoint.policy import adapter_disabled, require_reference
from entropy_ddp.config import Update
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.probe.check import inspect_run
from entropy_ddp.probe.gradient_dot import loss_units, mean_gradient
from entropy_ddp.probe.passes import loss_gradient
from entropy_ddp.update.loss import loss_weights

pytestmark = pytest.mark.usefixtures("models_checked_once")

RTOL = 1e-10  # the contract's bar for float64, of the gradient's norm
COEFFICIENT = 0.4  # the term is as large as the rest of the gradient
LOSSES: dict[str, dict[str, Any]] = {
    "dr_grpo": {},
    "dr_grpo, constant": {"length_norm": 10},
    "grpo": {"loss": "grpo"},
    "dapo": {"loss": "dapo"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A LoRA checkpoint whose adapter is not zero."""
    return make_run(tmp_path_factory.mktemp("run"), "qwen2")


def settings(**more: Any) -> dict[str, Any]:
    """The `update` section with a KL term."""
    return {"kl_coefficient": COEFFICIENT} | more


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors.values()))


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert found.keys() == expected.keys()
    return norm({n: found[n] - e for n, e in expected.items()}) / norm(expected)


@pytest.mark.parametrize("estimator", ["k3", "k3_weighted"])
@pytest.mark.parametrize("ratio", ["on_policy", "clipped"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_the_loss_written_out(
    run: TinyRun, loss: str, ratio: str, estimator: str
) -> None:
    """And another one than without the term."""
    update = settings(ratio=ratio, kl_estimator=estimator, **LOSSES[loss])
    session = run.open(update=update)
    gradient, *_ = loss_gradient(session)
    found = session.passes.layout.views(gradient)
    assert distance(found, run.gradient(LossSettings(**update))) < RTOL
    without = run.gradient(LossSettings(**update | {"kl_coefficient": 0.0}))
    assert distance(found, without) > 0.05


def test_the_estimators_differ_off_policy_and_on(run: TinyRun) -> None:
    """The ratio's derivative counts even where its value is 1."""
    plain, weighted = (
        run.gradient(LossSettings(**settings(kl_estimator=estimator)))
        for estimator in ("k3", "k3_weighted")
    )
    assert distance(plain, weighted) > 0.05


@pytest.mark.parametrize(
    ("estimator", "ratio", "expected"),
    [
        ("k3", None, 0.5 * (1 - math.exp(0.3))),
        ("k3", 1.5, 0.5 * (1 - math.exp(0.3))),
        ("k3_weighted", None, -0.5 * 0.3),
        ("k3_weighted", 1.5, -0.5 * 1.5 * 0.3),
    ],
)
def test_by_hand(estimator: str, ratio: float | None, expected: float) -> None:
    """Weight of log p of one token with A = 0 whose log p_ref is larger by 0.3."""
    logp = -1.25
    row = Row(
        0, [1], [2], advantage=0.0, sampling_logprobs=[logp - math.log(ratio or 1.0)]
    )
    update = Update(
        loss="dapo", kl_coefficient=0.5, kl_estimator=estimator,
        ratio="on_policy" if ratio is None else "clipped", epsilon_low=0.9,
        epsilon_high=9.0,
    )  # fmt: skip
    shard = as_batch([row], 17, "U").shard(0, 1)
    own, reference = (
        torch.tensor([x], dtype=torch.float64) for x in (logp, logp + 0.3)
    )
    on_logp, _ = loss_weights(shard, update, reference)(torch.tensor([0]), own, own)
    assert float(on_logp) == pytest.approx(expected, rel=1e-12)


def test_gradient_dot_takes_the_term_with_it(run: TinyRun) -> None:
    """The mean of the units' gradients is minus the gradient of the loss."""
    session = run.open(update=settings())
    mean = mean_gradient(session, loss_units(session))
    expected = run.gradient(LossSettings(**settings()))
    assert distance(session.passes.layout.views(-mean), expected) < RTOL


def test_attribution_takes_the_term_with_it(run: TinyRun) -> None:
    """The shares of U's tokens and the other parts add up to the slope."""
    config = run.config(update=settings(), attribution={"verify": True})
    result = run_attribution(config, World(), None, lambda *_: None).results
    assert result.attribution is not None
    assert result.attribution.attribution_gap < 1e-10
    # Without any tokens there would be no term either.
    rules = {row["rule"]: row for row in result.attribution.what_if}
    assert rules["all tokens with A > 0"]["delta_h_true"] != 0


def test_the_reference_costs_one_pass_over_U(run: TinyRun) -> None:
    """Counted, and only if there is a term."""
    counted = [
        {(row["pass"], row["batch"]): row["sequences"] for row in probed.run.passes}
        for probed in (run.probe(update=u).results for u in (settings(), {}))
    ]
    assert counted[0].pop(("score order 0", "U")) == len(run.U)
    assert counted[0] == counted[1]


@pytest.mark.parametrize("copied", [[], ["lm_head"]])
def test_the_reference_is_the_model_before_training(copied: list[str]) -> None:
    """Trained copies of whole modules are left out with the adapter, and all come back."""
    base = ref.tiny_llama(0, attention="sdpa")
    rows = ref.random_rows(1, groups=2, responses=2, vocabulary=15)
    shard = as_batch(rows, 15, "U").shard(0, 1)
    expected = make_passes(base).score(shard).logp
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=copied)
    model = get_peft_model(base, config).eval()
    for parameter in ref.trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    trainable = list(ref.trainable(model))
    passes = make_passes(model)
    before = passes.score(shard).logp
    with adapter_disabled(model):
        assert torch.equal(passes.score(shard).logp, expected)
    assert list(ref.trainable(model)) == trainable
    assert torch.equal(passes.score(shard).logp, before)
    assert not torch.allclose(before, expected)


def test_full_weights_have_no_reference(tmp_path: Path) -> None:
    """Said by `check` too."""
    run = make_run(tmp_path, "qwen2", full=True)
    with pytest.raises(InputError, match="reference policy.*found full weights"):
        run.open(update=settings())
    with pytest.raises(InputError, match="reference policy.*found full weights"):
        inspect_run(run.config(update=settings()), World(), lambda *_: None)


def test_an_adapter_that_was_trained_on_has_another_reference(tmp_path: Path) -> None:
    """TRL keeps its first version beside it, and measures from there."""
    run = make_run(tmp_path, "qwen2")
    policy = run.open(update=settings()).policy
    copy = run.saved.folder / "ref"
    copy.mkdir()
    for path in run.saved.folder.glob("adapter_*"):
        shutil.copy(path, copy)
    with pytest.raises(InputError, match="found a reference adapter of its own"):
        require_reference(policy)
