"""Checkpoints in shares of ranks, as the libraries of large trainings write them.

Run as a script under torchrun, this file trains a tiny policy under FSDP2 on gloo ranks
and saves it in every layout, with what the live optimizer holds beside them:

    torchrun --nproc_per_node=2 tests/sharded_training.py FOLDER

    FOLDER/base, FOLDER/adapter          configuration of the model, settings of LoRA
    FOLDER/{full,lora}/truth.safetensors NAME and NAME|exp_avg, |exp_avg_sq, |step
    FOLDER/{full,lora}/groups.json       the optimizer's groups, with names
    FOLDER/{full,lora}/LAYOUT            a checkpoint
    FOLDER/full, FSDP1/...               the same, under FSDP1
"""

import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import (
    Accelerator,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from accelerate.utils import save_fsdp_model, save_fsdp_optimizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.distributed.checkpoint import (
    _save_model_checkpoint_distributed,
    save_optimizer_distributed,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

STEPS = 3
RANK_FILES = "{}_world_size_{}_rank_{}.pt"


def tiny_policy(kind: str) -> nn.Module:
    """Of odd sizes, so that ranks hold unequal shares; tied or not."""
    sizes = {
        "vocab_size": 13, "hidden_size": 12, "intermediate_size": 15,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 32,
    }  # fmt: skip
    torch.manual_seed(4)
    if kind == "lora":
        return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    return Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))


def lora_settings() -> LoraConfig:
    """Rank 3, so that shares are unequal."""
    return LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )


def trained_model(kind: str) -> nn.Module:
    """The policy, or it under an adapter whose B is not zero."""
    model = tiny_policy(kind)
    if kind == "lora":
        model = get_peft_model(model, lora_settings())
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
    return model


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """With weight decay, then without, as the Trainer makes them."""
    named = [p for p in model.named_parameters() if p[1].requires_grad]
    groups = [
        {"params": [p for n, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for n, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    """Cross-entropy of other tokens on every rank and in every step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(0, 13, (2, 7), generator=generator)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that ranks hold shares of, in memory of its own."""
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone()


def save_truth(
    folder: Path,
    tensors: Mapping[str, Tensor],
    groups: list[dict[str, Any]],
) -> None:
    """What readers must find; on one rank."""
    folder.mkdir(parents=True, exist_ok=True)
    dense = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(dense, folder / "truth.safetensors")
    (folder / "groups.json").write_text(json.dumps(groups))


def settings_of(group: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """What a step needs of a group."""
    keys = ("lr", "betas", "eps", "weight_decay")
    return {key: group[key] for key in keys} | {"names": names}


class AppState:
    """prime-rl's: model and optimizer by name, under one key."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parts = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """What is saved."""
        model, optimizer = get_state_dict(*self.parts)
        return {"model": model, "optimizers": optimizer, "progress": {"step": STEPS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Never called."""


def write_all(folder: Path, kind: str, rank: int, world_size: int) -> None:
    """Train and save one kind of policy in every layout."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[
            "LlamaDecoderLayer" if kind == "lora" else "Qwen2DecoderLayer"
        ],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # On a CPU accelerate does not choose it by itself.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    model = trained_model(kind)
    optimizer = torch.optim.AdamW(groups_of(model), lr=3e-3, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 / (1 + step)
    )
    names = {id(p): n for n, p in model.named_parameters()}
    order = [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for step in range(STEPS):
        accelerator.backward(loss_of(model, step, rank))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    live = optimizer.optimizer
    parameters = dict(model.named_parameters())
    truth = {name: whole(p) for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in live.state.get(parameter, {}).items():
            truth[f"{name}|{key}"] = whole(value)
    if rank == 0:
        groups = [settings_of(g, n) for g, n in zip(live.param_groups, order)]
        save_truth(folder, truth, groups)
    # What its save_state calls, and the Trainer.
    for name, kept in (
        ("accelerate", "SHARDED_STATE_DICT"),
        ("accelerate, whole", "FULL_STATE_DICT"),
    ):
        plugin.set_state_dict_type(kept)
        place = str(folder / name)
        save_fsdp_model(plugin, accelerator, model, place)
        save_fsdp_optimizer(plugin, accelerator, optimizer, model, place)
    checkpoint.save({"app": AppState(model, live)}, checkpoint_id=folder / "prime-rl")
    if distributed.get_rank() == 0:
        (folder / "verl").mkdir()
    distributed.barrier()
    state = {"model": model.state_dict(), "optim": live.state_dict()}
    for part, tensors in state.items():
        torch.save(tensors, folder / "verl" / RANK_FILES.format(part, world_size, rank))
    if kind == "lora":
        # It cannot write tied weights.
        place = folder / "transformers"
        place.mkdir(exist_ok=True)
        _save_model_checkpoint_distributed(model, place)
        save_optimizer_distributed(model, live, str(place / "optimizer_0"))
    accelerator.free_memory()


def write_first_version(folder: Path, rank: int) -> None:
    """Train and save under FSDP1, accelerate's default; the truth is of live shards."""
    model: Any = FullyShardedDataParallel(
        trained_model("full"),
        auto_wrap_policy=functools.partial(
            transformer_auto_wrap_policy, transformer_layer_cls={Qwen2DecoderLayer}
        ),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        loss_of(model, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1, state_dict_type="SHARDED_STATE_DICT"
    )
    accelerator = Accelerator(cpu=True)
    place = str(folder / "accelerate")
    save_fsdp_model(plugin, accelerator, model, place)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, place)
    with FullyShardedDataParallel.summon_full_params(model):
        whole = {unwrapped(n): p.detach().clone() for n, p in model.named_parameters()}
    truth = dict(whole)
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        truth[f"{unwrapped(name)}|step"] = torch.tensor(float(STEPS))
        for key in ("exp_avg", "exp_avg_sq"):
            shares: list[Any] = [None] * distributed.get_world_size()
            share = state.get(key, torch.zeros(0)).flatten()
            distributed.all_gather_object(shares, share)
            moment = torch.cat(shares).view(whole[unwrapped(name)].shape)
            truth[f"{unwrapped(name)}|{key}"] = moment
    if rank == 0:
        groups = [settings_of(optimizer.param_groups[0], list(whole))]
        save_truth(folder, truth, groups)


def unwrapped(name: str) -> str:
    """A parameter's name without FSDP1's own."""
    return name.replace("_fsdp_wrapped_module.", "")


def main(folder: Path) -> None:
    """Both kinds of policy."""
    distributed.init_process_group("gloo")
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    if rank == 0:
        tiny_policy("full").config.save_pretrained(folder / "config")
        tiny_policy("lora").save_pretrained(folder / "base")
        lora_settings().save_pretrained(str(folder / "adapter"))
    for kind in ("full", "lora"):
        write_all(folder / kind, kind, rank, world_size)
    write_first_version(folder / "full, FSDP1", rank)
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
