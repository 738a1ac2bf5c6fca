"""Are the parameters that would have held the entropy those that a search finds?

Every expectation is a loop over the definition, or a fine grid of parameters.
"""

import math

import pytest
import torch
from torch import Tensor

from entropy_ddp.estimators.hold_parameters import (
    LineFamily,
    Solution,
    TokenFamily,
    corrected,
    fraction_changed,
    solve_left_out,
    solve_line,
    solve_weights,
    weights_at,
    weights_left_out,
)
from entropy_ddp.estimators.holding import FAMILIES

DOUBLE = torch.float64
REST = -0.4
LIMITS = (-1.0, 1.0)


def random_tokens(seed: int, count: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Shares, log p and advantages, [T] each."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.randn(count, generator=generator, dtype=DOUBLE) / count
    logp = -torch.rand(count, generator=generator, dtype=DOUBLE) * 4
    advantage = torch.randn(count, generator=generator, dtype=DOUBLE)
    advantage[::7] = 0.0
    return share, logp, advantage


def value_by_hand(
    family: str, tokens: tuple[Tensor, Tensor, Tensor], parameter: float
) -> float:
    """F by the family's weights, token by token."""
    share, logp, advantage = tokens
    weights = FAMILIES[family].weight(logp, advantage, parameter)
    pairs = zip(weights.tolist(), share.tolist(), strict=True)
    return REST + math.fsum(w * s for w, s in pairs)


def solved(
    family: str, tokens: tuple[Tensor, Tensor, Tensor], wanted: float
) -> Solution:
    share, logp, advantage = tokens
    of = FAMILIES[family]
    coefficient = of.slope(logp, advantage, of.neutral)
    low, high = of.limits
    limits = (low - of.neutral, high - of.neutral)
    return solve_weights(REST, share, coefficient, wanted, limits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("wanted", [-0.45, -0.3, 0.0, 1.0])
def test_parameter_is_the_nearest_of_a_fine_grid(
    family: str, seed: int, wanted: float
) -> None:
    """That reaches what is wanted; or else the one that comes nearest to it."""
    tokens, of = random_tokens(seed), FAMILIES[family]
    found = solved(family, tokens, wanted)
    parameter = of.neutral + found.distance
    low, high = of.limits
    assert low <= parameter <= high
    assert found.value == pytest.approx(value_by_hand(family, tokens, parameter))
    grid = torch.linspace(low, high, 4001, dtype=DOUBLE).tolist()
    missed = [value_by_hand(family, tokens, x) - wanted for x in grid]
    # Between two points of the grid with different signs there is a root.
    roots = [
        min(abs(a - of.neutral), abs(b - of.neutral))
        for a, b, left, right in zip(grid, grid[1:], missed, missed[1:], strict=False)
        if left * right <= 0
    ]
    assert found.saturated == (not roots)
    if roots:
        assert found.value == pytest.approx(wanted, abs=1e-14)
        spacing = (high - low) / 4000
        assert abs(found.distance) == pytest.approx(min(roots), abs=2 * spacing)
    else:
        least = min(map(abs, missed))
        assert abs(found.value - wanted) <= least + 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_are_differences(family: str) -> None:
    tokens, of = random_tokens(1), FAMILIES[family]
    found = solved(family, tokens, value_by_hand(family, tokens, of.neutral + 0.1))
    assert not found.saturated
    at = of.neutral + found.distance
    above, below = (value_by_hand(family, tokens, at + d) for d in (1e-6, -1e-6))
    assert found.slope == pytest.approx((above - below) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_family(family: str) -> None:
    """One formula for both: max(0, 1 + x c)."""
    _, logp, advantage = random_tokens(2)
    of = FAMILIES[family]
    coefficient = of.slope(logp, advantage, of.neutral)
    for parameter in torch.linspace(*of.limits, 9).tolist():
        torch.testing.assert_close(
            weights_at(coefficient, parameter - of.neutral),
            of.weight(logp, advantage, parameter),
        )


@pytest.mark.parametrize("wanted", [-0.6, -0.41, -0.2, 5.0, -5.0])
def test_fewest_tokens_left_out(wanted: float) -> None:
    """Largest first until it is enough, the last in part; or all that help."""
    share, *_ = random_tokens(3)
    start = REST + float(share.sum())
    sign = 1 if wanted > start else -1
    left, count = start, 0.0
    weights = torch.ones_like(share)
    for t in sorted(range(len(share)), key=lambda t: sign * float(share[t])):
        if sign * float(share[t]) >= 0 or (wanted - left) * sign <= 0:
            break
        part = min(1.0, (wanted - left) / -float(share[t]))
        left -= part * float(share[t])
        weights[t] -= part
        count += part
    found = solve_left_out(REST, share, wanted)
    assert found.distance == pytest.approx(count)
    assert found.value == pytest.approx(left)
    assert found.saturated == (abs(left - wanted) > 1e-9)
    own = weights_left_out(share, wanted - start, found.distance)
    torch.testing.assert_close(own, weights, atol=1e-12, rtol=0)
    assert REST + float(own @ share) == pytest.approx(found.value)


def test_what_is_there_needs_nothing() -> None:
    share, logp, advantage = random_tokens(5)
    total = REST + float(share.sum())
    found = [
        solve_left_out(REST, share, total),
        solve_line(total, 2.0, total, LIMITS),
        solve_weights(REST, share, -advantage.sign() * logp, total, LIMITS),
    ]
    assert [(s.distance, s.saturated) for s in found] == [(0.0, False)] * 3


def test_a_family_that_moves_nothing_is_saturated_at_the_plain_loss() -> None:
    nothing = torch.zeros(5, dtype=DOUBLE)
    share = torch.ones(5, dtype=DOUBLE)
    for found in (
        solve_weights(REST, share, nothing, 0.0, LIMITS),
        solve_weights(REST, nothing, share, 0.0, LIMITS),
        solve_left_out(REST, nothing, 0.0),
        solve_line(REST, 0.0, 0.0, LIMITS),
    ):
        assert (found.distance, found.saturated) == (0.0, True)


def test_lines_end_at_their_limits() -> None:
    assert solve_line(-1.0, 4.0, 0.0, LIMITS) == Solution(
        distance=0.25, value=0.0, slope=4.0, saturated=False
    )
    assert solve_line(-1.0, -0.5, 0.0, LIMITS) == Solution(
        distance=-1.0, value=-0.5, slope=-0.5, saturated=True
    )
    assert solve_line(-1.0, 1e-3, 0.0, (-math.inf, math.inf)).distance == 1000.0


def test_blocks_add_up_to_the_change_of_the_member() -> None:
    """A member of one half of the blocks, judged by all of them."""
    generator = torch.Generator().manual_seed(6)
    _, logp, advantage = random_tokens(6)
    share = torch.randn(40, 4, generator=generator, dtype=DOUBLE) / 40
    rest = torch.randn(4, generator=generator, dtype=DOUBLE)
    even, whole = torch.tensor([0, 2]), torch.arange(4)
    wanted = float(rest[even].sum() + share[:, even].sum()) + 0.05
    line = LineFamily(total=rest + share.sum(0), change=rest, limits=LIMITS)
    of = FAMILIES["repo"]
    weighted = TokenFamily(
        rest=rest,
        share=share,
        coefficient=of.slope(logp, advantage, 0.0),
        limits=LIMITS,
    )
    without = TokenFamily(
        rest=rest, share=share, coefficient=None, limits=(0.0, math.inf)
    )
    for family in (line, weighted, without):
        found = family.solve(even, wanted)
        added = family.added(even, wanted, found.distance)
        assert float(added[even].sum()) == pytest.approx(found.value)
        assert not found.saturated
        plain = family.added(whole, 0.0, 0.0)
        torch.testing.assert_close(plain, line.total)


def test_secants_find_where_a_curve_is_what_is_wanted() -> None:
    """Asked no more often than allowed; the best of what was asked is kept."""
    asked: list[float] = []

    def saturating(x: float) -> float:
        asked.append(x)
        return -1.0 + math.tanh(2 * x)

    found = corrected(saturating, -1.0, 0.1, -0.4, LIMITS, tolerance=1e-9, most=20)
    assert found[2]
    assert found[0] == pytest.approx(math.atanh(0.6) / 2, rel=1e-8)
    asked.clear()
    *_, reached = corrected(saturating, -1.0, 0.1, -0.4, LIMITS, tolerance=1e-9, most=2)
    assert len(asked) == 2 and not reached
    distance, value, reached = corrected(
        saturating, -1.0, 0.1, 0.5, LIMITS, tolerance=1e-3, most=9
    )
    assert (distance, reached) == (1.0, False)
    assert value == pytest.approx(-1.0 + math.tanh(2.0))


def test_nothing_is_asked_where_nothing_is_missing() -> None:
    def never(x: float) -> float:
        raise AssertionError(x)

    assert corrected(never, 0.2, 0.0, 0.2, LIMITS, tolerance=0.01, most=3) == (
        0.0,
        0.2,
        True,
    )


def test_which_weights_count_as_changed() -> None:
    weights = torch.tensor([1.0, 0.995, 0.98, 0.0, 1.5], dtype=DOUBLE)
    assert fraction_changed(weights) == 0.6
    assert fraction_changed(weights[:0]) == 0.0
