"""Models with random weights, and batches of random tokens, in memory."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from entropy_ddp.data.batch import Batch, Sequence, Shard
from entropy_ddp.model.parameters import trainable_parameters
from entropy_ddp.model.response_tokens import ResponseTokens, ScoringSettings
from entropy_ddp.model.scoring import Passes

RANK = 16


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of a model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


TINY = Shape(hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2, vocabulary=128)
MIDDLE = Shape(
    hidden=512, intermediate=1408, layers=6, heads=8, kv_heads=4, vocabulary=8192
)
SMOLLM2 = Shape(
    hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocabulary=49_152
)
QWEN_05B = Shape(
    hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2, vocabulary=151_936
)
QWEN_15B = Shape(
    hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2, vocabulary=151_936
)

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_SEVEN = (*QKVO, "gate_proj", "up_proj", "down_proj")
# Hugging Face model type -> layers that get an adapter.
FAMILIES = {
    "qwen2": QKVO,
    "llama": QKVO,
    "gpt2": ("c_attn", "c_proj"),
    "gemma2": QKVO,
    "gpt_neox": ("query_key_value", "dense"),
    "phi3": ("qkv_proj", "o_proj"),
    "olmo2": QKVO,
}


def make_base(
    family: str,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A Hugging Face causal language model with random weights, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **_arguments(family, shape))
    torch.manual_seed(0)
    # Soft-capped scores exist in the plain implementation only.
    attention = "eager" if family == "gemma2" else "sdpa"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    return model.eval()


def _arguments(family: str, shape: Shape) -> dict[str, Any]:
    common = {"vocab_size": shape.vocabulary, "pad_token_id": None}
    common |= {"bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        sizes = {"n_embd": shape.hidden, "n_layer": shape.layers, "n_head": shape.heads}
        return common | sizes | {"n_inner": 4 * shape.hidden, "n_positions": 1024}
    common |= {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": 4096,
    }
    if family == "gpt_neox":
        return common
    common["num_key_value_heads"] = shape.kv_heads
    if family == "gemma2":
        # Its soft-capped logits are refused by the self-check.
        heads = {"head_dim": shape.hidden // shape.heads}
        return common | heads | {"final_logit_softcapping": None}
    return common | {"tie_word_embeddings": True}


def with_adapter(model: nn.Module, targets: tuple[str, ...]) -> nn.Module:
    """The model with LoRA of rank 16 on these layers, no factor zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(targets))
    adapted = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable_parameters(adapted).items():
            if "lora_B" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.01 * noise)
    return adapted


def make_model(
    family: str,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A model of this family with an adapter on its attention layers."""
    base = make_base(family, shape, dtype, device)
    return with_adapter(base, FAMILIES[family]).to(device, dtype)


def make_passes(model: nn.Module, **settings: Any) -> Passes:
    """Both passes over a model in this process."""
    tokens = ResponseTokens(model, ScoringSettings(**settings))
    parameter = next(model.parameters())
    return Passes(
        tokens=tokens,
        wrapped=tokens,
        parameters=trainable_parameters(model),
        dtype=parameter.dtype,
        device=parameter.device,
    )


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Size of a batch: groups, responses of each, tokens of prompt and response.

    Responses have between `shortest` and `response` tokens; None makes all equal.
    """

    groups: int
    per_group: int = 1
    prompt: int
    response: int
    shortest: int | None = None

    def with_groups(self, groups: int) -> "Lengths":
        """The same with another number of groups."""
        return replace(self, groups=groups)


def make_shard(lengths: Lengths, vocabulary: int, seed: int = 2) -> Shard:
    """All of a batch of random tokens, on one rank."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.randint(vocabulary, (count,), generator=generator)

    shortest = lengths.response if lengths.shortest is None else lengths.shortest
    sequences: list[Sequence] = []
    for group in range(lengths.groups):
        prompt = draw(lengths.prompt)
        for _ in range(lengths.per_group):
            choices = lengths.response - shortest + 1
            length = shortest + int(torch.randint(choices, (), generator=generator))
            sequence = Sequence(
                index=len(sequences),
                group=group,
                group_key=group,
                prompt_ids=prompt,
                response_ids=draw(length),
            )
            sequences.append(sequence)
    return Batch(split="E", sequences=tuple(sequences)).shard(0, 1)


def make_direction(passes: Passes) -> dict[str, Tensor]:
    """A random direction of length 1 in the space of the trainable parameters."""
    generator = torch.Generator().manual_seed(3)
    count = sum(parameter.numel() for parameter in passes.parameters.values())
    return {
        name: torch.randn(p.shape, generator=generator).to(p) / count**0.5
        for name, p in passes.parameters.items()
    }
