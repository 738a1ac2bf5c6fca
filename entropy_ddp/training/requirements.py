"""What can be probed while it trains; everything else is refused before the first step."""

from typing import Any

import torch

from entropy_ddp.errors import InputError

DEEPSPEED = (
    "DeepSpeed keeps gradients and optimizer state in shards of its own, which cannot be "
    "read at the optimizer step"
)
FSDP = (
    "FSDP shards parameters and gradients, so that no rank can take the derivative along "
    "the whole step"
)
PARALLEL = (
    "parallelism_config splits the model or its sequences over ranks, so that no rank has "
    "the whole step"
)
COMPILED = (
    "torch.compile hides the model's outputs from the hooks that read the token weights"
)
REPLICATED = (
    "DataParallel replicates the model at every step; start one process per GPU with "
    "torchrun instead"
)
SCALED = "fp16 scales the gradients by a factor that the optimizer removes"
LIGER = (
    "Liger's kernels have no forward-mode derivatives, and their fused losses return no "
    "log-probabilities"
)
QUANTIZED = "quantized weights have no forward-mode derivatives"
PACKED = "packed rows hold several sequences; turn packing and padding_free off"
PROMPT_LEARNING = "prompt learning puts trained vectors in place of tokens"
NO_TOKENIZER = (
    "processing_class is no tokenizer with an end-of-sequence token, which sampling "
    "fresh responses needs"
)


def require_probable(trainer: Any) -> None:
    """Check that gradients, weights and batch of this training can be read.

    Args:
        trainer: a transformers Trainer, about to train.

    Raises:
        InputError: one sentence that names what is in the way.
    """
    found = _obstacle(trainer)
    if found is not None:
        raise InputError(f"entropy probe: {found}; train without the callback")


def _obstacle(trainer: Any) -> str | None:
    args, model = trainer.args, trainer.model
    adapters = getattr(model, "peft_config", {}).values()
    tokenizer = trainer.processing_class
    found = {
        DEEPSPEED: getattr(trainer, "is_deepspeed_enabled", False),
        FSDP: getattr(trainer, "is_fsdp_enabled", False),
        PARALLEL: getattr(args, "parallelism_config", None) is not None,
        COMPILED: args.torch_compile
        or isinstance(model, torch._dynamo.OptimizedModule),
        REPLICATED: args.n_gpu > 1,
        SCALED: args.fp16,
        LIGER: args.use_liger_kernel,
        QUANTIZED: getattr(model, "is_quantized", False),
        PACKED: getattr(args, "packing", False) or getattr(args, "padding_free", False),
        PROMPT_LEARNING: any(getattr(a, "is_prompt_learning", False) for a in adapters),
        NO_TOKENIZER: getattr(tokenizer, "eos_token_id", None) is None,
    }
    sentences = [sentence for sentence, is_there in found.items() if is_there]
    return sentences[0] if sentences else _optimizer_obstacle(trainer.optimizer)


def _optimizer_obstacle(optimizer: Any) -> str | None:
    inner = torch_optimizer(optimizer)
    if type(inner) not in (torch.optim.Adam, torch.optim.AdamW):
        return (
            f"the optimizer is {type(inner).__module__}.{type(inner).__name__}, and only "
            "the steps of torch.optim.Adam and AdamW are known as sums of their parts "
            "(8-bit and paged optimizers keep other moments)"
        )
    return None


def torch_optimizer(optimizer: Any) -> Any:
    """The optimizer below accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
