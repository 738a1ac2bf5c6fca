"""A change of the parameters from files: what somebody else's step did.

From a safetensors file by parameter name, or from a second checkpoint of the same model:
its parameters minus ours.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from entropy_ddp.checkpoint.find import (
    CheckpointFiles,
    adapters_in,
    find_checkpoint,
    has_full_model,
    is_training_state,
)
from entropy_ddp.checkpoint.policy import (
    Policy,
    load_base,
    load_state,
    require_same_adapter_names,
)
from entropy_ddp.checkpoint.weights import read_adapter, read_adapter_config
from entropy_ddp.config import Checkpoint, Precision
from entropy_ddp.errors import InputError
from entropy_ddp.files import fault_of_file
from entropy_ddp.model.parameters import ParameterLayout, preserved

# Settings of an adapter that its weights mean nothing without.
ADAPTER_SETTINGS = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
)


def read_change(
    name: str, policy: Policy, precision: Precision, attention: str
) -> Tensor:
    """Delta theta of every trainable parameter, flat, on the CPU, [P].

    Args:
        name: a safetensors file or a checkpoint folder.
        policy: the checkpoint that is changed, at theta.
        precision: dtypes; the change has the buffers', float32 if that is wider.

    Raises:
        InputError: there is no such file or folder, it cannot be read, or it has other
            parameters than the policy.
    """
    path = Path(name)
    dtype = torch.promote_types(
        getattr(torch, precision.buffer_dtype_name), torch.float32
    )
    layout = ParameterLayout.of(policy.parameters)
    if path.is_dir():
        ours = layout.flatten(policy.parameters, dtype)
        theirs = _of_checkpoint(path, policy, precision, attention)
        return layout.flatten(theirs, dtype).sub_(ours)
    if not path.is_file():
        raise InputError(
            f"update.delta: {path}: expected a safetensors file or a checkpoint folder, "
            "found none there"
        )
    return layout.flatten(_of_file(path, policy), dtype)


def _of_file(path: Path, policy: Policy) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    def describe(reason: str) -> str:
        return (
            f"update.delta: {path}: expected a safetensors file, as update.save_delta "
            f"writes it, found none: {reason}"
        )

    with fault_of_file(str(path), describe):
        tensors = load_file(path)
    _require_fitting(path, tensors, policy)
    return tensors


def _of_checkpoint(
    folder: Path, policy: Policy, precision: Precision, attention: str
) -> dict[str, Tensor]:
    """The second checkpoint's parameters; where names are open, those of the first."""
    ours, found = policy.files, adapters_in(folder)
    adapter = None
    if ours.adapter is not None:
        # Weights by name do not hold the adapter's settings.
        adapter = str(ours.adapter) if is_training_state(folder) else None
        adapter = ours.adapter_name if ours.adapter_name in found else adapter
    section = Checkpoint(
        path=str(folder),
        base=None if has_full_model(folder) and not found else ours.base,
        adapter=adapter,
        trust_remote_code=ours.trust_remote_code,
    )
    files = find_checkpoint(section)
    if (files.adapter is None) != (ours.adapter is None):
        kinds = {True: "full weights", False: "an adapter"}
        raise InputError(
            f"update.delta: {folder}: expected {kinds[ours.adapter is None]}, as the "
            f"checkpoint has, found {kinds[files.adapter is None]}"
        )
    theirs = second_parameters(policy, files, precision, attention)
    _require_fitting(folder, theirs, policy)
    return theirs


def _require_fitting(path: Path, tensors: Mapping[str, Tensor], policy: Policy) -> None:
    parameters = policy.parameters
    differing = sorted(parameters.keys() ^ tensors.keys())
    for name in differing:
        where = "it" if name in parameters else "the trainable parameters"
        raise InputError(
            f"update.delta: {path}: {name} is missing from {where}; {len(differing)} "
            f"names differ ({len(tensors)} found, {len(parameters)} expected); is it the "
            "change of another model?"
        )
    wrong = [n for n, p in parameters.items() if tensors[n].shape != p.shape]
    for name in wrong:
        raise InputError(
            f"update.delta: {path}: {name} should be {tuple(parameters[name].shape)}, "
            f"found {tuple(tensors[name].shape)}; {len(wrong)} of {len(parameters)} have "
            "another shape; is it the change of another model?"
        )
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"update.delta: {path}: {name} has NaN or infinite values")


def second_parameters(
    policy: Policy, files: CheckpointFiles, precision: Precision, attention: str
) -> dict[str, Tensor]:
    """Trainable parameters of another checkpoint, on the CPU, in the policy's dtype.

    Args:
        policy: the first checkpoint, opened; its parameters are as they were afterwards.

    Raises:
        InputError: the second checkpoint cannot be read, or is of another model.
    """
    if files.weights is None and files.adapter is None:
        dtype = getattr(torch, precision.model)
        model = load_base(files.base, dtype, attention, files.trust_remote_code)
        if dtype == torch.float64:
            model.to(dtype)
        return {name: p.detach() for name, p in model.named_parameters()}
    is_divided = any(hasattr(p, "to_local") for p in policy.model.parameters())
    if files.weights is not None and is_divided:
        raise InputError(
            f"update.delta: {files.weights}: expected an adapter's own folder, found the "
            "weights of a whole state, which do not fit into a model that ranks divide; "
            "set compute.shard: none"
        )
    # Their weights stand in our model for a moment: no second copy of what is frozen.
    everything = [*policy.model.parameters(), *policy.model.buffers()]
    moved = list(policy.parameters.values()) if files.weights is None else everything
    with preserved(moved, torch.device("cpu")):
        if files.weights is None:
            _set_adapter(policy, files)
        else:
            load_state(policy.model, files.weights)
        return {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in policy.parameters.items()
        }


def _set_adapter(policy: Policy, files: CheckpointFiles) -> None:
    from peft import set_peft_model_state_dict

    ours, theirs = policy.files.adapter, files.adapter
    assert ours is not None and theirs is not None
    pairs = [read_adapter_config(adapter) for adapter in (ours, theirs)]
    for key in ADAPTER_SETTINGS:
        mine, other = (config.get(key) for config in pairs)
        if mine != other:
            raise InputError(
                f"adapter {theirs}: {key} is {other}, and {mine} in {ours}: the "
                "difference of their weights is not that of their policies"
            )
    name, stored = policy.files.adapter_name, read_adapter(theirs)
    require_same_adapter_names(policy.model, theirs, name, stored)
    set_peft_model_state_dict(policy.model, stored, adapter_name=name)
