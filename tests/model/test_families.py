"""Are the passes exact for every family of models that policies are made of?

Tiny models from configurations, in float64. Values against the model's own logits,
first derivatives against central differences of values and against reverse mode, second
derivatives against central differences of first ones, rows with shared prompts against
rows without.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from families import FAMILIES, VOCABULARY, plain_model
from peft import LoraConfig, get_peft_model
from tiny_runs import as_batch, make_passes
from torch import Tensor, nn

from entropy_ddp.checkpoint.find import find_checkpoint
from entropy_ddp.checkpoint.policy import load_policy
from entropy_ddp.config import Checkpoint, Precision
from entropy_ddp.data.batch import Shard
from entropy_ddp.data.microbatch import PromptSharing
from entropy_ddp.model.implementations import slower_routes
from entropy_ddp.model.parameters import shifted
from entropy_ddp.model.scoring import Passes
from entropy_ddp.model.selfcheck import check_model, check_sharing

TEMPERATURE = 0.9
RTOL = 1e-10  # the same sums in another order
DIFFERENCE_RTOL = 1e-7
# Of a unit direction; the stencil's error is of its fourth power. No routing changes
# within the smaller one.
STEP = 0.002
STEP_OF_MIXTURES = 2e-4
# Projections (value only, query and value, all) by their names in each family.
ROTARY = (["v_proj"], ["q_proj", "v_proj"], "all-linear")
TARGETS: dict[str, Sequence[list[str] | str]] = {
    "gpt2": (["c_attn"], ["c_attn", "c_proj"], "all-linear"),
    "phi3": (["qkv_proj"], ["qkv_proj", "o_proj"], "all-linear"),
    "gpt-neox": (["query_key_value"], ["query_key_value", "dense"], "all-linear"),
    "mamba": (["x_proj"], ["in_proj", "x_proj"], ["in_proj", "x_proj", "embeddings"]),
}
TUNED = ("full, tied", "full, untied", "one", "two", "all")
TIED_AT = {"full, tied": True, "full, untied": False}
ADAPTERS: dict[str, dict[str, Any]] = {
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "bias": {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
    "saved output layer": {
        "target_modules": ["v_proj"],
        "modules_to_save": ["lm_head"],
    },
    "saved norm": {"target_modules": ["v_proj"], "modules_to_save": ["norm"]},
    "embedding": {"target_modules": ["embed_tokens", "up_proj"]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "dora, output layer": {"target_modules": ["lm_head"], "use_dora": True},
    "output layer": {"target_modules": ["lm_head", "k_proj"]},
}


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    config = LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **options)
    with torch.random.fork_rng(devices=[]):
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=False).double()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
            parameter.data.normal_(0.0, 0.3, generator=generator)
    return wrapped.eval()


@cache
def tuned_model(family: str, tuned: str) -> nn.Module:
    if tuned in TIED_AT:
        return plain_model(family, tie_word_embeddings=TIED_AT[tuned])
    targets = TARGETS.get(family, ROTARY)[TUNED.index(tuned) - 2]
    fan_in_fan_out = {"fan_in_fan_out": True} if family == "gpt2" else {}
    return adapted(plain_model(family), target_modules=targets, **fan_in_fan_out)


ROWS = ref.random_rows(
    3, responses=[2, 1, 2], groups=3, vocabulary=VOCABULARY, with_empty=True
)


def shard() -> Shard:
    return as_batch(ROWS, VOCABULARY).shard(0, 1)


def assert_close(found: Tensor, expected: Tensor, rtol: float) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=rtol * scale)


def difference(at: dict[int, Tensor], step: float) -> Tensor:
    """First derivative from five points, whose error is of the fourth order."""
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)


def assert_passes_are_exact(model: nn.Module) -> None:
    passes = make_passes(model, temperature=TEMPERATURE, tokens_per_microbatch=24)
    rows, direction = shard(), ref.random_direction(model, seed=5)
    is_mixture = hasattr(model.config, "num_experts_per_tok")
    step = STEP_OF_MIXTURES if is_mixture else STEP
    scores = passes.score(rows, direction)
    assert_values(model, scores.logp, scores.entropy)
    along = {}
    for k in (1, -1, 2, -2):
        with shifted(passes.parameters, direction, k * step):
            along[k] = passes.score(rows, direction)
    for name in ("logp", "entropy"):
        expected = difference({k: s.array(name) for k, s in along.items()}, step)
        assert_close(scores.array(f"d{name}"), expected, DIFFERENCE_RTOL)
    assert_duality(passes, direction)
    for found, name in zip(
        passes.score_twice(rows, direction, 1e-4), ("dlogp", "dentropy"), strict=True
    ):
        sums = {k: rows.ragged.sum(s.array(name)) for k, s in along.items()}
        assert_close(found, difference(sums, step), 1e-5)


def assert_values(model: nn.Module, logp: Tensor, entropy: Tensor) -> None:
    with torch.no_grad():
        expected = ref.scores(model, ROWS, TEMPERATURE)
    for found, values in zip((logp, entropy), zip(*expected, strict=True), strict=True):
        assert_close(found, torch.cat(values), RTOL)


def assert_duality(passes: Passes, direction: dict[str, Tensor]) -> None:
    rows = shard()
    generator = torch.Generator().manual_seed(8)
    a, b = torch.randn(2, rows.ragged.num_tokens, generator=generator).double()
    scores = passes.score(rows, direction)
    flat, _ = passes.gradient(rows, lambda t, *_: (a[t], b[t]), torch.float64)
    forward = torch.stack([a * scores.dlogp, b * scores.dentropy])
    reverse = float(flat @ passes.layout.flatten(direction, torch.float64))
    assert abs(float(forward.sum()) - reverse) <= RTOL * float(forward.abs().sum())


@pytest.mark.parametrize("tuned", TUNED)
@pytest.mark.parametrize("family", FAMILIES)
def test_passes_are_exact(family: str, tuned: str) -> None:
    assert_passes_are_exact(tuned_model(family, tuned))


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str) -> None:
    assert_passes_are_exact(adapted(plain_model("llama"), **ADAPTERS[name]))


def test_dora_is_trained_with_another_gradient() -> None:
    """PEFT's own, by autograd: it misses what the weight norms contribute."""
    model = adapted(plain_model("llama"), **ADAPTERS["dora"])
    passes, rows = make_passes(model, temperature=TEMPERATURE), shard()
    ones = torch.ones(2, rows.ragged.num_tokens, dtype=torch.float64)
    true, trained = (
        passes.gradient(
            rows, lambda t, *_: (ones[0, t], ones[1, t]), torch.float64, as_trained=way
        )[0]
        for way in (False, True)
    )
    total = torch.zeros((), dtype=torch.float64)
    for logp, entropy in (ref.token_scores(model, row, TEMPERATURE) for row in ROWS):
        total = total + logp.sum() + entropy.sum()
    by_peft = torch.autograd.grad(total, list(passes.parameters.values()))
    assert_close(trained, torch.cat([g.reshape(-1) for g in by_peft]), RTOL)
    assert float((true - trained).norm()) > 1e-2 * float(true.norm())
    direction = ref.random_direction(model, seed=5)
    along = passes.score(rows, direction, as_trained=True)
    flat = passes.layout.flatten(direction, torch.float64)
    slope = along.dlogp.sum() + along.dentropy.sum()
    assert_close(slope, trained @ flat, 1e-9)


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "mamba", "llama"])
def test_what_has_no_fast_code_takes_the_plain(family: str, tmp_path: Path) -> None:
    model = plain_model(family)
    model.save_pretrained(tmp_path)
    files = find_checkpoint(Checkpoint(path=str(tmp_path)))
    device = torch.device("cpu")
    policy = load_policy(files, Precision(model="float64"), "sdpa", device)
    routes = slower_routes(policy.model, "sdpa", policy.dtype)
    expected = {"mixtral": ["experts"], "llama": []}.get(family, ["attention"])
    assert list(routes) == expected
    passes = make_passes(policy.model)
    check_model(passes, VOCABULARY)
    assert_close(
        passes.score(shard()).logp, make_passes(model).score(shard()).logp, 1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_self_checks_accept(family: str) -> None:
    passes = make_passes(tuned_model(family, "full, untied"))
    checks = check_model(passes, VOCABULARY)
    assert all(check.error <= check.tolerance for check in checks)


def test_a_window_shorter_than_the_rows_is_read_flat() -> None:
    passes = make_passes(tuned_model("mistral", "full, untied"))
    check = check_sharing(passes, VOCABULARY)
    assert check.sharing is None
    assert "differs by" in check.reason


@pytest.mark.parametrize(
    "family", sorted(FAMILIES.keys() - {"mamba", "mistral", "gemma2", "gemma3"})
)
def test_shared_prompts(family: str) -> None:
    model = tuned_model(family, "full, untied")
    passes = make_passes(model, tokens_per_microbatch=64)
    direction, rows = ref.random_direction(model, seed=5), shard()
    flat = passes.score(rows, direction)
    sharing = check_sharing(passes, VOCABULARY).sharing
    assert sharing is not None
    passes.tokens.sharing = PromptSharing(0.0, sharing.longest_path)
    tree = passes.score(rows, direction)
    for name in ("logp", "entropy", "dlogp", "dentropy"):
        assert_close(tree.array(name), flat.array(name), RTOL)
