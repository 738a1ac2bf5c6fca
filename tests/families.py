"""Tiny models of the families that policies are made of, from configurations, float64."""

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 23
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
HEAD = {"head_dim": 4}
# Shorter than the rows, some of them.
WINDOW = {"sliding_window": 4}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
CAPS = {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 4}
# Grouped products exist in no float64.
EAGER = {"experts_implementation": "eager"}
EXPERTS = EAGER | {"num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2,
         "n_positions": 64},
    ),
    "llama": ("Llama", SHAPE),
    "mistral": ("Mistral", SHAPE | WINDOW),
    "qwen2": ("Qwen2", SHAPE),
    "qwen3": ("Qwen3", SHAPE | HEAD),
    "gemma2": (
        "Gemma2",
        SHAPE | HEAD | MIXED | CAPS | {"attn_logit_softcapping": 2.0},
    ),
    "gemma3": ("Gemma3Text", SHAPE | HEAD | MIXED | CAPS),
    "phi3": ("Phi3", SHAPE),
    "olmo2": ("Olmo2", SHAPE),
    "gpt-neox": ("GPTNeoX", SHAPE),
    "cohere": ("Cohere", SHAPE | {"logit_scale": 0.4}),
    "granite": ("Granite", SHAPE | {"logits_scaling": 2.5}),
    "mixtral": ("Mixtral", SHAPE | EXPERTS | {"num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3Moe",
        SHAPE | HEAD | EXPERTS
        | {"num_experts": 4, "moe_intermediate_size": 12, "norm_topk_prob": True},
    ),
    "mamba": (
        "Mamba",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2,
         "state_size": 4, "time_step_rank": 2},
    ),
}  # fmt: skip


def randomised(model: nn.Module) -> nn.Module:
    """Weights with which the model attends, gates and routes; trainable ones of LoRA too."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if "A_log" in name or "magnitude" in name:
            parameter.data += 0.1 * noise
        elif parameter.dim() > 1:
            parameter.data.copy_(0.3 * noise)
        else:
            parameter.data += 0.1 * noise
    return model


def plain_model(family: str, **changes: Any) -> nn.Module:
    kind, shape = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**(shape | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return randomised(model.double().eval())
