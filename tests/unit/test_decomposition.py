"""Do AdamW's parts sum to the step that torch takes, whatever its settings?"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from entropy_ddp.config import Update
from entropy_ddp.errors import InputError
from entropy_ddp.model.parameters import ParameterLayout, fingerprint
from entropy_ddp.update.decomposition import (
    gradient_gain,
    preconditioner,
    step_parts,
)
from entropy_ddp.update.step import Step, one_step, optimizer_tensors

RTOL = 1e-12  # float64, of the norm of the step
DOUBLE = torch.float64
SHAPES = {"weight": (3, 4), "matrix": (2, 5), "bias": (4,)}
SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AMSGrad": {"amsgrad": True},
    "ascent": {"maximize": True},
    "coupled decay": {"decoupled_weight_decay": False},
    "coupled ascent with AMSGrad": {
        "decoupled_weight_decay": False,
        "maximize": True,
        "amsgrad": True,
    },
    "no momentum": {"betas": (0.0, 0.99)},
    "large eps": {"eps": 0.3},
}
UPDATES = {
    "clipped": Update(max_grad_norm=0.1),
    "not clipped": Update(max_grad_norm=0.0),
    "other rate": Update(max_grad_norm=0.1, lr_override=0.02),
}


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A warm optimizer of two param groups, and a gradient to step with."""

    optimizer: torch.optim.Adam
    parameters: dict[str, nn.Parameter]
    gradient: Tensor

    @property
    def layout(self) -> ParameterLayout:
        return ParameterLayout.of(self.parameters)

    @contextmanager
    def stepped(self, update: Update) -> Iterator[Step]:
        with one_step(self.optimizer, self.parameters, self.gradient, update) as step:
            yield step

    def fingerprint(self) -> str:
        state = optimizer_tensors(self.optimizer)
        return fingerprint([*self.parameters.items(), *state])


def make_taken(settings: dict[str, Any]) -> Taken:
    """Groups of other rates, betas and decay; the state is that of four steps.

    The gradients become smaller, so that the maximum that AMSGrad keeps is not the
    last second moment.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=DOUBLE)

    parameters = {n: nn.Parameter(noise(1.0, *shape)) for n, shape in SHAPES.items()}
    groups = [
        {"params": [parameters["weight"], parameters["bias"]], "weight_decay": 0.1},
        {"params": [parameters["matrix"]], "lr": 3e-3, "weight_decay": 0.0},
    ]
    options = {"lr": 1e-2, "betas": (0.8, 0.9), "decoupled_weight_decay": True}
    optimizer = torch.optim.Adam(groups, **options | settings)
    for scale in (3.0, 1.0, 0.3, 0.1):
        for parameter in parameters.values():
            parameter.grad = noise(scale, *parameter.shape)
        optimizer.step()
    for parameter in parameters.values():
        parameter.grad = None
    layout = ParameterLayout.of(parameters)
    return Taken(
        optimizer=optimizer, parameters=parameters, gradient=noise(0.2, layout.numel)
    )


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_parts_sum_to_the_step(settings: dict[str, Any], update: Update) -> None:
    taken = make_taken(settings)
    before = taken.fingerprint()
    with taken.stepped(update) as step:
        pass
    names = []
    deltas = taken.layout.views(step.delta)
    gradients = taken.layout.views(taken.gradient)
    for name, parts in step_parts(
        taken.optimizer, taken.parameters, taken.gradient, step, update
    ):
        names.append(name)
        total = parts.momentum + parts.decay - parts.gain * gradients[name]
        error = float((total - deltas[name]).norm())
        assert error <= RTOL * float(deltas[name].norm()), name
        assert bool(parts.momentum.any()) == (settings.get("betas") != (0.0, 0.99))
        assert bool(parts.decay.any()) == (name != "matrix")
        assert bool((parts.gain != 0).all())
    assert sorted(names) == sorted(SHAPES)
    assert taken.fingerprint() == before


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gain_is_flat_and_in_the_order_of_the_layout(settings: dict[str, Any]) -> None:
    """Param groups are in another order than the parameters; shares add up."""
    taken, update = make_taken(settings), UPDATES["clipped"]
    with taken.stepped(update) as step:
        pass
    arguments = (taken.optimizer, taken.parameters, taken.gradient, step, update)
    gain = gradient_gain(*arguments)
    assert gain.dtype == DOUBLE
    for name, parts in step_parts(*arguments):
        assert torch.equal(taken.layout.views(gain)[name], parts.gain)


def test_gain_is_the_slope_of_the_step_with_its_denominator_fixed() -> None:
    """With beta2 = 1 the denominator does not see the gradient: the step is linear."""
    taken = make_taken({})
    for group in taken.optimizer.param_groups:
        group["betas"] = (0.8, 1 - 1e-12)
    update = UPDATES["not clipped"]
    with taken.stepped(update) as step:
        first = step.delta
    gain = gradient_gain(
        taken.optimizer, taken.parameters, taken.gradient, step, update
    )
    shift = torch.linspace(-1, 1, len(gain), dtype=DOUBLE)
    other = Taken(
        optimizer=taken.optimizer,
        parameters=taken.parameters,
        gradient=taken.gradient + shift,
    )
    with other.stepped(update) as step:
        difference = step.delta - first
    torch.testing.assert_close(difference, -gain * shift, rtol=1e-6, atol=0.0)


def test_buffers_are_at_least_float32() -> None:
    """Float16 has no room for a rate over a root of a second moment."""
    taken, update = make_taken({}), UPDATES["clipped"]
    with taken.stepped(update) as step:
        pass
    half = taken.gradient.half()
    gain = gradient_gain(taken.optimizer, taken.parameters, half, step, update)
    diagonal = preconditioner(taken.optimizer, taken.parameters, torch.float16)
    assert gain.dtype == diagonal.dtype == torch.float32


@pytest.mark.parametrize("amsgrad", [False, True])
def test_preconditioner_is_that_of_the_last_step(amsgrad: bool) -> None:
    """1 / (sqrt(v / (1 - beta2^4)) + eps), v the saved moment or its maximum."""
    taken = make_taken({"amsgrad": amsgrad, "eps": 1e-3})
    found = taken.layout.views(
        preconditioner(taken.optimizer, taken.parameters, DOUBLE)
    )
    for name, parameter in taken.parameters.items():
        state = taken.optimizer.state[parameter]
        moment = state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
        expected = 1 / ((moment / (1 - 0.9**4)).sqrt() + 1e-3)
        torch.testing.assert_close(found[name], expected, rtol=1e-13, atol=0.0)
        if amsgrad:
            assert bool((moment > state["exp_avg_sq"]).any())


def test_no_preconditioner_before_the_first_step() -> None:
    taken = make_taken({})
    taken.optimizer.state[taken.parameters["bias"]]["step"].zero_()
    with pytest.raises(InputError, match="bias: expected at least 1 step, found 0"):
        preconditioner(taken.optimizer, taken.parameters, DOUBLE)
