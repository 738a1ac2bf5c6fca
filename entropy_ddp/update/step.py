"""Exactly one optimizer step (or a change given in its place), its size, and the way back.

The parameters are moved for the duration of a context and restored bit for bit at its
end, together with the optimizer state, whatever happened in between.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_ddp.config import Update
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.model.parameters import ParameterLayout, inner_product, preserved

Totals = Callable[[Iterable[float]], list[float]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step that was taken, or a change that was given in its place.

    Attributes:
        delta: change of the parameters, theta_after - theta_before, flat, [P].
        learning_rate: learning rate eta of the first param group; of a given change
            `update.lr_override`, or else 1.
        grad_norm: global norm of the gradient before clipping; None of a given change.
        clip_coef: factor that clipping applied to the gradient, 1 if none; None of a
            given change.
        num_optimizer_steps: number of `optimizer.step()` calls, counted by a hook.
        totals: makes of sums over this rank's part of delta those over all of it.
    """

    delta: Tensor
    learning_rate: float
    grad_norm: float | None
    clip_coef: float | None
    num_optimizer_steps: int
    totals: Totals = list

    def direction(
        self, parameters: Mapping[str, torch.nn.Parameter]
    ) -> dict[str, Tensor]:
        """v = delta / eta by name, in each parameter's dtype and on its device.

        Made anew at every call, for the time of one pass.
        """
        views = ParameterLayout.of(parameters).views(self.delta)
        return {
            name: (view / self.learning_rate).to(parameters[name])
            for name, view in views.items()
        }

    @property
    def direction_norm(self) -> float:
        """Euclidean norm of v."""
        return self.norm / self.learning_rate

    @property
    def norm(self) -> float:
        """Euclidean norm of delta."""
        return _norm(self.delta, self.totals)

    @property
    def is_zero(self) -> bool:
        """Whether no parameter has changed."""
        return not self.totals([float(self.delta.any())])[0]

    def top_parameters(
        self, layout: ParameterLayout, count: int
    ) -> list[tuple[str, float]]:
        """The parameters that moved most: names and Euclidean norms."""
        views = layout.views(self.delta)
        squares = self.totals([inner_product(v, v) for v in views.values()])
        norms = [(name, math.sqrt(square)) for name, square in zip(views, squares)]
        return sorted(norms, key=lambda pair: -pair[1])[:count]


def learning_rate_of(group: Mapping[str, Any], update: Update) -> float:
    """The learning rate of a param group in the probed step: saved or overridden."""
    return update.lr_override or float(group["lr"])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """Every tensor of the optimizer state with a name, in a fixed order."""
    return [
        (f"{group_number}.{number}.{key}", optimizer.state[parameter][key])
        for group_number, group in enumerate(optimizer.param_groups)
        for number, parameter in enumerate(group["params"])
        for key in sorted(optimizer.state[parameter])
    ]


@contextmanager
def one_step(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    gradient: Tensor,
    update: Update,
    snapshot_device: torch.device | None = None,
    rate_scale: float = 1.0,
    totals: Totals = list,
) -> Iterator[Step]:
    """Within the context, the parameters are those after one optimizer step.

    Args:
        optimizer: AdamW in its saved state.
        gradient: gradient of the loss, summed over ranks, flat, [P].
        update: norm clipping and learning rate.
        snapshot_device: where copies are kept; None for the tensors' own.
        rate_scale: factor on every group's learning rate.
        totals: makes of sums over this rank's parts of the parameters those over all.

    Raises:
        InputError: the learning rate is 0.
        RunError: the gradient is not finite, or not exactly one step was taken.
    """
    layout = ParameterLayout.of(parameters)
    grad_norm = _norm(gradient, totals)
    if not math.isfinite(grad_norm):
        raise RunError(
            f"the gradient of the loss has norm {grad_norm}, expected a finite one; are "
            "the advantages of U right?"
        )
    saved_rates = [group["lr"] for group in optimizer.param_groups]
    rates = [
        rate_scale * learning_rate_of(group, update) for group in optimizer.param_groups
    ]
    if not rates[0]:
        raise InputError(
            "the saved learning rate is 0 (a warm-up's first step?); set "
            "update.lr_override to probe a step of another size"
        )
    state = [tensor for _, tensor in optimizer_tensors(optimizer)]
    tensors = [*parameters.values(), *state]
    with preserved(tensors, snapshot_device) as copies:
        before = dict(zip(parameters, copies))
        try:
            for name, view in layout.views(gradient).items():
                # A copy: clipping works in place, and the buffer is used again.
                parameters[name].grad = view.to(parameters[name], copy=True)
            clip_coef = clip_coefficient(update.max_grad_norm, grad_norm)
            for parameter in parameters.values():
                assert parameter.grad is not None
                parameter.grad.mul_(clip_coef)
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate
            steps = _step_and_count(optimizer)
            # Not to be held while the context's body runs.
            _drop_gradients(parameters)
            yield Step(
                delta=_difference(layout, parameters, before, gradient.dtype),
                learning_rate=float(rates[0]),
                grad_norm=grad_norm,
                clip_coef=clip_coef,
                num_optimizer_steps=steps,
                totals=totals,
            )
        finally:
            _drop_gradients(parameters)
            for group, rate in zip(optimizer.param_groups, saved_rates):
                group["lr"] = rate


@contextmanager
def given_change(
    parameters: dict[str, torch.nn.Parameter],
    change: Tensor,
    update: Update,
    snapshot_device: torch.device | None = None,
    totals: Totals = list,
) -> Iterator[Step]:
    """Within the context, the parameters are theta + Delta theta, which is given.

    The step's delta is the difference in the parameters' own precision, as of a step
    that was taken: what is below the rounding of the weights is not in it.

    Args:
        change: Delta theta, flat, [P].
        update: its learning rate, if any.
        snapshot_device: where copies are kept; None for the tensors' own.
        totals: see `one_step`.

    Raises:
        RunError: the parameters are not finite after the change.
    """
    layout = ParameterLayout.of(parameters)
    with preserved(parameters.values(), snapshot_device) as copies:
        with torch.no_grad():
            for name, view in layout.views(change).items():
                parameters[name].add_(view.to(parameters[name]))
        yield Step(
            delta=_difference(
                layout, parameters, dict(zip(parameters, copies)), change.dtype
            ),
            learning_rate=update.lr_override or 1.0,
            grad_norm=None,
            clip_coef=None,
            num_optimizer_steps=0,
            totals=totals,
        )


def _norm(vector: Tensor, totals: Totals) -> float:
    return math.sqrt(totals([inner_product(vector, vector)])[0])


def clip_coefficient(max_norm: float | None, norm: float) -> float:
    """What torch's clip_grad_norm_ multiplies a gradient of this norm by."""
    if not max_norm:
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))


def _drop_gradients(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.grad = None


def _step_and_count(optimizer: torch.optim.Optimizer) -> int:
    calls: list[int] = []
    handle = optimizer.register_step_post_hook(lambda *_: calls.append(1))
    try:
        optimizer.step()
    finally:
        handle.remove()
    if len(calls) != 1:
        raise RunError(f"expected one optimizer step, counted {len(calls)}")
    return len(calls)


def _difference(
    layout: ParameterLayout,
    parameters: dict[str, torch.nn.Parameter],
    before: dict[str, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    # Never narrower than float32: a step is small against the range of float16.
    delta = torch.empty(layout.numel, dtype=torch.promote_types(dtype, torch.float32))
    for name, view in layout.views(delta).items():
        after = parameters[name].detach().cpu()
        # Subtracted in the parameter's own precision, and rounded once.
        wide = torch.promote_types(after.dtype, torch.float32)
        view.copy_(after.to(wide) - before[name].cpu().to(wide))
    if not bool(delta.isfinite().all()):
        raise RunError("the optimizer step has NaN or infinite components")
    return delta
