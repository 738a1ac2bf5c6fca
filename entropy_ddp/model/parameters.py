"""Vectors in parameter space: one flat CPU buffer with a name for every piece.

Gradients, the step and every direction are vectors over the trainable parameters. They
live as one flat tensor on the CPU, so that a reduction over ranks is one collective, and
are read through `ParameterLayout.views`, a dictionary of tensors by parameter name.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Elements of a buffer that are worked on together: they stay in the processor's cache,
# and torch leaves so few to one thread.
BLOCK_ELEMENTS = 1 << 14


@dataclass(frozen=True)
class ParameterLayout:
    """Where each trainable parameter lies in a flat buffer.

    Attributes:
        shapes: shape of each parameter by name, in the order of the buffer.
    """

    shapes: dict[str, torch.Size]

    @classmethod
    def of(cls, parameters: Mapping[str, nn.Parameter]) -> "ParameterLayout":
        """The layout of these parameters, in their order."""
        return cls({name: parameter.shape for name, parameter in parameters.items()})

    @property
    def numel(self) -> int:
        """Total number of elements P."""
        return sum(shape.numel() for shape in self.shapes.values())

    def flatten(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Copy named tensors into one new CPU buffer [P] of this dtype."""
        flat = torch.empty(self.numel, dtype=dtype)
        for name, view in self.views(flat).items():
            view.copy_(tensors[name].detach())
        return flat

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The pieces of a flat buffer [P] by name; they share its memory."""
        pieces = flat.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces)
        }


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name, in the module's order."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and bits: equal exactly when all bits are."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(bits.numpy())
    return digest.hexdigest()


NamedTensors = Iterable[tuple[str, Tensor]]


def frozen_fingerprint(
    model: nn.Module,
    gathered: Callable[[NamedTensors], NamedTensors] = lambda named: named,
) -> str:
    """A cheap fingerprint of the frozen parameters: names, dtypes, shapes, mixed bits.

    It sees every change of a bit, and elements that have changed places. The bits are
    added as integers where they lie, on a GPU too: in any order the sum is the same, and
    so is the fingerprint on any number of threads.

    Args:
        gathered: makes of parameters those that are whole.
    """
    digest = hashlib.sha256()
    frozen = ((n, p) for n, p in model.named_parameters() if not p.requires_grad)
    for name, parameter in gathered(frozen):
        shape = tuple(parameter.shape)
        digest.update(f"{name} {parameter.dtype} {shape};".encode())
        for total in _mixed_sums(parameter.detach().reshape(-1)):
            digest.update(total.to_bytes(8, "little", signed=True))
    return digest.hexdigest()


# Odd, so that no bit is lost: MurmurHash3's, and for places the golden ratio's, as signed
# 64-bit integers.
_MIXERS = (-0xAE502812AA7333, -0x3B314601E57A13AD)
_PLACE = -0x61C8864680B583EB


def _mixed_sums(flat: Tensor) -> Iterator[int]:
    """Sums of a flat tensor's 64-bit words, block by block, modulo 2^64.

    Each word is mixed with its place in the block first: a plain sum would not see words
    that are swapped, nor a sign that two of them change.
    """
    stored = flat.new_zeros(BLOCK_ELEMENTS)
    words = stored.view(torch.int64)
    places = torch.arange(1, len(words) + 1, device=flat.device) * _PLACE
    for piece in flat.split(len(stored)):
        if len(piece) < len(stored):
            stored.zero_()
        stored[: len(piece)] = piece
        mixed = (words ^ places).mul_(_MIXERS[0])
        mixed ^= mixed >> 32
        yield int(mixed.mul_(_MIXERS[1]).sum())


@contextmanager
def preserved(
    tensors: Iterable[Tensor], device: torch.device | None = None
) -> Iterator[list[Tensor]]:
    """Restore every bit of these tensors at exit, however the context ends.

    Args:
        tensors: changed in place within the context.
        device: where the copies are kept; None for each tensor's own device.

    Yields:
        The copies, in the order given.
    """
    tensors = list(tensors)
    copies = [t.detach().to(device or t.device, copy=True) for t in tensors]
    try:
        yield copies
    finally:
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies):
                tensor.copy_(copy)


@contextmanager
def shifted(
    parameters: Mapping[str, nn.Parameter],
    direction: Mapping[str, Tensor],
    eta: float,
    device: torch.device | None = None,
) -> Iterator[None]:
    """Within the context, the parameters are theta + eta v; then theta, bit for bit.

    Args:
        parameters: the parameters to move, by name.
        direction: v by the same names; moved to each parameter's dtype and device.
        device: where copies are kept; None for each parameter's own device.
    """
    with preserved(parameters.values(), device):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(direction[name].to(parameter), alpha=eta)
        yield


def add_gradients(
    total: Tensor, parameters: Iterable[nn.Parameter], runs_hooks: bool = True
) -> None:
    """Add the gradient of a scalar to the parameters' `.grad`."""
    if runs_hooks:
        total.backward()
        return
    held = list(parameters)
    gradients = torch.autograd.grad(total, held, allow_unused=True)
    for parameter, gradient in zip(held, gradients):
        if gradient is not None:
            before = parameter.grad
            parameter.grad = gradient if before is None else before + gradient


def global_norm(tensor: Tensor) -> float:
    """Euclidean norm of all elements, accumulated in float64."""
    return math.sqrt(inner_product(tensor, tensor))


@torch.no_grad()
def inner_product(left: Tensor, right: Tensor, block: int = BLOCK_ELEMENTS) -> float:
    """Inner product of all elements of two tensors, accumulated in float64.

    Its bits depend on the values, their number and the block only: a run that goes on
    must find the norm that it had clipped by. BLAS and vectorised sums add in an order
    that depends on where a buffer lies in memory, on the instruction set and on the
    number of threads; here arrays are added element by element. Products go into the
    sums of a block, side by side, which are then folded in halves.

    Args:
        left, right: of as many elements.
        block: number of those sums, a power of two.
    """
    left, right = left.reshape(-1), right.reshape(-1)
    if len(left) != len(right):
        raise ValueError(f"buffers of {len(left)} and {len(right)} elements")
    width = min(block, 1 << max(len(left) - 1, 0).bit_length())
    sums, products = left.new_zeros((2, width), dtype=torch.float64)
    for a, b in zip(left.split(width), right.split(width)):
        here = products[: len(a)]
        # A product of its own: fused with the addition it would not be rounded.
        torch.mul(a.double(), b.double(), out=here)
        sums[: len(a)] += here
    while len(sums) > 1:
        low, high = sums.chunk(2)
        sums = low.add_(high)
    return float(sums)


def has_dropout(model: nn.Module) -> bool:
    """Whether passes in training mode are not those of the policy."""
    for module in model.modules():
        # A dropout layer keeps its probability as `p`, others under the name.
        is_layer = "drop" in type(module).__name__.lower()
        for name, value in vars(module).items():
            is_probability = "drop" in name or (is_layer and name == "p")
            if is_probability and isinstance(value, float) and value > 0:
                return True
    return False


def differentiate_padding_tokens(model: nn.Module) -> None:
    """Give the padding token of every embedding its gradient, as any other token.

    Nothing is padded with it here: where it stands, it is part of a prompt or was
    sampled. torch leaves its row out of the gradient, but not out of derivatives in
    forward mode; and a checkpoint's configuration names a padding token, as trainers
    add it, also where the model that they trained was made without.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
