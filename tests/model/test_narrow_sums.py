"""Do sums survive narrow weights, and tangents an adapter on the output layer alone?"""

import pytest
import reference as ref
import torch
from tiny_runs import as_batch, make_passes
from torch import Tensor

from entropy_ddp.data.batch import Shard
from entropy_ddp.model.response_tokens import TokenWeights
from entropy_ddp.model.selfcheck import check_model

ROWS = ref.random_rows(3, groups=150, responses=2, vocabulary=17)


def ones(shard: Shard) -> TokenWeights:
    weight = torch.ones(shard.ragged.num_tokens)

    def weights(token: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return weight[token], weight[token]

    return weights


def gradient_of(budget: int) -> Tensor:
    """Gradient of bfloat16 weights in a float32 buffer, by microbatches of a budget."""
    model = ref.tiny_qwen2(1, attention="sdpa").to(torch.bfloat16)
    passes = make_passes(model, tokens_per_microbatch=budget)
    shard = as_batch(ROWS, 17).shard(0, 1)
    return passes.gradient(shard, ones(shard), torch.float32)[0]


def test_a_bfloat16_gradient_is_summed_in_float32() -> None:
    """A hundred microbatches lose no more than one does."""
    whole, pieces = gradient_of(10_000), gradient_of(24)
    assert float((whole - pieces).norm() / whole.norm()) < 0.01


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_an_adapter_on_the_output_layer(targets: list[str]) -> None:
    """The tangent is asked of the logits: hidden states need not have one."""
    model = ref.with_lora(ref.tiny_llama(2, attention="sdpa"), 3, targets)
    passes = make_passes(model)
    checks = check_model(passes, vocabulary_size=15)
    assert [check.name for check in checks] == [
        "output layer",
        "duality",
        "central difference",
    ]
