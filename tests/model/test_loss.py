"""Is the gradient of every loss that of the loss written out?"""

import math
import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from reference import LossSettings, Row
from tiny_runs import as_batch, make_passes
from torch import Tensor, nn

import entropy_ddp
from entropy_ddp.config import Update
from entropy_ddp.data.advantages import compute_advantages
from entropy_ddp.data.batch import Batch, Shard
from entropy_ddp.errors import InputError
from entropy_ddp.model import head
from entropy_ddp.update.loss import loss_weights, sequence_coefficients

RTOL = 1e-10  # the contract's bar for float64, of the gradient's norm
VOCABULARY = 17
SAMPLER_NOISE = 0.3  # in nats: ratios leave [0.8, 1.2] on every second token

LOSSES: dict[str, dict[str, Any]] = {
    "dr_grpo": {},
    "dr_grpo, constant": {"length_norm": 10},
    "dr_grpo, responses": {"length_norm": 10, "average_over": "responses"},
    "grpo": {"loss": "grpo"},
    "dapo": {"loss": "dapo"},
    "nll": {"loss": "nll"},
}
CLIPPED: dict[str, dict[str, Any]] = {
    "symmetric": {"ratio": "clipped"},
    "higher above": {"ratio": "clipped", "epsilon_low": 0.1, "epsilon_high": 0.3},
    "no room": {"ratio": "clipped", "epsilon_low": 0.0, "epsilon_high": 0.0},
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return ref.with_lora(
        ref.tiny_qwen2(0, attention="sdpa"), 1, ["q_proj", "v_proj", "down_proj"]
    )


@pytest.fixture(scope="module")
def rows(model: nn.Module) -> list[Row]:
    """Groups of 2, 3, 1 and 4, two empty responses, log-probs of another sampler."""
    rows = ref.random_rows(
        5, groups=4, responses=[2, 3, 1, 4], vocabulary=VOCABULARY, with_empty=True
    )
    return ref.with_sampling_logprobs(model, rows, 6, noise=SAMPLER_NOISE)


def with_advantages(rows: list[Row], kind: str = "centered") -> Batch:
    batch = as_batch(rows, VOCABULARY, "U")
    return batch.with_advantages(compute_advantages(batch, kind))


def gradient(model: nn.Module, shard: Shard, update: Update) -> dict[str, Tensor]:
    passes = make_passes(model, tokens_per_microbatch=16)
    flat, _ = passes.gradient(shard, loss_weights(shard, update), torch.float64)
    return passes.layout.views(flat)


def reference_gradient(
    model: nn.Module, rows: list[Row], kind: str = "centered", **settings: Any
) -> dict[str, Tensor]:
    advantages = ref.advantages(rows, kind)
    loss = ref.rl_loss(model, rows, advantages, LossSettings(**settings))
    parameters = ref.trainable(model)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors.values()))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    difference = {name: found[name] - value for name, value in expected.items()}
    assert norm(expected) > 0
    assert norm(difference) <= RTOL * norm(expected)


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy(model: nn.Module, rows: list[Row], name: str) -> None:
    shard = with_advantages(rows).shard(0, 1)
    found = gradient(model, shard, Update(**LOSSES[name]))
    assert_same(found, reference_gradient(model, rows, **LOSSES[name]))


@pytest.mark.parametrize("clipping", CLIPPED)
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "nll"])
def test_clipped(model: nn.Module, rows: list[Row], name: str, clipping: str) -> None:
    """Clipping is active on some tokens: the gradient is not that of a wide range."""
    settings = LOSSES[name] | CLIPPED[clipping]
    shard = with_advantages(rows).shard(0, 1)
    found = gradient(model, shard, Update(**settings))
    assert_same(found, reference_gradient(model, rows, **settings))
    wide = settings | {"epsilon_low": 0.99, "epsilon_high": 99.0}
    unclipped = gradient(model, shard, Update(**wide))
    difference = {name: found[name] - value for name, value in unclipped.items()}
    assert norm(difference) > 0.05 * norm(unclipped)


@pytest.mark.parametrize("name", ["dr_grpo", "grpo", "dapo"])
def test_clipped_at_the_sampler_is_on_policy(
    model: nn.Module, rows: list[Row], name: str
) -> None:
    exact = ref.with_sampling_logprobs(model, rows, 6)
    shard = with_advantages(exact).shard(0, 1)
    found = gradient(model, shard, Update(**LOSSES[name], ratio="clipped"))
    assert_same(found, gradient(model, shard, Update(**LOSSES[name])))


def test_standardized_advantages(model: nn.Module, rows: list[Row]) -> None:
    several = [row for row in rows if row.group != 2]  # a group of one has no std
    shard = with_advantages(several, "standardized").shard(0, 1)
    expected = reference_gradient(model, several, "standardized", loss="grpo")
    assert_same(gradient(model, shard, Update(loss="grpo")), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_shards_sum_to_the_whole(model: nn.Module, rows: list[Row], name: str) -> None:
    """Coefficients are those of the whole batch, whatever a rank holds of it."""
    batch, update = with_advantages(rows), Update(**LOSSES[name])
    parts = [gradient(model, batch.shard(rank, 5), update) for rank in range(5)]
    total = {key: torch.stack([part[key] for part in parts]).sum(0) for key in parts[0]}
    assert_same(total, gradient(model, batch.shard(0, 1), update))


# By hand: lengths 3, 1 in group 0 and 0, 2 in group 1

HAND_ROWS = [
    Row(i // 2, [i // 2], ids, advantage=advantage)
    for i, (ids, advantage) in enumerate(
        [([1, 2, 3], 0.5), ([4], -0.5), ([], 0.2), ([5, 6], -0.2)]
    )
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dr_grpo", [1 / 12, 1 / 12, 1 / 8, 1 / 8]),
        ("dr_grpo, constant", [1 / 40] * 4),
        ("dr_grpo, responses", [1 / 40] * 4),
        ("grpo", [1 / 12, 1 / 4, 1 / 4, 1 / 8]),
        ("dapo", [1 / 6] * 4),
        ("nll", [1 / 6] * 4),
    ],
)
def test_coefficients_by_hand(name: str, expected: list[float]) -> None:
    batch = as_batch(HAND_ROWS, VOCABULARY, "U")
    found = sequence_coefficients(batch, Update(**LOSSES[name]))
    assert found.tolist() == pytest.approx(expected, rel=1e-15)


def test_a_group_of_empty_responses_divides_by_one() -> None:
    rows = [Row(0, [1], []), Row(0, [1], []), Row(1, [1], [2, 3])]
    found = sequence_coefficients(as_batch(rows, VOCABULARY, "U"), Update())
    assert found.tolist() == [1 / 4, 1 / 4, 1 / 4]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.5, 2.0, 0.0),  # above 1.3 and to be made likelier: clipped
        (1.5, -2.0, -3.0),
        (0.5, 2.0, 1.0),
        (0.5, -2.0, 0.0),  # below 0.8 and to be made less likely: clipped
        (1.1, 2.0, 2.2),
        (0.9, -2.0, -1.8),
        (1.5, 0.0, 0.0),
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, expected: float) -> None:
    """Weight of log p of one token: -rho A of the branch that counts."""
    logp = -1.25
    row = Row(
        0, [1], [2], advantage=advantage, sampling_logprobs=[logp - math.log(ratio)]
    )
    shard = as_batch([row], VOCABULARY, "U").shard(0, 1)
    update = Update(loss="dapo", ratio="clipped", epsilon_high=0.3)
    on_logp, on_entropy = loss_weights(shard, update)(
        torch.tensor([0]), torch.tensor([logp]).double(), torch.tensor([1.0]).double()
    )
    assert float(on_logp) == pytest.approx(-expected, rel=1e-14)
    assert float(on_entropy) == 0.0


def test_without_the_ratio_the_sampler_is_not_asked(model: nn.Module) -> None:
    shard = as_batch(HAND_ROWS, VOCABULARY, "U").shard(0, 1)
    assert norm(gradient(model, shard, Update())) > 0


def test_the_clipped_ratio_needs_the_sampler_in_every_row() -> None:
    rows = [
        replace(row, sampling_logprobs=[-1.0] * len(row.response_ids))
        for row in HAND_ROWS
    ]
    rows[3] = replace(rows[3], sampling_logprobs=None)
    batch = as_batch(rows, VOCABULARY, "U")
    for rank in range(2):  # every rank refuses, also the one without the row
        with pytest.raises(InputError, match="sampling_logprobs.*line 4 has none"):
            loss_weights(batch.shard(rank, 2), Update(ratio="clipped"))


# The recipe of docs/extending.md


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Any]:
    """The loss that the page adds, run from the page."""
    page = Path(entropy_ddp.__file__).parents[1] / "docs" / "extending.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    script = tmp_path / "recipe.py"
    script.write_text("\n".join(blocks))
    return runpy.run_path(str(script))["gspo_weights"]


def gspo_gradient(
    model: nn.Module, rows: list[Row], update: Update
) -> dict[str, Tensor]:
    """The loss written out with q_i = 1 / (N T_i), by autograd."""
    total = torch.zeros((), dtype=torch.float64)
    for row, advantage in zip(rows, ref.advantages(rows, "centered"), strict=True):
        if not row.response_ids:
            continue
        logp, _ = ref.token_scores(model, row, 1.0)
        ratio = (
            (logp - torch.tensor(row.sampling_logprobs, dtype=logp.dtype)).mean().exp()
        )
        inside = ratio.clamp(1 - update.epsilon_low, 1 + update.epsilon_high)
        surrogate = torch.minimum(ratio * advantage, inside * advantage)
        total = total - surrogate / len(rows)
    parameters = ref.trainable(model)
    gradients = torch.autograd.grad(total, list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def test_the_recipe_for_a_loss_of_whole_sequences(
    model: nn.Module,
    rows: list[Row],
    recipe: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Right although its weights are asked for parts of sequences."""
    monkeypatch.setattr(head, "BLOCK_ELEMENTS", 2 * VOCABULARY)
    update = Update(loss="grpo", epsilon_low=0.05, epsilon_high=0.1)
    shard, asked = with_advantages(rows).shard(0, 1), []
    passes = make_passes(model, tokens_per_microbatch=1000)
    weights = recipe(shard, update, passes.score(shard).logp)

    def watched(token: Tensor, logp: Tensor, entropy: Tensor) -> Any:
        asked.append(len(token))
        return weights(token, logp, entropy)

    flat, _ = passes.gradient(shard, watched, torch.float64)
    assert max(asked) == 2 < int(shard.ragged.lengths.max())
    expected = gspo_gradient(model, rows, update)
    assert_same(passes.layout.views(flat), expected)
    wide = Update(loss="grpo", epsilon_low=0.99, epsilon_high=99.0)
    unclipped = gspo_gradient(model, rows, wide)
    assert norm({n: unclipped[n] - e for n, e in expected.items()}) > 0.05 * norm(
        expected
    )
