"""DeepSpeed's checkpoints of a tiny policy: every stage of ZeRO, and universal ones.

Run as a script under torchrun, where deepspeed is installed:

    torchrun --nproc_per_node=2 tests/zero_training.py FOLDER

leaves for each case FOLDER/CASE/truth.safetensors and groups.json (as
`sharded_training` has them, from the live engine) and FOLDER/CASE/checkpoint. The file
tests/data/zero.tar.xz holds what it left with deepspeed 0.19.8; made anew by

    tar cJf tests/data/zero.tar.xz -C FOLDER --exclude "zero_to_*.py" .

No operator is compiled: gloo's shared memory, the one that a CPU would use, is off.
"""

import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
warnings.filterwarnings("ignore")

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
)
from sharded_training import (
    STEPS,
    groups_of,
    loss_of,
    save_truth,
    settings_of,
    trained_model,
)
from torch import distributed

# Stage of ZeRO, kind of policy, further settings.
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "stage 1": (1, "full", {}),
    "stage 2, bfloat16": (2, "full", {"bf16": {"enabled": True}}),
    "stage 2, LoRA": (2, "lora", {}),
    "stage 3": (3, "full", {}),
    "stage 3, bfloat16": (3, "full", {"bf16": {"enabled": True}}),
    "stage 3, LoRA": (3, "lora", {}),
}
UNIVERSAL = ("stage 2, bfloat16", "stage 3")


def write(folder: Path, case: str, rank: int) -> None:
    """Train and save one case."""
    stage, kind, further = CASES[case]
    model = trained_model(kind)
    optimizer = torch.optim.AdamW(groups_of(model), lr=3e-3, betas=(0.9, 0.95))
    names = {id(p): n for n, p in model.named_parameters()}
    order = [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    zero = {"stage": stage}
    if stage == 3:
        # Groups are stepped on in several parts, and every parameter is cut.
        zero |= {"sub_group_size": 500, "stage3_param_persistence_threshold": 0}
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            **further,
        },
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(
            o, lambda step: 1 / (1 + step)
        ),
    )
    for step in range(STEPS):
        engine.backward(loss_of(engine, step, rank))
        engine.step()
    engine.save_checkpoint(str(folder / "checkpoint"))
    if stage < 3:
        # Linked before there were moments.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    truth = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        truth[name] = safe_get_full_fp32_param(parameter)
        for key in ("exp_avg", "exp_avg_sq"):
            truth[f"{name}|{key}"] = safe_get_full_optimizer_state(parameter, key)
        truth[f"{name}|step"] = torch.tensor(float(STEPS))
    if rank == 0:
        groups = [
            settings_of(g, n) for g, n in zip(engine.optimizer.param_groups, order)
        ]
        save_truth(folder, truth, groups)


def convert(folder: Path) -> None:
    """A universal checkpoint beside that of the ranks, as DeepSpeed's command makes it."""
    place = folder / "checkpoint" / f"global_step{STEPS}"
    ds_to_universal.main(
        SimpleNamespace(
            input_folder=str(place),
            output_folder=f"{place}_universal",
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def main(folder: Path) -> None:
    """All cases."""
    # Must not be compiled.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    rank = distributed.get_rank()
    for case in CASES:
        write(folder / case, case, rank)
    distributed.barrier()
    if rank == 0:
        for case in UNIVERSAL:
            convert(folder / case)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
