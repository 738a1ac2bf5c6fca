"""What AdamW makes of a gradient: its step as a sum of parts, and its preconditioner.

With m, s the saved moments (first and second) after t steps, g the gradient of the loss,
k the clip coefficient and everything below element by element,

    s_new = beta2 s + (1 - beta2) (k g)^2        denom = sqrt(s_new / bc2) + eps
    bc1 = 1 - beta1^(t+1),  bc2 = 1 - beta2^(t+1)

    delta theta = - eta beta1 m / (bc1 denom)                       momentum
                  - eta weight_decay theta                          decay
                  - eta (1 - beta1) k g / (bc1 denom)               gradient

The parts share the denominator of the full gradient. With it and k held fixed the last
one is linear in g, so that a share g_u of the gradient has the share -gain g_u of the
step, gain = eta (1 - beta1) k / (bc1 denom). What a change of g does to denom and k is
not in the shares; they nevertheless sum to the step exactly.

With `amsgrad`, s_new is the larger of itself and the saved maximum. Adam's coupled decay
adds weight_decay theta to k g before both moments; its part of the step is then
-eta (1 - beta1) weight_decay theta / (bc1 denom).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entropy_ddp.config import Update
from entropy_ddp.errors import InputError
from entropy_ddp.model.parameters import ParameterLayout
from entropy_ddp.update.step import Step, learning_rate_of


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """The step of one parameter; float64 on its device, each of its shape.

    delta theta = momentum + decay - gain g, with g the gradient before clipping.

    Attributes:
        momentum: part due to the saved first moment.
        decay: part due to weight decay.
        gain: by what an element of the gradient is multiplied.
    """

    momentum: Tensor
    decay: Tensor
    gain: Tensor

    def change(self, gradient: Tensor) -> Tensor:
        """delta theta of this parameter, from its gradient before clipping."""
        return self.momentum + self.decay - self.gain * gradient.to(self.gain)


@dataclass(frozen=True, kw_only=True)
class AdamState:
    """What `step_parts` needs of a trainer's optimizer, read in place.

    Parameters without state (before the first step) have moments of zero, and parameters
    without gradient take no step.

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
                state[parameter] = optimizer.state.get(parameter)
                if not state[parameter]:
                    zero = torch.zeros_like(parameter)
                    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
                    state[parameter] = {"step": 0.0, **dict.fromkeys(names, zero)}
        return cls(param_groups=groups, state=state)


def step_parts(
    optimizer: torch.optim.Adam | AdamState,
    parameters: Mapping[str, nn.Parameter],
    gradient: Tensor,
    step: Step,
    update: Update,
) -> Iterator[tuple[str, StepParts]]:
    """The parts of the step, one parameter at a time: no second buffer of all of them.

    Args:
        optimizer: AdamW (or Adam) in its saved state, the step undone.
        parameters: the trainable parameters by name, at theta.
        gradient: gradient of the loss before clipping, summed over ranks, flat, [P].

    Yields:
        Each parameter's name and parts, in the optimizer's order.
    """
    assert step.clip_coef is not None
    gradients = ParameterLayout.of(parameters).views(gradient)
    for name, group, state in _entries(optimizer, parameters):
        rate = learning_rate_of(group, update)
        theta = parameters[name].detach().double()
        clipped = step.clip_coef * gradients[name].to(theta)
        gain, momentum, decay = _parts(theta, clipped, state, group | {"lr": rate})
        # From the clipped gradient to the one before clipping.
        gain *= step.clip_coef
        yield name, StepParts(momentum=momentum, decay=decay, gain=gain)


def _parts(
    theta: Tensor, gradient: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """(gain of the clipped gradient, momentum, decay) of one parameter."""
    beta1, beta2 = map(float, group["betas"])
    rate, weight_decay = group["lr"], group["weight_decay"]
    # Bias corrections are of the step to come.
    step = float(state["step"]) + 1
    decoupled = group.get("decoupled_weight_decay", True)
    # Adam adds the decay to the gradient, AdamW to the step.
    added = torch.zeros_like(theta) if decoupled else weight_decay * theta
    # `maximize` turns the gradient round, and so its gain.
    sign = -1.0 if group.get("maximize") else 1.0
    moment = beta2 * state["exp_avg_sq"].to(theta)
    # s_new, with the gradient of this step in it.
    moment += (1 - beta2) * (sign * gradient + added).square()
    if group.get("amsgrad"):
        moment = torch.maximum(moment, state["max_exp_avg_sq"].to(theta))
    # eta / (bc1 denom): by it a unit of the first moment moves theta.
    per_unit = (rate / (1 - beta1**step)) / (
        (moment / (1 - beta2**step)).sqrt() + group["eps"]
    )
    momentum = -per_unit * beta1 * state["exp_avg"].to(theta)
    fresh = (1 - beta1) * per_unit
    # Coupled decay goes through both moments, like a gradient.
    decay = -rate * weight_decay * theta if decoupled else -fresh * added
    return sign * fresh, momentum, decay


def gradient_gain(
    optimizer: torch.optim.Adam | AdamState,
    parameters: Mapping[str, nn.Parameter],
    gradient: Tensor,
    step: Step,
    update: Update,
) -> Tensor:
    """By what the step multiplies each element of the gradient, but for the sign; [P].

    A share g_u of the gradient has the share -gain g_u of the step; dimension: eta over
    the root of the second moment. The arguments are those of `step_parts`.

    Returns:
        A flat CPU buffer of the gradient's dtype, or float32 if that is narrower.
    """
    layout = ParameterLayout.of(parameters)
    gain = torch.empty(layout.numel, dtype=_at_least_float32(gradient.dtype))
    views = layout.views(gain)
    for name, parts in step_parts(optimizer, parameters, gradient, step, update):
        views[name].copy_(parts.gain)
    return gain


def preconditioner(
    optimizer: torch.optim.Adam,
    parameters: Mapping[str, nn.Parameter],
    dtype: torch.dtype,
) -> Tensor:
    """P = 1 / (sqrt(s / (1 - beta2^t)) + eps) of the saved second moment s; flat, [P].

    With `amsgrad` s is the saved maximum. Nothing of the step to come is in it.

    Args:
        optimizer: AdamW (or Adam) in its saved state.
        dtype: dtype of the buffer; float32 if that is wider.

    Returns:
        The diagonal as a flat CPU buffer.

    Raises:
        InputError: a parameter's saved step count is 0: there is no moment yet.
    """
    layout = ParameterLayout.of(parameters)
    diagonal = torch.empty(layout.numel, dtype=_at_least_float32(dtype))
    views = layout.views(diagonal)
    for name, group, state in _entries(optimizer, parameters):
        step = float(state["step"])
        if step < 1:
            raise InputError(
                f"optimizer state of {name}: expected at least 1 step, found {step:g}; "
                "a preconditioned direction needs a second moment; use "
                "gradient_dot.direction: step"
            )
        key = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
        moment = state[key].double() / (1 - float(group["betas"][1]) ** step)
        views[name].copy_(1 / (moment.sqrt() + group["eps"]))
    return diagonal


def _entries(
    optimizer: torch.optim.Adam | AdamState, parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, param group, state) of every parameter of the optimizer."""
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield name_of[id(parameter)], group, optimizer.state[parameter]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
