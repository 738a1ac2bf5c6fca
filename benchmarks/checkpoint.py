"""A checkpoint on disk as the Hugging Face Trainer writes one, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models import (
    FAMILIES,
    Lengths,
    Shape,
    make_base,
    make_shard,
    with_adapter,
)
from entropy_ddp.data.batch import Shard
from entropy_ddp.model.parameters import trainable_parameters

LEARNING_RATE = 1e-4


def write_run(
    folder: Path, shape: Shape, evaluation: Lengths, update: Lengths
) -> dict[str, Any]:
    """Write base, adapter, AdamW state, E and U; the configuration that probes them."""
    base, checkpoint = folder / "base", folder / "checkpoint-3"
    model = make_base("qwen2", shape)
    model.save_pretrained(base)
    adapted = with_adapter(model, FAMILIES["qwen2"])
    optimizer = _warm_optimizer(adapted)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(checkpoint)
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    files = {}
    for split, lengths, seed in (("E", evaluation, 6), ("U", update, 7)):
        shard = make_shard(lengths, shape.vocabulary, seed)
        files[split] = {"file": str(_write_rows(folder / f"{split}.jsonl", shard))}
    return {
        "checkpoint": {"path": str(checkpoint), "base": str(base)},
        "batches": files,
        "curvature": {"enabled": False},
    }


def _warm_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW after three steps along random gradients."""
    parameters = trainable_parameters(model).values()
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(8)
    for _ in range(3):
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = 0.01 * noise.to(parameter)
        optimizer.step()
    return optimizer


def _write_rows(path: Path, shard: Shard) -> Path:
    rows = (
        {
            "group": sequence.group,
            "prompt_ids": sequence.prompt_ids.tolist(),
            "response_ids": sequence.response_ids.tolist(),
            # Some number that differs within a group.
            "reward": float(sequence.response_ids.sum() % 7),
        }
        for sequence in shard.sequences
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
