"""Standard errors and intervals of functions of totals over how E was drawn.

The independent units are prompt draws (groups); responses of one group are not. Every
estimator here is a smooth function f(S) of totals S = sum_g s_g over n units. With the
influence psi_i = <df/dS, s_i> of a sequence, psi_g their sum over a unit, and f_(g) the
estimate without unit g (totals of the others times n / (n - 1)),

    delta method   SE^2 = n/(n-1) sum_g (psi_g - mean psi)^2
    jackknife      SE^2 = (n-1)/n sum_g (f_(g) - mean f_(.))^2
    interval       f -+ t_{.975}(n - 1) SE_jackknife

Both are biased of order 1/n: the delta method tends to be too small, the more so the
heavier the tails, the jackknife slightly too large (Efron and Stein 1981). Intervals use
the jackknife.

Where the prompts are a known finite set, of which a fraction F was drawn without
replacement, each with G_g responses, E is a two-stage sample (Cochran 1977, ch. 10),

    SE^2 = (1 - F) n/(n-1) sum_g (psi_g - mean psi)^2
           + F sum_g G_g/(G_g - 1) sum_{i in g} (psi_i - psi_g / G_g)^2

the first sum being what other prompts would change, the second what other responses to
the same prompts would; the jackknife leaves out units in the first and, in the second,
single responses, the others of the unit times G_g / (G_g - 1). With fewer than two units
there is no estimate, and asking for one is an error.

Shape legend: N sequences, n units, m columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from entropy_ddp.data.batch import Batch
from entropy_ddp.data.draws import known_set_size, units
from entropy_ddp.errors import InputError
from entropy_ddp.estimators.quantiles import two_sided


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How the sequences of E were drawn.

    Attributes:
        groups: number of the independent unit of each sequence, from 0, [N]: its group.
            Where prompts are known, its prompt.
        num_prompts_total: size of the known set of prompts that the units were drawn
            from without replacement, with two responses or more to each; None where
            prompts are independent draws, or there is one response to some of them.
    """

    groups: Tensor
    num_prompts_total: int | None = None

    @classmethod
    def of(cls, batch: Batch) -> "Draws":
        """How a batch E was drawn, as its rows say; groups by themselves if they do not."""
        return cls(groups=units(batch), num_prompts_total=known_set_size(batch))

    @cached_property
    def num_units(self) -> int:
        """Number of independent units n."""
        return count_groups(self.groups)

    @cached_property
    def fraction(self) -> float:
        """Share F of a known set of prompts that was drawn; 0 of independent draws."""
        total = self.num_prompts_total
        return 0.0 if total is None else self.num_units / total

    def totals(self, values: Tensor) -> Tensor:
        """Sums of per-sequence values [N, ...] over each unit, [n, ...]."""
        total = values.new_zeros(self.num_units, *values.shape[1:])
        return total.index_add_(0, self.groups, values)

    def variance_within(self, values: Tensor) -> float:
        """sum_g G_g/(G_g - 1) sum_i (x_i - mean_g x)^2 of per-sequence values [N]."""
        sizes = torch.bincount(self.groups, minlength=self.num_units).to(values)
        centred = values - (self.totals(values) / sizes)[self.groups]
        factors = sizes / (sizes - 1).clamp(min=1)
        return float((factors[self.groups] * centred.square()).sum())


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A function of totals over E, with what its errors are made of.

    Attributes:
        value: the function of the whole batch's totals.
        influence: psi_i of each sequence, [N].
        without: the estimate without each unit, [n].
        without_response: the estimate without each sequence, the others of its unit
            taking its place, [N]; None where only whole units vary.
        draws: how E was drawn.
    """

    value: float
    influence: Tensor
    without: Tensor
    without_response: Tensor | None
    draws: Draws

    @classmethod
    def of(
        cls, function: Callable[[Tensor], Tensor], columns: Tensor, draws: Draws
    ) -> "Estimate":
        """The estimate from per-sequence columns, in closed form.

        Args:
            function: of totals [..., m], one value each [...]; differentiable.
            columns: what is summed, float64, [N, m].

        Raises:
            InputError: there are fewer than two units.
        """
        # Sums of m numbers, wherever the caller is.
        with torch.enable_grad():
            total = columns.sum(0).requires_grad_()
            value = function(total)
            (slope,) = torch.autograd.grad(value, total)
        total = total.detach()
        num_units = at_least_two(draws.num_units)
        own = draws.totals(columns)
        rest = (total - own) * (num_units / (num_units - 1))
        without_response = None
        if draws.num_prompts_total is not None:
            sizes = torch.bincount(draws.groups, minlength=num_units).to(columns)
            factor = (sizes / (sizes - 1).clamp(min=1))[draws.groups, None]
            unit = own[draws.groups]
            without_response = function(total - unit + factor * (unit - columns))
        return cls(
            value=float(value.detach()),
            influence=columns @ slope,
            without=function(rest),
            without_response=without_response,
            draws=draws,
        )

    def plus(self, other: "Estimate", factor: float = 1.0) -> "Estimate":
        """This and a multiple of another estimate on the same E: their errors pair."""
        responses = None
        if self.without_response is not None and other.without_response is not None:
            responses = self.without_response + factor * other.without_response
        return Estimate(
            value=self.value + factor * other.value,
            influence=self.influence + factor * other.influence,
            without=self.without + factor * other.without,
            without_response=responses,
            draws=self.draws,
        )

    def minus(self, other: "Estimate", factor: float = 1.0) -> "Estimate":
        """This less a multiple of another estimate on the same E."""
        return self.plus(other, -factor)

    def over(self, other: "Estimate") -> "Estimate":
        """The ratio of this to another estimate on the same E, which is not 0."""
        ratio = self.value / other.value
        responses = None
        if self.without_response is not None and other.without_response is not None:
            responses = self.without_response / other.without_response
        return Estimate(
            value=ratio,
            influence=(self.influence - ratio * other.influence) / other.value,
            without=self.without / other.without,
            without_response=responses,
            draws=self.draws,
        )

    def scaled(self, factor: float) -> "Estimate":
        """A multiple of this estimate."""
        responses = self.without_response
        return Estimate(
            value=factor * self.value,
            influence=factor * self.influence,
            without=factor * self.without,
            without_response=None if responses is None else factor * responses,
            draws=self.draws,
        )

    @cached_property
    def group_influence(self) -> Tensor:
        """psi_g of each unit, [n]."""
        return self.draws.totals(self.influence)

    @cached_property
    def se(self) -> float:
        """Standard error by the delta method."""
        variance = delta_method_error(self.group_influence) ** 2
        fraction = self.draws.fraction
        if fraction:
            within = self.draws.variance_within(self.influence)
            variance = (1 - fraction) * variance + fraction * within
        return math.sqrt(variance)

    @cached_property
    def se_jackknife(self) -> float:
        """Standard error by leaving units (and responses) out."""
        variance = jackknife_error(self.without) ** 2
        fraction = self.draws.fraction
        if fraction and self.without_response is not None:
            sizes = torch.bincount(self.draws.groups).to(self.without)
            # A response's place is taken by others: (G-1)/G of squared changes, which
            # are G/(G-1) times as large as the influences.
            smaller = self.without_response * ((sizes - 1) / sizes)[self.draws.groups]
            within = self.draws.variance_within(smaller)
            variance = (1 - fraction) * variance + fraction * within
        return math.sqrt(variance)

    def interval(self, noise: float = 0.0) -> list[float]:
        """The 95 % interval [low, high], by the jackknife and Student's t.

        Args:
            noise: a further error of the value, such as that of rounding.
        """
        error = math.hypot(self.se_jackknife, noise)
        half = two_sided(self.draws.num_units - 1) * error
        return [self.value - half, self.value + half]

    @cached_property
    def effective_degrees_of_freedom(self) -> float:
        """min(n - 1, 2n / (kurtosis - 1)): how many units tell the error's size.

        The variance of a sample variance of n values is about (kurtosis - 1) / n of its
        square (Satterthwaite 1946). Where all influences are 0, n - 1.
        """
        centred = self.group_influence - self.group_influence.mean()
        square = float(centred.square().mean())
        count = len(centred)
        if not square:
            return count - 1.0
        kurtosis = float(centred.pow(4).mean()) / square**2
        return min(count - 1.0, 2 * count / max(kurtosis - 1, 1e-12))

    @cached_property
    def largest_share(self) -> tuple[float, int]:
        """Largest psi_i^2 / sum psi_i^2 of a sequence, and its number; 0 without any."""
        squares = self.influence.square()
        total = float(squares.sum())
        if not total:
            return 0.0, 0
        place = int(squares.argmax())
        return float(squares[place]) / total, place


def count_groups(groups: Tensor) -> int:
    """Number of groups, from the group of each sequence [N]; 0 of an empty batch."""
    return int(groups.max()) + 1 if len(groups) else 0


def group_totals(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Sum of per-sequence values [N] within each group, [n]."""
    return values.new_zeros(num_groups).index_add_(0, groups, values)


def delta_method_error(influence: Tensor) -> float:
    """Standard error from the influence psi_g of each group, [n].

    Raises:
        InputError: there are fewer than two groups.
    """
    num_groups = at_least_two(len(influence))
    centred = influence - influence.mean()
    return math.sqrt(num_groups / (num_groups - 1) * float(centred.square().sum()))


def jackknife_error(leave_one_out: Tensor) -> float:
    """Standard error from the estimates without each group, [n].

    Raises:
        InputError: there are fewer than two groups.
    """
    num_groups = at_least_two(len(leave_one_out))
    centred = leave_one_out - leave_one_out.mean()
    return math.sqrt((num_groups - 1) / num_groups * float(centred.square().sum()))


def at_least_two(num_units: int) -> int:
    """The same number.

    Raises:
        InputError: there are fewer than two units.
    """
    if num_units < 2:
        raise InputError(
            f"a standard error needs at least 2 groups in E, found {num_units}"
        )
    return num_units


def relative_difference(value: float, reference: float, scale: float) -> float:
    """|value - reference| / scale; without a scale, the difference itself."""
    difference = abs(value - reference)
    return difference / scale if scale else difference


def effective_sample_size(log_weights: Tensor) -> float:
    """(sum w)^2 / sum w^2 of weights given by their logarithms, [n].

    Between 1 and n; n when all weights are equal.
    """
    twice = torch.logsumexp(2 * log_weights, 0)
    size = float((2 * torch.logsumexp(log_weights, 0) - twice).exp())
    return min(size, float(len(log_weights)))
