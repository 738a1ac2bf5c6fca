"""Which of a model's own code paths carry derivatives, and which of them a run takes.

transformers chooses between kernels for attention and for the experts of a mixture. Two
of its defaults cannot be used by every model: the fused attention (`sdpa`), which knows
no soft-capping and no sinks, and grouped products of experts, which exist in no float64.
The plain code (`eager`) is as exact and slower; that it was taken is announced.
"""

from typing import Any

import torch
from torch import nn


def supported_attention(base: str, asked: str, trust_remote_code: bool = False) -> str:
    """The attention implementation asked for, or `eager` where the model has no other.

    Args:
        base: folder or hub id of the model.
        asked: `sdpa` or `eager`.
    """
    from transformers import AutoConfig

    if asked != "sdpa":
        return asked
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    return "eager" if _obstacle_to_sdpa(config) else asked


def _obstacle_to_sdpa(config: Any) -> str | None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return "its attention caps its scores"
    if kind is not None and not kind._supports_sdpa:
        return f"{kind.__name__} has no fused attention"
    return None


def use_exact_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the experts of a float64 mixture be multiplied one by one."""
    if dtype == torch.float64 and _has_experts(model):
        model.set_experts_implementation("eager")


def slower_routes(model: nn.Module, asked: str, dtype: torch.dtype) -> dict[str, str]:
    """The parts of an opened model that take the plain code path, and why.

    Args:
        asked: the attention implementation asked for.
    """
    config = model.config  # type: ignore[union-attr]
    routes = {}
    if asked == "sdpa" and config._attn_implementation == "eager":
        routes["attention"] = _obstacle_to_sdpa(config) or "the model chose it"
    if dtype == torch.float64 and _has_experts(model):
        routes["experts"] = "grouped products of experts exist in no float64"
    return routes


def _has_experts(model: nn.Module) -> bool:
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model)
    return bool(getattr(kind, "_can_set_experts_implementation", lambda: False)())
