"""Checkpoints of DeepSpeed ZeRO 1, 2 and 3, and its universal ones, without DeepSpeed.

ZeRO concatenates the parameters of a group to one flat tensor of float32 masters and
cuts that, or with stage 3 each parameter, into one piece for every rank:

    stages 1, 2    rank r has the r-th of R equal parts of [p_1, p_2, ..., padding]
    stage 3        rank r has [p_1's r-th part, p_2's r-th part, ...], each padded

    *zero_pp_rank_R_mp_rank_00_optim_states.pt     these pieces, and those of the moments
    *mp_rank_00_model_states.pt                    names and shapes, what is not trained

The masters are the weights here: what the optimizer steps on, which a model in bfloat16
rounds. A universal checkpoint has a folder zero/NAME with fp32.pt, exp_avg.pt,
exp_avg_sq.pt for each parameter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import torch

from entropy_ddp.checkpoint.inert import Inert, inert, read_archive
from entropy_ddp.checkpoint.layouts import UNIVERSAL, Layout
from entropy_ddp.checkpoint.stored import (
    Block,
    StoredTensor,
    joined,
    read_number,
    unflattened,
)
from entropy_ddp.errors import InputError
from entropy_ddp.files import fault_of_file

_KNOWN = {
    name: inert(name)
    for name in (
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "deepspeed.utils.tensor_fragment.tensor_fragment",
    )
}
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTERS = "param"
Tensors = dict[str, StoredTensor]


@dataclass(frozen=True)
class ZeroState:
    """What the ranks' files hold together.

    Attributes:
        masters: float32 weights of the trained parameters, by name.
        state: state of the optimizer, by name.
        groups: settings of the optimizer, with names.
        stage: of ZeRO.
    """

    masters: Tensors
    state: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]
    stage: int


def weights_in(layout: Layout) -> Tensors:
    """The weights by name: masters of what is trained, the rest as it was saved.

    Raises:
        InputError: a file cannot be read, or is not of ZeRO.
    """
    models = _model_states(layout)
    if layout.kind == UNIVERSAL:
        trained = {
            name: _universal(layout, name, "fp32", shape)
            for names in _shapes(models[0])
            for name, shape in names.items()
        }
    else:
        trained = read_state(layout).masters
    return trained | _untrained(layout.place, models)


def optimizer_in(layout: Layout) -> dict[str, Any]:
    """The optimizer's state by parameter names, as torch's state_dict has it.

    Raises:
        InputError: as for `weights_in`.
    """
    if layout.kind == UNIVERSAL:
        return _universal_optimizer(layout)
    found = read_state(layout)
    return {"state": found.state, "param_groups": found.groups}


def read_state(layout: Layout) -> ZeroState:
    """The masters and the optimizer's state of a ZeRO checkpoint, by name.

    Raises:
        InputError: a rank's file is missing or cannot be read, or the pieces do not
            make up the parameters.
    """
    place = layout.place
    foreign = [
        p.name for p in layout.files if "_mp_rank_00_" not in p.name or "expp" in p.name
    ]
    if foreign:
        raise InputError(
            f"{place}: expected the states of data-parallel ranks, found {foreign[0]}, of "
            "model or expert parallelism; export the weights with `python zero_to_fp32.py "
            ". OUT --safe_serialization`, and probe with update.delta: the export of the "
            "next checkpoint"
        )
    files = [read_archive(path, _KNOWN) for path in layout.files]

    def describe(reason: str) -> str:
        return (
            f"{place}: expected ZeRO's optimizer states of stage 1, 2 or 3, whole and of "
            f"one training, found others ({reason}); copy the folder again"
        )

    with fault_of_file(str(place), describe):
        ranks = [file["optimizer_state_dict"] for file in files]
        stage = _stage(ranks[0]["zero_stage"])
        _require_every_rank(place, ranks)
        shapes = _shapes(_model_states(layout)[0])
        merge = _merge_by_parameter if stage == 3 else _merge_by_group
        tensors, steps, groups = merge(ranks, shapes)
        config = files[0].get("ds_config")
    state = {
        name: {"step": steps[name], **{key: tensors[key][name] for key in _MOMENTS}}
        for name in tensors[_MASTERS]
    }
    settings = [_as_torch(place, group, config) for group in groups]
    return ZeroState(tensors[_MASTERS], state, settings, stage)


def _stage(value: Any) -> int:
    if isinstance(value, Inert):
        (value,) = value.arguments
    if value not in (1, 2, 3):
        raise ValueError(f"stage {value!r}")
    return int(value)


def _require_every_rank(place: Path, ranks: Sequence[Mapping[str, Any]]) -> None:
    count = ranks[0]["partition_count"]
    expected = max(count) if isinstance(count, list) else count
    if len(ranks) != expected:
        raise InputError(
            f"{place}: expected the optimizer states of {expected} ranks, found "
            f"{len(ranks)} files; copy them all, of one training"
        )


Merged = tuple[dict[str, Tensors], dict[str, Any], list[dict[str, Any]]]


def _merge_by_group(
    ranks: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]]
) -> Merged:
    """Stages 1 and 2: each group is one flat tensor, in equal parts on the ranks."""
    inner = [rank["base_optimizer_state"] for rank in ranks]
    groups, paddings = (
        inner[0]["param_groups"],
        ranks[0].get("param_alignment_paddings"),
    )
    if len(groups) != len(shapes):
        raise ValueError(f"{len(groups)} groups, and names of {len(shapes)}")
    tensors: dict[str, Tensors] = {key: {} for key in (_MASTERS, *_MOMENTS)}
    steps, named = {}, []
    for index, (group, of_group) in enumerate(zip(groups, shapes)):
        (number,) = group["params"] if of_group else (None,)
        flats = {}
        if number is not None:
            flats = {
                key: _concatenated([rank["state"][number][key] for rank in inner])
                for key in _MOMENTS
            }
            flats[_MASTERS] = _concatenated(
                [rank["single_partition_of_fp32_groups"][index] for rank in ranks]
            )
        offset = 0
        for place, (name, shape) in enumerate(of_group.items()):
            for key, flat in flats.items():
                tensors[key][name] = unflattened(flat, offset, shape)
            steps[name] = _step(group, inner[0]["state"][number])
            offset += prod(shape) + (paddings[index][place] if paddings else 0)
        for key, flat in flats.items():
            align = 2 * len(ranks)
            if -(-offset // align) != -(-flat.shape.numel() // align):
                raise ValueError(
                    f"{flat.shape.numel()} elements of {key} in group {index}, and "
                    f"parameters with {offset}"
                )
        named.append(group | {"params": list(of_group)})
    return tensors, steps, named


def _merge_by_parameter(
    ranks: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]]
) -> Merged:
    """Stage 3: each parameter is cut; a rank's pieces follow one another."""
    inner = [rank["optimizer_state_dict"] for rank in ranks]
    groups = inner[0]["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    flats = {
        key: [_concatenated([r["state"][n][key] for n in numbers]) for r in inner]
        for key in _MOMENTS
    }
    flats[_MASTERS] = [_concatenated(rank["fp32_flat_groups"]) for rank in ranks]
    tensors: dict[str, Tensors] = {key: {} for key in flats}
    offset = 0
    sizes = {name: shape for of_group in shapes for name, shape in of_group.items()}
    for name, shape in sizes.items():
        piece = -(-prod(shape) // len(ranks))
        for key, of_ranks in flats.items():
            pieces = [unflattened(flat, offset, (piece,)) for flat in of_ranks]
            tensors[key][name] = _of_pieces(pieces, shape)
        offset += piece
    for key, of_ranks in flats.items():
        if any(flat.shape.numel() != offset for flat in of_ranks):
            raise ValueError(
                f"{of_ranks[0].shape.numel()} elements of {key} on a rank, and "
                f"parameters with {offset}"
            )
    named, steps = [], {}
    for group, names in zip(groups, _names_of_groups(groups, shapes)):
        named.append(group | {"params": names})
        for name in names:
            steps[name] = _step(group, inner[0]["state"][group["params"][0]])
    return tensors, steps, named


def _names_of_groups(
    groups: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """The names of each group, which stage 3 may step on in several parts."""
    counts = [len(group["params"]) for group in groups]
    if len(shapes) == len(groups):
        counts = [1] * len(groups)
    if len(shapes) != sum(counts):
        raise ValueError(f"{len(groups)} groups, and names of {len(shapes)}")
    parts = iter(shapes)
    return [
        [name for part in islice(parts, count) for name in part] for count in counts
    ]


def _step(group: Mapping[str, Any], entry: Mapping[str, Any]) -> Any:
    """The count of steps, which some of DeepSpeed's optimizers keep in the group."""
    return read_number(entry["step"] if "step" in entry else group["step"])


def _concatenated(parts: Sequence[StoredTensor]) -> StoredTensor:
    """Flat tensors, one after the other."""
    blocks, offset = [], 0
    for part in parts:
        (length,) = part.shape
        blocks.append(Block((offset,), part))
        offset += length
    return joined((offset,), blocks)


def _of_pieces(pieces: Sequence[StoredTensor], shape: Sequence[int]) -> StoredTensor:
    """A tensor of flat pieces of equal length, the last of them padded."""
    flat = _concatenated(pieces)
    return unflattened(flat, 0, shape)


# What DeepSpeed's own Adam has in its groups beside torch's
_OWN_KEYS = {
    "bias_correction",
    "step",
    "adam_w_mode",
    "adamw_mode",
    "fp32_optimizer_states",
}


def _as_torch(place: Path, group: dict[str, Any], config: Any) -> dict[str, Any]:
    """A group of DeepSpeed's FusedAdam or CPUAdam in the terms of torch's."""
    if "bias_correction" not in group:
        return group
    if group["bias_correction"] is not True:
        raise InputError(
            f"{place}: expected Adam with bias correction, found bias_correction "
            f"{group['bias_correction']!r}; probe with update.delta: the next checkpoint"
        )
    optimizer = config.get("optimizer") if isinstance(config, dict) else None
    optimizer = optimizer if isinstance(optimizer, dict) else {}
    coupled = (
        str(optimizer.get("type", "")).lower() == "adam"
        and (optimizer.get("params") or {}).get("adam_w_mode") is False
    )
    kept = {key: value for key, value in group.items() if key not in _OWN_KEYS}
    return {"amsgrad": False, "decoupled_weight_decay": not coupled} | kept


# The model's own file, and universal checkpoints


def _model_states(layout: Layout) -> list[Mapping[str, Any]]:
    """The ranks' files of model states; of stages 1 and 2 there is one."""
    files = sorted(layout.place.glob("*mp_rank_00_model_states.pt"), key=_rank_of)
    if not files:
        raise InputError(
            f"{layout.place}: expected *mp_rank_00_model_states.pt, found none; copy it "
            "from the training"
        )
    found = [read_archive(path, _KNOWN) for path in files]
    for path, states in zip(files, found):
        if (
            not isinstance(states, dict)
            or not {"module", "param_shapes"} <= states.keys()
        ):
            raise InputError(
                f"{path}: expected DeepSpeed's model states with `module` and "
                "`param_shapes`, found others; is the file damaged?"
            )
    return found


def _rank_of(path: Path) -> int:
    digits = path.name.partition("zero_pp_rank_")[2].partition("_")[0]
    return int(digits) if digits.isdigit() else 0


def _untrained(place: Path, models: Sequence[Mapping[str, Any]]) -> Tensors:
    """Frozen parameters and buffers, where they were saved."""

    def describe(reason: str) -> str:
        return (
            f"{place}: expected the frozen parameters and buffers of DeepSpeed's model "
            f"states, found others ({reason}); copy the folder again"
        )

    first = models[0]
    with fault_of_file(str(place), describe):
        frozen = {}
        for name, shape in (first.get("frozen_param_shapes") or {}).items():
            pieces = [model["frozen_param_fragments"][name] for model in models]
            if len(pieces) == 1:
                frozen[name] = _of_shape(pieces[0], shape)
            else:
                frozen[name] = _of_pieces(pieces, shape)
        buffers = {
            name: first["module"][name]
            for name in first.get("buffer_names") or ()
            if name in first["module"]
        }
    return frozen | buffers


def _of_shape(tensor: StoredTensor, shape: Sequence[int]) -> StoredTensor:
    return tensor if tensor.shape == torch.Size(shape) else _of_pieces([tensor], shape)


def _shapes(states: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Shapes by name, of each group."""
    shapes = states["param_shapes"]
    return [shapes] if isinstance(shapes, dict) else list(shapes)


def _universal(
    layout: Layout, name: str, key: str, shape: Sequence[int]
) -> StoredTensor:
    """A file of a universal checkpoint: a tensor, or a mapping that has it; or flat."""
    path = layout.place / "zero" / name / f"{key}.pt"
    found = read_archive(path, _KNOWN)
    tensor = found.get(_MASTERS) if isinstance(found, dict) else found
    if not isinstance(tensor, StoredTensor) or tensor.shape.numel() != prod(shape):
        shown = getattr(tensor, "shape", type(tensor).__name__)
        raise InputError(
            f"{path}: expected a tensor of shape {tuple(shape)}, found {shown}; convert "
            "the checkpoint again"
        )
    return _of_shape(tensor, shape)


def _universal_optimizer(layout: Layout) -> dict[str, Any]:
    path = layout.place / "zero" / "optimizer_state.pt"
    common = read_archive(path, _KNOWN)
    groups = common.get("param_groups") if isinstance(common, dict) else None
    if not isinstance(groups, list):
        raise InputError(
            f"{path}: expected the settings of every param group, found none; name the "
            "ZeRO checkpoint that it was converted from"
        )

    def describe(reason: str) -> str:
        return (
            f"{path}: expected the settings of the model states' param groups, found "
            f"others ({reason}); convert the checkpoint again"
        )

    parts = _shapes(_model_states(layout)[0])
    with fault_of_file(str(path), describe):
        by_group = _names_of_groups(groups, parts)
    shapes = {name: shape for part in parts for name, shape in part.items()}
    state, settings = {}, []
    for group, names in zip(groups, by_group):
        for name in names:
            state[name] = {
                key: _universal(layout, name, key, shapes[name]) for key in _MOMENTS
            } | {"step": _universal_step(layout, name, group, common)}
        settings.append(_as_torch(layout.place, group | {"params": names}, common))
    return {"state": state, "param_groups": settings}


def _universal_step(
    layout: Layout, name: str, group: Mapping[str, Any], common: Mapping[str, Any]
) -> Any:
    """The count of steps: of the parameter, or with stage 3 that of all."""
    file = layout.place / "zero" / name / "step.pt"
    if file.is_file():
        return read_number(read_archive(file, _KNOWN))
    inner = common.get("optimizer_state_dict")
    entries = inner.get("state") if isinstance(inner, dict) else None
    if not entries:
        raise InputError(
            f"{file}: expected the number of steps taken, found no such file; convert "
            "the checkpoint again"
        )
    return _step(group, next(iter(entries.values())))
