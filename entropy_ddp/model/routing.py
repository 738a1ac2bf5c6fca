"""Which experts a mixture model sends each token to.

A step that sends a token to other experts makes the truth jump where a derivative sees
nothing. The choices of both scoring passes over E are kept as one number for each token,
and compared.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# More than any model has.
MOST_EXPERTS = 4096


class Routing:
    """The experts of a model, by what they are called with."""

    def __init__(self, model: nn.Module) -> None:
        self._experts = [
            module
            for module in model.modules()
            if "top_k_index" in inspect.signature(module.forward).parameters
        ]

    def __bool__(self) -> bool:
        """Whether the model routes tokens at all."""
        return bool(self._experts)

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Within the context, forward passes leave their choices, one entry a layer."""
        choices: list[Tensor] = []

        def record(
            module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
        ) -> None:
            given = inspect.signature(module.forward).bind(*args, **options)
            choices.append(given.arguments["top_k_index"].detach())

        with ExitStack() as hooks:
            for module in self._experts:
                hook = module.register_forward_pre_hook(record, with_kwargs=True)
                hooks.enter_context(hook)
            yield choices


def fingerprints(choices: list[Tensor], places: Tensor) -> Tensor:
    """One number for each token's choices in all layers, int64, [m].

    The order of a layer's experts does not count: a sum of random numbers, one for
    each expert of each layer.

    Args:
        choices: chosen experts of every position, [positions, k] or [B, L, k], by layer.
        places: flat positions whose choices are wanted, [m].
    """
    total = torch.zeros(len(places), dtype=torch.int64)
    for layer, index in enumerate(choices):
        generator = torch.Generator().manual_seed(layer)
        keys = torch.randint(1 << 48, (MOST_EXPERTS,), generator=generator)
        # [m, k]
        chosen = index.reshape(-1, index.shape[-1])[places.to(index.device)].cpu()
        total += keys[chosen].sum(-1)
    return total
