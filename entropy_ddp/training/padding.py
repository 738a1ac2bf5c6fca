"""The derivative by an embedding as a trainer takes it where a padding token was sampled.

torch leaves the row of an embedding's `padding_idx` out of the gradient of the lookup,
also where the token stands inside a response and is no padding; the tied output layer
still adds to that row. So the trainer's step is along another vector than the derivative
of its loss, and attribution to tokens must follow it: within `lookups_cut`, the lookup of
that token has no tangent.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def padding_rows(model: nn.Module) -> dict[nn.Embedding, int]:
    """The embeddings that have a padding index, and which."""
    return {
        module: module.padding_idx
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
    }


@contextmanager
def lookups_cut(rows: Mapping[nn.Embedding, int]) -> Iterator[None]:
    """Within the context, looking these rows up carries no tangent in forward mode.

    Args:
        rows: embeddings with the row that is cut.
    """

    def cut(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Any:
        primal, tangent = forward_ad.unpack_dual(output)
        if tangent is None:
            return output
        padded = (args[0] == rows[module])[..., None]
        # Not masked_fill on the dual: its rule would keep the tangent.
        return forward_ad.make_dual(primal, torch.where(padded, 0.0, tangent))

    handles = [module.register_forward_hook(cut) for module in rows]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
