"""A trainer's process as it was: what a probe borrows, it gives back bit for bit.

A training with probes takes the same steps as one without. Within `untouched`, the model
is in evaluation mode and in its own precision, no parameter has a gradient, and random
numbers may be drawn; afterwards all of that is as before. Parameters that a probe moves
are restored by `model.parameters.preserved`, from copies.

One thing must be as the trainer has it: torch leaves the row of an embedding's
`padding_idx` out of the gradient of the lookup, also where the token stands inside a
response and is no padding; the tied output layer still adds to that row. So the trainer's
step is along another vector than the derivative of its loss, and attribution to tokens
must follow it: within `lookups_cut`, the lookup of that token has no tangent, and within
`lookups_padded` no gradient.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from entropy_ddp.model.parameters import differentiate_padding_tokens


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The context of everything that a probe does in a trainer's process.

    Args:
        model: the trained model, not wrapped.
    """
    with ExitStack() as borrowed:
        borrowed.enter_context(_random_streams())
        borrowed.enter_context(_evaluation_mode(model))
        borrowed.enter_context(_gradients_aside(model))
        borrowed.enter_context(_padding_differentiated(model))
        borrowed.enter_context(_without_autocast(model))
        yield


@contextmanager
def _random_streams() -> Iterator[None]:
    """Python's, NumPy's and torch's streams, those of every GPU too."""
    python_stream, numpy_stream = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_stream)
            numpy.random.set_state(numpy_stream)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # Module by module: a trainer may keep some of them in evaluation mode.
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def _gradients_aside(model: nn.Module) -> Iterator[None]:
    # The same tensors come back: they may be views of a bucket that ranks reduce.
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


@contextmanager
def _padding_differentiated(model: nn.Module) -> Iterator[None]:
    rows = padding_rows(model)
    differentiate_padding_tokens(model)
    try:
        yield
    finally:
        for embedding, index in rows.items():
            embedding.padding_idx = index


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Without the mixed precision that accelerate wraps around `forward`."""
    wrapped = {
        module: module.__dict__["forward"]
        for module in model.modules()
        if "_original_forward" in module.__dict__ and "forward" in module.__dict__
    }
    for module in wrapped:
        module.forward = module._original_forward
    try:
        yield
    finally:
        for module, forward in wrapped.items():
            module.forward = forward


def padding_rows(model: nn.Module) -> dict[nn.Embedding, int]:
    """The embeddings that have a padding index, and which."""
    return {
        module: module.padding_idx
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
    }


@contextmanager
def lookups_cut(rows: Mapping[nn.Embedding, int]) -> Iterator[None]:
    """Within the context, looking these rows up carries no tangent in forward mode."""

    def cut(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Any:
        primal, tangent = forward_ad.unpack_dual(output)
        if tangent is None:
            return output
        padded = (args[0] == rows[module])[..., None]
        # Not masked_fill on the dual: its rule would keep the tangent.
        return forward_ad.make_dual(primal, torch.where(padded, 0.0, tangent))

    with ExitStack() as hooks:
        for module in rows:
            hooks.enter_context(module.register_forward_hook(cut))
        yield


@contextmanager
def lookups_padded(rows: Mapping[nn.Embedding, int]) -> Iterator[None]:
    """Within the context, looking these rows up leaves no gradient in reverse mode."""
    before = {module: module.padding_idx for module in rows}
    for module, index in rows.items():
        module.padding_idx = index
    try:
        yield
    finally:
        for module, found in before.items():
            module.padding_idx = found
