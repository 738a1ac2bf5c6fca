"""A base model whose weights lie in its files until a rank takes its part of them.

The tensors of the model are pages of the safetensors files, mapped and not read: what a
layer's parts are made of is read when it is divided, and the pages are the system's,
shared by all processes of a machine. Weights that lie in other files, in shares of the
ranks that wrote them, stand for themselves until then. So no rank ever holds the whole
model.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from entropy_ddp.checkpoint.weights import mapped_tensors

MIXED = "some of its layers keep another dtype"


def map_weights(model: nn.Module, base: str) -> str | None:
    """Put the weights of a folder or hub id into a model, as pages of their files.

    Args:
        model: its weights have no memory yet; tied ones are tied.

    Returns:
        None; or why they have to be read whole, by what says what else may be wrong.
    """
    tensors = mapped_tensors(base)
    if tensors is None:
        return "its weights are not safetensors files on this machine"
    if _is_of_several_dtypes(model):
        return MIXED
    if not _assign(model, tensors):
        return "its files name the weights in another way than the model does"
    return None


def reserve_weights(model: nn.Module) -> str | None:
    """Give weights that are to come a shape, and no memory but that of one number.

    Args:
        model: its weights have no memory yet; tied ones are tied.

    Returns:
        None; or why they have to be read whole.
    """
    if _is_of_several_dtypes(model):
        return MIXED
    replace_parameters(model, lambda p: p.new_zeros((), device="cpu").expand(p.shape))
    return None


def replace_parameters(
    model: nn.Module, make: Callable[[nn.Parameter], Tensor]
) -> None:
    """Put other tensors in the place of all parameters; tied ones stay one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(make(parameter))
            setattr(module, name, made[parameter])


def _is_of_several_dtypes(model: Any) -> bool:
    wide = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return any(getattr(model, name, None) for name in wide)


def _assign(model: Any, tensors: Mapping[str, Tensor]) -> bool:
    """Put the tensors in the model's slots; whether they are the model's."""
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
