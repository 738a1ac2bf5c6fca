"""Weights and optimizer state of a folder, whatever the format: names to stored tensors.

Nothing is read here but structure. What is missing, surplus, of another shape or dtype,
or not finite is found by those who fill a model (`policy`) and an optimizer
(`optimizer`) with it, for every format alike.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from entropy_ddp.checkpoint import dcp, deepspeed, rank_files
from entropy_ddp.checkpoint.layouts import (
    DCP,
    FULL,
    OPTIMIZER,
    RANKS,
    SHARDS,
    WEIGHTS,
    Layout,
    find_layout,
)
from entropy_ddp.checkpoint.stored import Block, StoredTensor, joined
from entropy_ddp.checkpoint.weights import (
    load_plain,
    safe_tensors,
    stored_tensors,
    tensors_by_name,
    weight_file,
)
from entropy_ddp.errors import InputError
from entropy_ddp.files import fault_of_file

# Names that torchtitan gives to what Hugging Face calls embed_tokens and lm_head.
_TORCHTITAN = "tok_embeddings.weight"


def stored_weights(place: Path) -> dict[str, StoredTensor]:
    """The weights of a checkpoint by name; none is read yet.

    Args:
        place: a folder that holds whole weights, or parts of them in a layout that
            `find_layout` knows; or the file of all weights that FSDP leaves.

    Raises:
        InputError: they cannot be read.
    """
    layout = find_layout(place, WEIGHTS)
    if layout is None:
        if not place.is_dir() or weight_file(place) is None:
            raise InputError(
                f"{place}: expected weights by name, found none; is the folder whole?"
            )
        return stored_tensors(place)
    found = _weights_in(layout)
    if _TORCHTITAN in found:
        raise InputError(
            f"{layout.place}: expected the names of a Hugging Face model, found "
            f"torchtitan's ({_TORCHTITAN}); convert the weights with its "
            "scripts/checkpoint_conversion/convert_to_hf.py, and measure what a step "
            "did by update.delta: the next checkpoint, converted too"
        )
    return found


def _weights_in(layout: Layout) -> dict[str, StoredTensor]:
    if layout.kind == FULL:
        return tensors_by_name(
            layout.place, load_plain(layout.place, "file of weights")
        )
    if layout.kind == DCP:
        return dcp.weights_in(layout.place)
    if layout.kind == RANKS:
        return rank_files.weights_in(layout)
    if layout.kind == SHARDS:
        return _shards(layout)
    return deepspeed.weights_in(layout)


def stored_optimizer(place: Path) -> Any:
    """The optimizer state of a checkpoint, as torch's state_dict has it.

    Its moments are `StoredTensor`s where they lie in parts, or else tensors that are
    mapped into memory.

    Args:
        place: a file of torch.save, or a folder in a layout that `find_layout` knows.

    Raises:
        InputError: it cannot be read.
    """
    layout = find_layout(place, OPTIMIZER)
    if layout is None:
        return load_plain(place, "optimizer state")
    if layout.kind == DCP:
        return dcp.optimizer_in(layout.place)
    if layout.kind == RANKS:
        return rank_files.optimizer_in(layout)
    return deepspeed.optimizer_in(layout)


def _shards(layout: Layout) -> dict[str, StoredTensor]:
    """Blocks of tensors in safetensors files, whose metadata says where they belong."""
    blocks: dict[str, list[Block]] = {}

    def describe(reason: str) -> str:
        return (
            f"{layout.place}: expected the safetensors files of every rank, as "
            f"transformers saves them, found others ({reason}); copy the folder again"
        )

    with fault_of_file(str(layout.place), describe):
        for path in layout.files:
            with safe_open(path, framework="pt") as file:
                places = json.loads((file.metadata() or {})["DCP_SHARDING_INFO"])
            for name, tensor in safe_tensors(path).items():
                offsets = tuple(places[name]["saved_offsets"])
                blocks.setdefault(name, []).append(Block(offsets, tensor))
        return {name: joined(_extent(found), found) for name, found in blocks.items()}


def _extent(blocks: list[Block]) -> torch.Size:
    """The shape whose last corner the blocks reach."""
    ends = [[part.stop for part in block.region] for block in blocks]
    return torch.Size(max(of_dimension) for of_dimension in zip(*ends, strict=True))
