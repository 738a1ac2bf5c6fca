"""A base model whose weights lie in its files until a rank takes its part of them.

The tensors of the model are pages of the safetensors files, mapped and not read: what a
layer's parts are made of is read when it is divided, and the pages are the system's,
shared by all processes of a machine. So no rank ever holds the whole model.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_ddp.checkpoint.weights import mapped_tensors
from entropy_ddp.model.implementations import supported_attention


def map_base(
    base: str, dtype: torch.dtype, attention: str, trust_remote_code: bool
) -> nn.Module | str:
    """The model of a folder or hub id, its weights in the files and of their dtypes.

    Args:
        dtype: that the model will have.
        attention: see `supported_attention`.

    Returns:
        The model; or why its weights have to be read whole: then nothing is said of
        what else may be wrong.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors = mapped_tensors(base)
    if tensors is None:
        return "its weights are not safetensors files on this machine"
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=supported_attention(base, attention, trust_remote_code),
            trust_remote_code=trust_remote_code,
        )
    wide = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    if any(getattr(model, name, None) for name in wide):
        return "some of its layers keep another dtype"
    if not _assign(model, tensors):
        return "its files name the weights in another way than the model does"
    _set_generation(model, base)
    return model


def _assign(model: Any, tensors: Mapping[str, Tensor]) -> bool:
    """Put the tensors in the model's slots; whether they are the model's."""
    # Empty weights are not tied when they are made.
    model.tie_weights()
    parameters = dict(model.named_parameters())
    known = model.state_dict().keys()
    fits = parameters.keys() <= tensors.keys() <= known and all(
        tensors[name].shape == parameter.shape for name, parameter in parameters.items()
    )
    if not fits or tensors.keys() & dict(model.named_buffers()).keys():
        return False
    for name in parameters:
        owner, _, attribute = name.rpartition(".")
        tensor = nn.Parameter(tensors[name], requires_grad=True)
        model.get_submodule(owner)._parameters[attribute] = tensor
    model.tie_weights()
    return not any(p.is_meta for p in model.parameters())


def _set_generation(model: Any, base: str) -> None:
    """What the folder says of generation, its end tokens, as from_pretrained does."""
    from transformers import GenerationConfig

    folder = Path(base)
    if folder.is_dir() and not (folder / "generation_config.json").exists():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(base)
    except OSError:
        # A hub id without the file.
        return


@torch.no_grad()
def settle_parameters(
    parameters: Iterable[nn.Parameter], dtype: torch.dtype | None, device: torch.device
) -> None:
    """Give parameters memory of their own on this device.

    Args:
        dtype: that they will have; None for their own.
    """
    for parameter in parameters:
        data = parameter.data
        parameter.data = data.to(device, dtype or data.dtype, copy=True)


@torch.no_grad()
def settle_buffers(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Put buffers on this device: of a float64 model as float64, else as they are."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                wide = dtype == torch.float64 and buffer.is_floating_point()
                kept = dtype if wide else buffer.dtype
                module._buffers[name] = buffer.to(device, kept)
