"""The trainer's optimizer: what its next step will be, read and not touched.

The state is read in place. Parameters without state (before the first step) have moments
of zero, and parameters without gradient take no step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entropy_ddp.model.parameters import ParameterLayout
from entropy_ddp.update.decomposition import StepParts


@dataclass(frozen=True, kw_only=True)
class AdamState:
    """What `update.decomposition` needs of an optimizer.

    Attributes:
        param_groups: the optimizer's groups, with the parameters that will move.
        state: moments and step count of these parameters.
    """

    param_groups: list[dict[str, Any]]
    state: dict[nn.Parameter, dict[str, Any]]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> "AdamState":
        """The state before the step that the gradients are there for."""
        groups, state = [], {}
        for group in optimizer.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            groups.append(group | {"params": moving})
            for parameter in moving:
                # Not optimizer.state[parameter], which would make an entry.
                saved = optimizer.state.get(parameter)
                state[parameter] = saved or _fresh(parameter)
        return cls(param_groups=groups, state=state)


def _fresh(parameter: nn.Parameter) -> dict[str, Any]:
    zero = torch.zeros_like(parameter)
    moments = dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), zero)
    return {"step": 0.0, **moments}


def gradient_of(parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> Tensor:
    """The gradients as one flat CPU buffer, zero where there is none, [P]."""
    layout = ParameterLayout.of(parameters)
    flat = torch.zeros(layout.numel, dtype=dtype)
    for name, view in layout.views(flat).items():
        gradient = parameters[name].grad
        if gradient is not None:
            view.copy_(gradient)
    return flat


def change_of(parts: StepParts, gradient: Tensor) -> Tensor:
    """momentum + decay - gain g of one parameter, float64, of its shape."""
    return parts.momentum + parts.decay - parts.gain * gradient.to(parts.gain)
