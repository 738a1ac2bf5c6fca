"""What an evaluation batch can tell, and how large a better one would have to be.

With SE the (jackknife) standard error of a change from n units (prompt draws), and t_p
the quantile of Student's t with n - 1 degrees of freedom:

resolved: 0 is outside the 95 % interval, |change| > t_.975 SE.

smallest change: what an E of this size finds resolved with a probability of 80 %,
    (t_.975 + t_.8) SE, about 2.8 SE (Bloom 1995).

between prompts: with psi_i the influence of a response, psi_g the sum over its unit of
    G_g, the error of E has a part from which prompts were drawn and a part from which
    responses they got,

    P = n^2/(n-1) sum_g (psi_g - mean psi)^2                 of a unit, in all
    W = n sum_g G_g/(G_g-1) sum_{i in g} (psi_i - psi_g/G_g)^2   within it
    share = 1 - W / P

    (one-way analysis of variance; Cochran 1977, ch. 10). With ever more responses to the
    same number of prompts the error falls to sqrt(share) of what it is.

of another size: with m units in place of n,

    SE(m)^2 = P (1/m - share / N)

    where the prompts are a known set of N, drawn without replacement; else without
    the second term. P is found from the SE at n.

Shape legend: N sequences, n units.
"""

import math
from dataclasses import dataclass

import torch

from entropy_ddp.estimators.quantiles import student_quantile, two_sided
from entropy_ddp.estimators.standard_errors import Estimate, delta_method_error

POWER = 0.8
# More units than any batch has.
_MOST = 10**9


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The error of an estimate, as a function of how much is drawn.

    Attributes:
        se: standard error (jackknife).
        num_units: number of units n that gave it.
        responses: responses of a unit, on average.
        between: share of a unit's variance that lies between prompts, from 0 to 1; None
            where units have one response.
        set_size: size N of the known set of prompts that the units were drawn from
            without replacement; None for independent draws.
    """

    se: float
    num_units: int
    responses: float
    between: float | None = None
    set_size: int | None = None

    @property
    def unit_variance(self) -> float:
        """P: n times the squared error of n independent units."""
        left = _left(self.num_units, self.between, self.set_size)
        return self.se**2 / left if self.se else 0.0

    @property
    def half_width(self) -> float:
        """Of the 95 % interval."""
        return two_sided(self.num_units - 1) * self.se

    @property
    def smallest_change(self) -> float:
        """What is found resolved with a probability of 80 %."""
        degrees = self.num_units - 1
        return (two_sided(degrees) + student_quantile(POWER, degrees)) * self.se

    def resolves(self, change: float) -> bool:
        """Whether 0 is outside the 95 % interval around this change."""
        return abs(change) > self.half_width

    def of(
        self,
        num_units: int,
        *,
        responses: float | None = None,
        set_size: int | None = None,
    ) -> "Precision":
        """The error of another batch.

        Args:
            num_units: how many units it has.
            responses: how many responses each has; None for as many as here.
            set_size: size of the known set that they are drawn from; None for
                independent draws.

        Raises:
            ValueError: another number of responses where the share between prompts is
                not known, or more units than the set has.
        """
        variance, between = self.unit_variance, self.between
        if responses is not None and responses != self.responses:
            if between is None:
                raise ValueError("one response to a prompt does not tell of others")
            within = (1 - between) * self.responses / responses
            variance *= between + within
            between = between / (between + within) if between else 0.0
        if set_size is not None and num_units > set_size:
            raise ValueError(f"{num_units} of a set of {set_size}")
        return Precision(
            se=math.sqrt(variance * _left(num_units, between, set_size)),
            num_units=num_units,
            responses=self.responses if responses is None else responses,
            between=between,
            set_size=set_size,
        )

    def units_needed(
        self,
        half_width: float,
        *,
        responses: float | None = None,
        set_size: int | None = None,
    ) -> int | None:
        """Fewest units whose 95 % interval is no wider than this to either side.

        Returns:
            At least 2; None if no number of them is enough.
        """
        most = _MOST if set_size is None else set_size

        def is_enough(count: int) -> bool:
            other = self.of(count, responses=responses, set_size=set_size)
            return other.half_width <= half_width

        if most < 2 or not is_enough(most):
            return None
        # The interval narrows with every unit.
        low, high = 1, 2
        while not is_enough(high):
            low, high = high, min(2 * high, most)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(middle) else (middle, high)
        return high

    def responses_needed(self, half_width: float, set_size: int) -> int | None:
        """Fewest responses to each prompt of a known set, all of which are in E.

        Returns:
            At least 2; None where the share between prompts is not known, or the set
            has a single prompt.
        """
        if self.between is None or set_size < 2:
            return None
        with_two = self.of(set_size, responses=2, set_size=set_size)
        if not half_width:
            return None
        return max(2, math.ceil(2 * (with_two.half_width / half_width) ** 2))

    def error_of_units_needed(
        self, units: int, change_error: float, degrees: float, set_size: int | None
    ) -> float:
        """Standard error of `units_needed`, which an estimated error cannot tell exactly.

        The variance is known to sqrt(2 / degrees) of itself, and the square of the
        change that is to be resolved to twice its relative error.

        Args:
            units: the number.
            change_error: relative error of the half width that it was found for.
            degrees: effective degrees of freedom of the standard error.
        """
        left = 1.0
        if set_size is not None:
            left -= (self.between or 0.0) * units / set_size
        return units * left * math.hypot(math.sqrt(2 / degrees), 2 * change_error)


def _left(num_units: int, between: float | None, set_size: int | None) -> float:
    """1/n, less what a known set takes off."""
    known = 0.0 if set_size is None else (between or 0.0) / set_size
    return 1 / num_units - known


def best_responses(precision: Precision, prompt_cost: float) -> int | None:
    """Responses to each prompt for which the error is least at equal cost.

    sqrt(c w / b) with c the cost of a prompt in responses, b the variance between
    prompts and w that of a response within (Cochran 1977, 10.6).

    Args:
        prompt_cost: what a further prompt costs beside its responses, in responses.

    Returns:
        At least 1, of a known set 2; None where the shares are not known, or all
        variance is within.
    """
    between = precision.between
    if not between:
        return None
    within = (1 - between) * precision.responses
    least = 1 if precision.set_size is None else 2
    return max(least, round(math.sqrt(prompt_cost * within / between)))


@dataclass(frozen=True, kw_only=True)
class BetweenPrompts:
    """A share of a variance.

    Attributes:
        share: from 0 to 1.
        error: its standard error.
    """

    share: float
    error: float


def between_prompts(estimate: Estimate) -> BetweenPrompts | None:
    """Share of the variance of E's error that lies between prompts.

    A ratio: its bias is about -2/n of the share within. The standard error is that of a
    ratio of means over units, and is itself rough where a few of them make most of the
    variance.

    Returns:
        The share; an estimate below 0 is 0. None where a unit has a single response, or
        nothing varies.
    """
    influence, units = estimate.influence, estimate.draws.groups
    sizes = torch.bincount(units).to(influence)
    count = len(sizes)
    if count < 2 or float(sizes.min()) < 2:
        return None
    totals = estimate.group_influence
    deviation = (influence - (totals / sizes)[units]).square()
    within = estimate.draws.totals(deviation) * sizes / (sizes - 1)
    both = (totals - totals.mean()).square() * count / (count - 1)
    whole = float(both.sum())
    if not whole:
        return None
    ratio = float(within.sum()) / whole
    residual = (within - ratio * both) / whole
    return BetweenPrompts(
        share=min(1.0, max(0.0, 1 - ratio)), error=delta_method_error(residual)
    )
