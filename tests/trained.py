"""Checkpoint folders of every kind that can be opened, written by the real libraries.

Each maker trains a tiny model for two steps with the library's own loop and saves it.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reference
import torch
from accelerate import Accelerator
from checkpoints import FAMILIES, TARGETS
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

LEARNING_RATE = 1e-2


def train(folder: Path, model: nn.Module, **arguments: Any) -> Trainer:
    """Two optimizer steps of the Hugging Face Trainer, with a checkpoint at the end."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 13, (8, 6), generator=generator)
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": LEARNING_RATE,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**defaults | arguments),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
    )
    trainer.train()
    return trainer


def adapted(
    model: nn.Module, family: str, *, name: str = "default", **settings: Any
) -> nn.Module:
    """The model under a LoRA adapter of PEFT with these settings."""
    config = lora_config(family, **settings)
    return get_peft_model(model, config, adapter_name=name)


def lora_config(family: str, **settings: Any) -> LoraConfig:
    """An adapter of rank 2 on some projections of a family."""
    defaults: dict[str, Any] = {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": TARGETS[family],
        "fan_in_fan_out": family == "gpt2",
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**defaults | settings)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A folder, how a configuration names it, and the model it was saved from.

    `moments` holds exp_avg of every trainable parameter by name.
    """

    section: dict[str, str]
    model: nn.Module
    moments: dict[str, Tensor] = field(default_factory=dict)


def moments_of(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """First moments by parameter name, as the optimizer holds them in memory."""
    inner = getattr(optimizer, "optimizer", optimizer)
    named = reference.trainable(model).items()
    return {name: inner.state[p]["exp_avg"] for name, p in named}


def trainer_lora(root: Path, family: str = "qwen2", **settings: Any) -> Made:
    """An adapter as the Trainer leaves it; the base is named by adapter_config.json."""
    base = FAMILIES[family](3).float()
    base.save_pretrained(root / "base")
    model = adapted(type(base).from_pretrained(root / "base"), family, **settings)
    trainer = train(root / "run", model)
    return Made(
        section={"path": str(root / "run" / "checkpoint-2")},
        model=model,
        moments=moments_of(model, trainer.optimizer),
    )


def trainer_full(root: Path, family: str, dtype: torch.dtype = torch.float32) -> Made:
    """Full weights as the Trainer leaves them."""
    model = FAMILIES[family](3).to(dtype)
    trainer = train(root, model)
    return Made(
        section={"path": str(root / "checkpoint-2")},
        model=model,
        moments=moments_of(model, trainer.optimizer),
    )


def sharded(root: Path) -> Made:
    """Full weights in several safetensors files."""
    made = trainer_full(root, "llama")
    folder = Path(made.section["path"])
    (folder / "model.safetensors").unlink()
    made.model.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return made


def pickled(root: Path) -> Made:
    """Full weights as older libraries left them."""
    made = trainer_full(root, "qwen2")
    folder = Path(made.section["path"])
    (folder / "model.safetensors").unlink()
    torch.save(made.model.state_dict(), folder / "pytorch_model.bin")
    return made


def bfloat16_base(root: Path) -> Made:
    """An adapter in float32 on a base that is stored in bfloat16."""
    base = FAMILIES["qwen2"](3).to(torch.bfloat16)
    base.save_pretrained(root / "base")
    model = adapted(base, "qwen2")
    trainer = train(root / "run", model)
    return Made(
        section={
            "path": str(root / "run" / "checkpoint-2"),
            "base": str(root / "base"),
        },
        model=model,
        moments=moments_of(model, trainer.optimizer),
    )


def several_adapters(root: Path) -> Made:
    """The adapter that is trained and one that is not, as TRL keeps its reference."""
    base = FAMILIES["qwen2"](3).float()
    base.save_pretrained(root / "base")
    model = adapted(type(base).from_pretrained(root / "base"), "qwen2")
    model.add_adapter("ref", lora_config("qwen2", r=4))
    trainer = train(root / "run", model)
    return Made(
        section={
            "path": str(root / "run" / "checkpoint-2"),
            "adapter": "default",
        },
        model=model,
        moments=moments_of(model, trainer.optimizer),
    )


def accelerate_loop(
    root: Path, *, lora: bool, safetensors: bool = True, name: str = "default"
) -> Made:
    """accelerate's `save_state` after two steps of a plain loop, flat and by AdamW."""
    base = FAMILIES["qwen2"](3).float()
    base.save_pretrained(root / "base")
    section = {"path": str(root / "state"), "base": str(root / "base")}
    model = base
    if lora:
        model = adapted(base, "qwen2", name=name)
        model.peft_config[name].save_pretrained(root / "adapter")
        section["adapter"] = str(root / "adapter")
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(reference.trainable(model).values(), lr=LEARNING_RATE)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        tokens = torch.randint(0, 13, (4, 6), generator=generator)
        loss = prepared(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        prepared_optimizer.step()
        prepared_optimizer.zero_grad()
    accelerator.save_state(str(root / "state"), safe_serialization=safetensors)
    return Made(section=section, model=model, moments=moments_of(model, optimizer))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a kind of folder is made, and what `check` says of it."""

    make: Callable[[Path], Made]
    says: tuple[str, ...]


TRAINER = ("optimizer.pt", "AdamW", "lr 0.01", "max_grad_norm 1")
KINDS: dict[str, Kind] = {
    "LoRA": Kind(
        make=trainer_lora,
        says=(
            *TRAINER,
            "Qwen2ForCausalLM",
            "/base",
            "LoRA, rank 2, alpha 6; on down_proj, q_proj, v_proj",
            "parameters with state 12",
            "parameters 12, lr 0.01, betas (0.9, 0.999), eps 1e-08, weight_decay 0.1",
            "stored as base float32, adapter float32",
            "used as float32",
            "tied to the output layer",
        ),
    ),
    "LoRA, all biases": Kind(
        make=lambda root: trainer_lora(root, "gpt2", bias="all"),
        says=(*TRAINER, "GPT2LMHeadModel", "bias all", "parameters 13, lr 0.01"),
    ),
    "LoRA, whole modules": Kind(
        make=lambda root: trainer_lora(root, "llama", modules_to_save=["lm_head"]),
        says=(*TRAINER, "whole modules: lm_head", "parameters with state 13"),
    ),
    "rsLoRA": Kind(
        make=lambda root: trainer_lora(root, use_rslora=True),
        says=("rsLoRA, rank 2, alpha 6",),
    ),
    "DoRA": Kind(
        make=lambda root: trainer_lora(root, use_dora=True),
        says=("DoRA, rank 2, alpha 6", "parameters with state 18"),
    ),
    "several adapters": Kind(
        make=several_adapters, says=("LoRA, rank 2", "parameters with state 12")
    ),
    "an adapter of another name": Kind(
        make=lambda root: trainer_lora(root, name="policy"),
        says=("adapter name policy", "checkpoint-2/policy", "parameters with state 12"),
    ),
    "full, tied": Kind(
        make=lambda root: trainer_full(root, "gpt2"),
        says=(
            *TRAINER,
            "none: full weights are trained",
            "tied to the output layer",
            "stored as base float32",
            "weight_decay 0.1",
            "weight_decay 0",
        ),
    ),
    "full, untied": Kind(
        make=lambda root: trainer_full(root, "llama"),
        says=(*TRAINER, "apart from the output layer"),
    ),
    "full, bfloat16": Kind(
        make=lambda root: trainer_full(root, "qwen2", torch.bfloat16),
        says=("stored as base bfloat16", "used as float32"),
    ),
    "LoRA on bfloat16": Kind(
        make=bfloat16_base,
        says=("stored as base bfloat16, adapter float32", "used as float32"),
    ),
    "full, sharded": Kind(
        make=sharded, says=("LlamaForCausalLM", "stored as base float32")
    ),
    "full, pickled": Kind(
        make=pickled, says=("stored as not told by the files", "Qwen2ForCausalLM")
    ),
    "accelerate, LoRA": Kind(
        make=lambda root: accelerate_loop(root, lora=True),
        says=(
            "optimizer.bin",
            "weights from",
            "LoRA, rank 2, alpha 6",
            "stored as state float32",
            "parameters with state 12",
        ),
    ),
    "accelerate, LoRA of another name": Kind(
        make=lambda root: accelerate_loop(root, lora=True, name="policy"),
        says=("adapter name policy",),
    ),
    "accelerate, full": Kind(
        make=lambda root: accelerate_loop(root, lora=False),
        says=("optimizer.bin", "weights from"),
    ),
    "accelerate, full, pickled": Kind(
        make=lambda root: accelerate_loop(root, lora=False, safetensors=False),
        says=("weights from",),
    ),
}


def without_base(made: Made) -> None:
    """Remove a checkpoint's base model."""
    shutil.rmtree(Path(made.section["path"]).parent.parent / "base")
