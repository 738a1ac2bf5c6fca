"""Are the experts that a mixture chooses for a token recorded, token by token?"""

import pytest
import torch
from families import plain_model
from reference import random_direction
from test_prompt_sharing import ALWAYS, SHARD
from tiny_runs import make_passes
from torch import Tensor, nn

from entropy_ddp.model.parameters import shifted
from entropy_ddp.model.precision import true_float64

MIXTURES = ["mixtral", "qwen3-moe"]
Choices = list[tuple[tuple[int, ...], ...]]


def chosen_experts(model: nn.Module) -> Choices:
    """Of every response token, each layer's experts, by the router's own logits."""
    tokens: Choices = []
    for sequence in SHARD.sequences:
        ids = torch.cat([sequence.prompt_ids, sequence.response_ids])[None]
        with torch.no_grad(), true_float64():
            logits = model(input_ids=ids, output_router_logits=True).router_logits
        layers = [layer.topk(2, dim=-1).indices.sort(-1).values for layer in logits]
        first = len(sequence.prompt_ids) - 1
        for place in range(first, first + sequence.num_tokens):
            tokens.append(tuple(tuple(layer[place].tolist()) for layer in layers))
    return tokens


def assert_same_partition(routing: Tensor, choices: Choices) -> None:
    """Equal numbers exactly where the choices are equal."""
    pairs = set(zip(routing.tolist(), choices, strict=True))
    assert len(pairs) == len(set(routing.tolist())) == len(set(choices))
    assert len(pairs) > 3


@pytest.mark.parametrize("family", MIXTURES)
def test_a_token_has_one_number_for_its_experts(family: str) -> None:
    model = plain_model(family)
    passes = make_passes(model, tokens_per_microbatch=24)
    routing = passes.score(SHARD).routing
    assert routing is not None
    assert_same_partition(routing, chosen_experts(model))
    direction = random_direction(model, seed=4)
    assert torch.equal(routing, passes.score(SHARD, direction).routing)
    passes.tokens.sharing = ALWAYS
    assert torch.equal(routing, passes.score(SHARD).routing)


def test_a_step_that_changes_the_choices_changes_the_numbers() -> None:
    model = plain_model("qwen3-moe")
    passes = make_passes(model)
    direction = random_direction(model, seed=4)
    before, choices = passes.score(SHARD).routing, chosen_experts(model)
    with shifted(passes.parameters, direction, 0.05):
        after, others = passes.score(SHARD).routing, chosen_experts(model)
    changed = torch.tensor([a != b for a, b in zip(choices, others, strict=True)])
    assert 0 < int(changed.sum()) < len(changed)
    assert torch.equal(before != after, changed)


def test_other_models_route_nothing() -> None:
    passes = make_passes(plain_model("llama"))
    assert not passes.tokens.routes
    assert passes.score(SHARD).routing is None
