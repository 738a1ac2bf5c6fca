"""The parameters of a second checkpoint of the same model, by the first one's names."""

import torch
from torch import Tensor

from entropy_ddp.checkpoint.find import CheckpointFiles, Policy
from entropy_ddp.checkpoint.weights import (
    load_base,
    load_state,
    read_adapter,
    read_adapter_config,
    require_same_adapter_names,
)
from entropy_ddp.config import Precision
from entropy_ddp.errors import InputError
from entropy_ddp.model.parameters import preserved

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


def second_parameters(
    policy: Policy, files: CheckpointFiles, precision: Precision, attention: str
) -> dict[str, Tensor]:
    """Trainable parameters of another checkpoint, on the CPU, in the policy's dtype.

    Args:
        policy: the first checkpoint, opened; its parameters are as they were afterwards.
        files: the second checkpoint.
        precision: dtype of the model.
        attention: Hugging Face attention implementation.

    Raises:
        InputError: the second checkpoint cannot be read, or is of another model.
    """
    if files.state is None and files.adapter is None:
        dtype = getattr(torch, precision.model)
        model = load_base(files.base, dtype, attention, files.trust_remote_code)
        if dtype == torch.float64:
            model.to(dtype)
        return {name: p.detach() for name, p in model.named_parameters()}
    # Their weights stand in our model for a moment: no second copy of what is frozen.
    everything = [*policy.model.parameters(), *policy.model.buffers()]
    moved = list(policy.parameters.values()) if files.state is None else everything
    with preserved(moved, torch.device("cpu")):
        if files.state is None:
            _set_adapter(policy, files)
        else:
            load_state(policy.model, files.state)
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
