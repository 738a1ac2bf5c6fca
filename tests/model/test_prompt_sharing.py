"""Are responses behind one prompt scored as if each had its own?"""

import random
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
import transformers
from families import HEAD, SHAPE, VOCABULARY
from reference import random_direction
from tiny_runs import make_passes
from torch import Tensor, nn

from entropy_ddp.data.batch import Batch, Sequence, Shard
from entropy_ddp.data.microbatch import PromptSharing
from entropy_ddp.model.scoring import Passes
from entropy_ddp.model.selfcheck import check_sharing

RTOL = 1e-12  # float64, of the largest value
FLOAT32_RTOL = 1e-5
ALWAYS = PromptSharing(0.0)
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": families.FAMILIES["gpt2"],
    "llama": ("Llama", SHAPE),
    "mistral, window": ("Mistral", SHAPE | {"sliding_window": 16}),
    "qwen2": ("Qwen2", SHAPE),
    "qwen3": ("Qwen3", SHAPE | HEAD),
    "gemma 3, mixed windows": ("Gemma3Text", SHAPE | HEAD | WINDOWS),
    "phi-3": ("Phi3", SHAPE),
    "olmo-2": ("Olmo2", SHAPE),
    "gpt-neox": ("GPTNeoX", SHAPE),
    # Grouped products exist in no float64.
    "mixtral": ("Mixtral", SHAPE | EXPERTS | {"experts_implementation": "eager"}),
}


def make_model(name: str, attention: str) -> nn.Module:
    family, shape = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(
        **shape, attn_implementation=attention
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().double()
    # Default initialisations hardly attend to anything.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def make_shard() -> Shard:
    """Groups of several responses, prompts that repeat across groups, empty responses."""
    draw = random.Random(2)
    groups = ((6, [5, 1, 3, 0]), (2, [4]), (4, [2, 6, 1]), (6, [2, 2]))
    sequences: list[Sequence] = []
    prompts: dict[int, Tensor] = {}
    for number, (prompt, responses) in enumerate(groups):
        ids = torch.tensor(draw.choices(range(VOCABULARY), k=prompt))
        for length in responses:
            response = torch.tensor(draw.choices(range(VOCABULARY), k=length))
            sequences.append(
                Sequence(
                    index=len(sequences),
                    group=number,
                    group_key=number,
                    prompt_ids=prompts.setdefault(prompt, ids),
                    response_ids=response.long(),
                )
            )
    draw.shuffle(sequences)
    return Batch(split="U", sequences=tuple(sequences)).shard(0, 1)


SHARD = make_shard()


def everything(passes: Passes, direction: dict[str, Tensor]) -> dict[str, Tensor]:
    """What both passes give."""
    scores = passes.score(SHARD, direction)
    values = {n: scores.array(n) for n in ("logp", "entropy", "dlogp", "dentropy")}
    values["logp at order 0"] = passes.score(SHARD).logp
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, SHARD.ragged.num_tokens, generator=generator).double()
    values["gradient"], _ = passes.gradient(
        SHARD, lambda token, *_: (a[token], b[token]), torch.float64
    )
    return values


def assert_equal(
    found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float
) -> None:
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max()
        assert float(error) <= rtol, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_trees_give_what_flat_rows_give(name: str, attention: str) -> None:
    model = make_model(name, attention)
    passes = make_passes(model, temperature=0.8, tokens_per_microbatch=24)
    direction = random_direction(model, seed=4)
    expected = everything(passes, direction)
    check = check_sharing(passes, VOCABULARY)
    assert check.sharing is not None, check.reason
    passes.tokens.sharing = ALWAYS
    found = everything(passes, direction)
    assert passes.performed["score order 0", "U"].microbatches > 2
    assert_equal(found, expected, RTOL)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_in_float32_up_to_its_rounding(name: str) -> None:
    model = make_model(name, "sdpa").float()
    passes = make_passes(model, tokens_per_microbatch=64)
    direction = {n: v.float() for n, v in random_direction(model, seed=4).items()}
    expected = everything(passes, direction)
    passes.tokens.sharing = ALWAYS
    assert_equal(everything(passes, direction), expected, FLOAT32_RTOL)


def test_a_pass_is_shorter_by_the_prompts_it_shares() -> None:
    passes = make_passes(make_model("llama", "sdpa"), tokens_per_microbatch=1)
    passes.score(SHARD)
    flat = passes.performed["score order 0", "U"].positions
    expected = sum(
        len(s.prompt_ids) + s.num_tokens - 1 for s in SHARD.sequences if s.num_tokens
    )
    assert flat == expected
    passes = passes.with_settings(tokens_per_microbatch=1000)
    passes.tokens.sharing = ALWAYS
    passes.performed.clear()
    passes.score(SHARD)
    # Prompts of 6, 4 tokens have 5 and 3 responses; the lone row is padded by nothing.
    trees = [6 + 4 + 0 + 2 + 1 + 1, 4 + 1 + 5 + 0]
    lone = 2 + 3
    count = passes.performed["score order 0", "U"]
    assert count.positions == 2 * max(trees) + lone
    assert count.sequences == len(SHARD.sequences)


def test_settings_can_forbid_it() -> None:
    passes = make_passes(make_model("llama", "sdpa"), share_prompts=False)
    passes.tokens.sharing = ALWAYS
    assert passes.sharing is None


# Models that cannot


def test_a_model_with_a_state_is_read_flat() -> None:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4
    )
    model = transformers.MambaForCausalLM(config).eval().double()
    check = check_sharing(make_passes(model), VOCABULARY)
    assert check.sharing is None
    assert "position_ids" in check.reason


def without_mask(inputs: dict[str, Any]) -> None:
    del inputs["attention_mask"]


def without_positions(inputs: dict[str, Any]) -> None:
    del inputs["position_ids"]


def refusing(inputs: dict[str, Any]) -> None:
    if "attention_mask" in inputs:
        raise ValueError("expected a mask of two dimensions")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (without_mask, "differs by"),
        (without_positions, "differs by"),
        (refusing, "expected a mask of two dimensions"),
    ],
)
def test_a_model_that_reads_trees_wrongly_is_read_flat(
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[dict[str, Any]], None],
    reason: str,
) -> None:
    model = make_model("qwen2", "sdpa")
    forward = model.model.forward

    def faulty(
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        inputs: dict[str, Any] = {}
        if attention_mask is not None:
            inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
            fault(inputs)
        return forward(input_ids=input_ids, **inputs, **options)

    monkeypatch.setattr(model.model, "forward", faulty)
    passes = make_passes(model)
    check = check_sharing(passes, VOCABULARY)
    assert check.sharing is None
    assert reason in check.reason
    assert passes.tokens.sharing is None


def test_the_reach_of_attention_is_read_from_the_configuration() -> None:
    for name, reach in (("mistral, window", 16), ("llama", None)):
        passes = make_passes(make_model(name, "sdpa"))
        sharing = check_sharing(passes, VOCABULARY).sharing
        assert sharing is not None
        assert sharing.longest_path == reach


def test_attention_is_dearer_in_shallow_and_narrow_models() -> None:
    """2 layers width / (parameters that multiply a token), times a measured overhead."""
    passes = make_passes(make_model("llama", "sdpa"))
    sharing = check_sharing(passes, VOCABULARY).sharing
    assert sharing is not None
    layer = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24 + 2 * 16
    assert sharing.pair_cost == pytest.approx(1.5 * 2 * 2 * 16 / (2 * layer + 16))
