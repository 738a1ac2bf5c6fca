"""What would have held the entropy: the parameter of each family, from the shares.

With every token's share s_t and the rest r of the step (momentum, weight decay), the
first-order change with the weights w_t in the place of 1 is, the gain of the step held
fixed,

    F = r + sum_t w_t s_t

and a parameter is wanted with F = h D, h the change that is to be left and D the part of
E's denominator that the shares are of (1 of all of E). Families of weights (`holding`)
have w_t = max(0, 1 + x c_t), x the distance of the parameter from the plain loss: F is
linear between the places -1 / c_t where a weight becomes 0. An entropy bonus and the
learning rate are linear throughout. Of tokens that are left out the fewest are those
with the largest shares against h, the last of them in part.

A parameter is the nearest to the plain loss that reaches h; where none within the limits
does, the family is saturated, and it is the one whose F is nearest to h.

Errors are those of the shares, from the blocks of E (`share_blocks`): what block b adds
to F at the parameter found is G_b, and

    SE(F) = the error of sum_b G_b,     SE(x) = SE(F) / |dF / dx|

Shape legend: T tokens of U, K blocks of E.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_ddp.estimators.shares import first_places, graded

# A weight that differs from 1 by less does not count as changed.
UNCHANGED = 0.01


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The member of a family that was found.

    Attributes:
        distance: of its parameter from that of the plain loss.
        value: its first-order change F, nats.
        slope: dF / d parameter there; 0 where nothing moves F.
        saturated: whether no member within the limits reaches what is wanted.
    """

    distance: float
    value: float
    slope: float
    saturated: bool


def solve_line(
    value: float, slope: float, wanted: float, limits: tuple[float, float]
) -> Solution:
    """x nearest to 0 with value + slope x = wanted, low <= x <= high.

    Args:
        value: F of the plain loss.
        limits: low <= 0 <= high; both may be infinite.
    """
    low, high = limits
    missing = wanted - value
    if not missing:
        return Solution(distance=0.0, value=value, slope=slope, saturated=False)
    if not slope:
        return Solution(distance=0.0, value=value, slope=0.0, saturated=True)
    distance = missing / slope
    if low <= distance <= high:
        return Solution(distance=distance, value=wanted, slope=slope, saturated=False)
    end = min(max(distance, low), high)
    return Solution(
        distance=end, value=value + slope * end, slope=slope, saturated=True
    )


def weights_at(coefficient: Tensor, distance: float) -> Tensor:
    """w_t = max(0, 1 + x c_t), [T].

    Args:
        coefficient: c_t, the slope of the family's weight at the plain loss, [T].
        distance: x.
    """
    return (1 + distance * coefficient).clamp(min=0)


def solve_weights(
    rest: float,
    share: Tensor,
    coefficient: Tensor,
    wanted: float,
    limits: tuple[float, float],
) -> Solution:
    """x nearest to 0 with r + sum_t max(0, 1 + x c_t) s_t = wanted.

    Args:
        rest: r.
        share: s_t, [T].
        coefficient: c_t, [T].
        limits: of x, low <= 0 <= high.
    """
    low, high = limits
    # One side of 0 is the other one with the coefficients turned round.
    up = _on_one_side(rest, share, coefficient, wanted, high)
    down = _on_one_side(rest, share, -coefficient, wanted, -low)
    reaching = [s for s in (up, down) if not s.saturated]
    if reaching:
        found = min(reaching, key=lambda s: s.distance)
    else:
        found = min((up, down), key=lambda s: abs(s.value - wanted))
    if found is up:
        return found
    return Solution(
        distance=-found.distance,
        value=found.value,
        slope=-found.slope,
        saturated=found.saturated,
    )


def _on_one_side(
    rest: float, share: Tensor, coefficient: Tensor, wanted: float, limit: float
) -> Solution:
    """The same with 0 <= x <= limit."""
    # Where weights become 0, in order; each takes its part of the slope away.
    falling = coefficient < -1 / limit if limit else torch.zeros_like(share).bool()
    places, order = (-1 / coefficient[falling]).sort(stable=True)
    lost = (coefficient * share)[falling][order]
    slope = float((coefficient * share).sum())
    slopes = slope - torch.cat([lost.new_zeros(1), lost.cumsum(0)])
    ends = torch.cat([places, places.new_tensor([limit])])
    begins = torch.cat([places.new_zeros(1), places])
    start = rest + float(share.sum())
    values = start + (slopes * (ends - begins)).cumsum(0)
    before = torch.cat([values.new_tensor([start]), values[:-1]])
    low, high = torch.minimum(before, values), torch.maximum(before, values)
    inside = (low <= wanted) & (wanted <= high)
    if bool(inside.any()):
        at = int(inside.int().argmax())
        own = float(slopes[at])
        missing = wanted - float(before[at])
        distance = float(begins[at]) + (missing / own if missing else 0.0)
        return Solution(distance=distance, value=wanted, slope=own, saturated=False)
    points = torch.cat([values.new_tensor([start]), values])
    at = int((points - wanted).abs().argmin())
    return Solution(
        distance=float(ends[at - 1]) if at else 0.0,
        value=float(points[at]),
        slope=float(slopes[max(at - 1, 0)]),
        saturated=True,
    )


def solve_left_out(rest: float, share: Tensor, wanted: float) -> Solution:
    """How many tokens must be left out at least, the last of them in part.

    They are those of `order_left_out`; the slope is by one token more.
    """
    value = rest + float(share.sum())
    missing = wanted - value
    if not missing:
        return Solution(distance=0.0, value=value, slope=0.0, saturated=False)
    gains = -share[order_left_out(share, missing)]
    if not len(gains):
        return Solution(distance=0.0, value=value, slope=0.0, saturated=True)
    reached = gains.cumsum(0)
    enough = (reached - missing) * (1 if missing > 0 else -1) >= 0
    if not bool(enough.any()):
        return Solution(
            distance=float(len(gains)),
            value=value + float(reached[-1]),
            slope=float(gains[-1]),
            saturated=True,
        )
    last = int(enough.int().argmax())
    before = float(reached[last] - gains[last])
    part = (missing - before) / float(gains[last])
    return Solution(
        distance=last + part, value=wanted, slope=float(gains[last]), saturated=False
    )


def order_left_out(share: Tensor, missing: float) -> Tensor:
    """Places of the tokens that lower the entropy, largest share first; [t].

    Args:
        missing: what is wanted less what is there; below 0 it is tokens that raise it.
    """
    against = -share if missing > 0 else share
    places = first_places(graded(against), len(share))
    return places[against[places] > 0]


def weights_left_out(share: Tensor, missing: float, count: float) -> Tensor:
    """0 of the tokens that are left out, of the last one what is kept, 1 of others; [T].

    Args:
        missing: as of `order_left_out`.
        count: how many are left out.
    """
    order = order_left_out(share, missing)
    weights = torch.ones_like(share)
    out = count - torch.arange(len(order), dtype=share.dtype)
    weights[order] = 1 - out.clamp(0, 1)
    return weights


def between_blocks(square: float, own: Tensor) -> float | None:
    """<g, P g> of the mean of what blocks' sum g estimates, without their own luck.

    A gradient is no judge of itself: <g_b, P g_b> holds the square of the block's noise.
    The products of two different blocks have none,

        K / (K - 1) (<g, P g> - sum_b <g_b, P g_b>)

    Args:
        square: <g, P g> of the sum over blocks g.
        own: <g_b, P g_b>, [K].

    Returns:
        An unbiased estimate for blocks of one size; None of fewer than two.
    """
    count = len(own)
    if count < 2:
        return None
    return count / (count - 1) * (square - float(own.sum()))


def fraction_changed(weights: Tensor) -> float:
    """Share of the tokens whose weight is another than 1, by more than 1 %."""
    if not len(weights):
        return 0.0
    return float(((weights - 1).abs() > UNCHANGED).double().mean())


@dataclass(frozen=True, kw_only=True)
class TokenFamily:
    """Members that weigh the tokens of U.

    Attributes:
        rest: what each block adds to F beside the shares that are weighted, [K].
        share: those shares, by block, [T, K].
        coefficient: c_t, [T]; None where tokens are left out.
        limits: of the distance from the plain loss.
    """

    rest: Tensor
    share: Tensor
    coefficient: Tensor | None
    limits: tuple[float, float]

    def solve(self, places: Tensor, wanted: float) -> Solution:
        """The member that some blocks say reaches what is wanted of them."""
        rest, share = float(self.rest[places].sum()), self.share[:, places].sum(1)
        if self.coefficient is None:
            return solve_left_out(rest, share, wanted)
        return solve_weights(rest, share, self.coefficient, wanted, self.limits)

    def weights(self, places: Tensor, wanted: float, distance: float) -> Tensor:
        """The weights of a member, [T]; which tokens are left out, some blocks say."""
        if self.coefficient is not None:
            return weights_at(self.coefficient, distance)
        share = self.share[:, places].sum(1)
        missing = wanted - float(self.rest[places].sum() + share.sum())
        return weights_left_out(share, missing, distance)

    def added(self, places: Tensor, wanted: float, distance: float) -> Tensor:
        """What every block adds to F of that member, [K]."""
        weights = self.weights(places, wanted, distance)
        # No product of BLAS: its bits depend on where arrays lie in memory.
        return self.rest + (weights[:, None] * self.share).sum(0)


@dataclass(frozen=True, kw_only=True)
class LineFamily:
    """Members of which F is a line in the parameter.

    Attributes:
        total: what each block adds to F of the plain loss, [K].
        change: the same of dF / d parameter, [K].
        limits: of the distance from the plain loss.
    """

    total: Tensor
    change: Tensor
    limits: tuple[float, float]

    def solve(self, places: Tensor, wanted: float) -> Solution:
        """The member that some blocks say reaches what is wanted of them."""
        value, slope = (float(x[places].sum()) for x in (self.total, self.change))
        return solve_line(value, slope, wanted, self.limits)

    def added(self, places: Tensor, wanted: float, distance: float) -> Tensor:
        """What every block adds to F of that member, [K]."""
        return self.total + distance * self.change


def corrected(
    value_at: Callable[[float], float],
    plain: float,
    first: float,
    wanted: float,
    limits: tuple[float, float],
    *,
    tolerance: float,
    most: int,
) -> tuple[float, float, bool]:
    """x with value_at(x) = wanted, by secants from x = 0 and a first guess.

    Args:
        value_at: the first-order change at a distance from the plain loss.
        plain: the same at 0.
        first: the guess.
        limits: of x.
        tolerance: of the value, as a share of what is missing at 0.
        most: how often `value_at` is asked at most.

    Returns:
        The distance whose value is nearest to what is wanted, the value, and whether it
        is within the tolerance.
    """
    low, high = limits
    bar = tolerance * abs(wanted - plain)
    asked = [(0.0, plain)]
    following = min(max(first, low), high)
    while len(asked) <= most and abs(asked[-1][1] - wanted) > bar:
        if any(following == distance for distance, _ in asked):
            break
        asked.append((following, value_at(following)))
        (previous, before), (distance, value) = asked[-2:]
        if value == before:
            break
        following = distance + (wanted - value) * (distance - previous) / (
            value - before
        )
        following = min(max(following, low), high)
    distance, value = min(asked, key=lambda pair: abs(pair[1] - wanted))
    return distance, value, abs(value - wanted) <= bar
