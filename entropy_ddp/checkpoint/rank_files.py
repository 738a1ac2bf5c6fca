"""A file of DTensors for each rank: verl with FSDP2, accelerate without DCP.

    model_world_size_8_rank_0.pt      tensors by name, each rank's share of them
    optim_world_size_8_rank_0.pt      the optimizer's state_dict, of the same shares

A tensor is split along one dimension over ranks that follow one another; further
dimensions of the mesh hold copies of it.
"""

from collections.abc import Sequence
from typing import Any

from entropy_ddp.checkpoint.inert import Refusal, ShardOfTensor, read_archive
from entropy_ddp.checkpoint.layouts import Layout
from entropy_ddp.checkpoint.stored import Block, StoredTensor, joined
from entropy_ddp.errors import InputError
from entropy_ddp.files import fault_of_file

_FSDP1 = (
    "expected DTensors of FSDP2, found ShardedTensors of FSDP1; export the weights with "
    "`python -m verl.model_merger merge --backend fsdp --local_dir FOLDER --target_dir "
    "OUT`, and probe with update.delta: the export of the next checkpoint; or train with "
    "strategy: fsdp2"
)


def weights_in(layout: Layout) -> dict[str, StoredTensor]:
    """The weights by name.

    Raises:
        InputError: a file cannot be read, or the ranks' shares do not make up tensors.
    """
    ranks = _read(layout)
    return {
        name: tensor
        for name, tensor in _merged(layout, ranks, "").items()
        if isinstance(tensor, StoredTensor)
    }


def optimizer_in(layout: Layout) -> Any:
    """The optimizer's state, as torch's state_dict has it.

    Raises:
        InputError: as for `weights_in`.
    """
    return _merged(layout, _read(layout), "")


def _read(layout: Layout) -> list[Any]:
    known = {
        f"torch.distributed._shard.{name}": Refusal(f"{layout.place}: {_FSDP1}")
        for name in ("sharded_tensor.api.ShardedTensor", "sharded_tensor.shard.Shard")
    }
    ranks = [read_archive(path, known) for path in layout.files]
    for path, rank in zip(layout.files, ranks):
        if not isinstance(rank, dict):
            raise InputError(
                f"{path}: expected a mapping, found {type(rank).__name__}; is the file "
                "damaged?"
            )
    return ranks


def _merged(layout: Layout, values: Sequence[Any], place: str) -> Any:
    """What the ranks hold together, at one place of what they hold."""
    first = values[0]
    if isinstance(first, dict):
        if any(not isinstance(v, dict) or v.keys() != first.keys() for v in values):
            raise _misfit(layout, place, "other names on another rank")
        return {
            key: _merged(layout, [value[key] for value in values], f"{place}{key}: ")
            for key in first
        }
    if not isinstance(first, ShardOfTensor):
        # Settings and counts, which all ranks have.
        return first
    *outer, split = first.placements
    same = [
        isinstance(v, ShardOfTensor) and v.placements == first.placements
        for v in values
    ]
    if not all(same) or any(p is not None for p in outer) or isinstance(split, str):
        raise _misfit(
            layout,
            place,
            f"a tensor placed {first.placements} on the mesh (tensor parallelism?)",
        )
    if split is None:
        return first.local
    blocks, offset = [], 0
    for value in values:
        if offset == first.shape[split]:
            # The others hold copies, or nothing.
            break
        offsets = [0] * len(first.shape)
        offsets[split] = offset
        blocks.append(Block(tuple(offsets), value.local))
        offset += value.local.shape[split]

    def describe(reason: str) -> str:
        return str(_misfit(layout, place, reason))

    with fault_of_file(str(layout.place), describe):
        return joined(first.shape, blocks)


def _misfit(layout: Layout, place: str, found: str) -> InputError:
    return InputError(
        f"{layout.place}: expected shares of one tensor on all {len(layout.files)} "
        f"ranks, split along one dimension, found at {place or 'the top: '}{found}; "
        "copy the files of all ranks again, or export the weights in the trainer"
    )
