"""Are control variates of mean zero, removed without bias, and of use?"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from enumerable import Policy, Table, changes, group_numbers, slopes
from torch import Tensor

from entropy_ddp.config import Normalize
from entropy_ddp.estimators import control_variates
from entropy_ddp.estimators.baselines import NUM_FOLDS, folds_of
from entropy_ddp.estimators.control_variates import (
    adjusted_change,
    adjusted_slope,
    cross_fitted_slopes,
    zero_mean_sums,
)
from entropy_ddp.estimators.linear import (
    Baseline,
    Score,
    Slope,
    sequence_terms,
    slope_from_terms,
    slope_weights,
)
from entropy_ddp.estimators.standard_errors import (
    Draws,
    Estimate,
    delta_method_error,
    jackknife_error,
)

ATOL = 1e-12
RTOL = 1e-10  # the same sums in another order
ETA = 0.1
NUM_GROUPS = 25
GROUPS = torch.cat([group_numbers(NUM_GROUPS, 2), torch.tensor([3, 3, 20])])
DRAWS = Draws(groups=GROUPS)
NORMALIZATIONS: tuple[Normalize, ...] = ("per_token", "per_sequence", "sum")
UNFITTED: tuple[tuple[Score, Baseline], ...] = (
    ("full", "none"),
    ("to_go", "none"),
    ("to_go", "hk"),
)


@pytest.fixture(autouse=True)
def all_variates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use every variate, however few the groups: the proofs hold for any number."""
    monkeypatch.setattr(control_variates, "GROUPS_PER_VARIATE", 0.01)


@cache
def policy() -> Policy:
    return Policy(num_prompts=3, seed=4)


@cache
def batch() -> Table:
    """25 groups of two sequences or more."""
    index = policy().sample(1, len(GROUPS), 1, seed=2)[0]
    return policy().table(ETA).select(index)


@cache
def slope(normalize: Normalize, estimator: tuple[Score, Baseline]) -> Slope:
    return slopes(batch(), DRAWS, normalize)[estimator]


def group_sums(values: Tensor) -> Tensor:
    """Sums over the sequences of each group, [n, ...]."""
    total = values.new_zeros(NUM_GROUPS, *values.shape[1:])
    return total.index_add_(0, GROUPS, values)


# Mean zero


@pytest.mark.parametrize("known", ["predictors", "hidden"])
def test_every_variate_has_mean_zero(known: str) -> None:
    """For each prompt, over all responses, with any function of the prefix."""
    table = policy().table()
    factors = getattr(table, known)
    sums = zero_mean_sums(table.tokens, table.features, factors, table.ragged)
    assert sums.shape == (len(policy().prompt), 8 * factors.shape[1])
    for prompt in range(policy().num_prompts):
        here = policy().prompt == prompt
        weights = policy().probabilities[here]
        assert float((weights @ sums[here]).abs().max()) < ATOL
        # None of them is zero by itself.
        assert float((weights @ sums[here].abs()).min()) > 1e-4


def test_variates_are_those_written() -> None:
    """One sequence and one factor at a time, in the order of the docstring."""
    table = batch()
    tokens, features, known = table.tokens, table.features, table.predictors
    sums = table.zero_mean()
    width = known.shape[1]
    p = tokens.logp.exp()
    for row, length in list(enumerate(table.ragged.lengths.tolist()))[:10]:
        start = int(table.ragged.starts[row])
        expected = torch.zeros(8, width, dtype=torch.float64)
        for k in range(start, start + length):
            before = tokens.dlogp[start:k].sum()
            top, d = features["is_top"][k], tokens.dlogp[k]
            u = (
                d,
                tokens.logp[k] * d + tokens.dentropy[k],
                p[k] * d - features["dcollision"][k],
                top * d - features["dtop"][k],
            )
            m = (
                d,
                tokens.logp[k] + tokens.entropy[k],
                p[k] - features["collision"][k],
                top - features["top_probability"][k],
            )
            expected[:4] += torch.stack(u)[:, None] * known[k]
            expected[4:] += before * torch.stack(m)[:, None] * known[k]
        torch.testing.assert_close(sums[row], expected.T.flatten())


@pytest.mark.parametrize("num_groups", [3, 10, 79, 80, 81, 90, 559, 5000])
def test_unused_variates_need_not_be_made(
    monkeypatch: pytest.MonkeyPatch, num_groups: int
) -> None:
    """Those of the first predictors are the first ones, and no predictor too many."""
    monkeypatch.setattr(control_variates, "GROUPS_PER_VARIATE", 10.0)
    table, limit = batch(), num_groups // 10
    usable = control_variates.num_usable_predictors(num_groups)
    few = zero_mean_sums(
        table.tokens, table.features, table.predictors[:, :usable], table.ragged
    )
    assert torch.equal(few[:, :limit], table.zero_mean()[:, :limit])
    assert few.shape[1] < limit + 8


# The regression


def made_up(num_groups: int, num_variates: int) -> tuple[Tensor, Tensor]:
    """Skewed variates, and an influence that goes with them."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(
        num_groups, num_variates + 1, generator=generator, dtype=torch.float64
    )
    variates = noise[:, 1:].exp() - 1.6
    return variates, variates.sum(1) + noise[:, 0]


@pytest.mark.parametrize("group", [0, 6, 24])
def test_coefficients_never_use_the_own_group(group: int) -> None:
    variates, influence = made_up(NUM_GROUPS, 4)
    before = cross_fitted_slopes(variates, influence)
    variates[group] *= -7
    influence[group] += 11
    after = cross_fitted_slopes(variates, influence)
    moved = (after - before).abs().amax(1)
    own = torch.arange(NUM_FOLDS) == group % NUM_FOLDS
    assert float(moved[own].max()) < ATOL
    assert (moved[~own] > 1e-4).all()


def test_coefficients_of_many_groups_are_those_of_the_linear_relation() -> None:
    """Up to noise and a penalty of three observations for each variate."""
    variates, influence = made_up(5000, 4)
    found = cross_fitted_slopes(variates, influence)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=0.05)


def test_coefficients_do_not_depend_on_units_or_a_constant() -> None:
    variates, influence = made_up(NUM_GROUPS, 4)
    units = torch.tensor([1e-3, 1.0, 20.0, 1e4], dtype=torch.float64)
    expected = cross_fitted_slopes(variates, influence)
    found = cross_fitted_slopes(variates * units, 5 * influence + 3) * units
    torch.testing.assert_close(found, 5 * expected, rtol=1e-9, atol=0)


def test_variates_that_vanish_get_no_coefficient() -> None:
    variates, influence = made_up(NUM_GROUPS, 4)
    variates[:, 2] = 0
    found = cross_fitted_slopes(variates, influence)
    assert not found[:, 2].any() and found[:, 0].all()
    nothing = cross_fitted_slopes(torch.zeros_like(variates), influence)
    assert not nothing.any()


def test_two_groups_have_nothing_to_regress() -> None:
    """One other group has no spread: no correction, and not an error."""
    variates, influence = made_up(2, 4)
    assert not cross_fitted_slopes(variates, influence).any()


# The adjusted slope


@pytest.mark.parametrize("estimator", [*UNFITTED, ("to_go", "ridge")])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_adjusted_slope_by_hand(
    normalize: Normalize, estimator: tuple[Score, Baseline]
) -> None:
    """beta of the own fold times Z is taken from value, shares and influence."""
    plain, zero_mean = slope(normalize, estimator), batch().zero_mean()
    original = batch().ratio(normalize, "rb")
    found = adjusted_slope(plain, original, zero_mean)
    beta = cross_fitted_slopes(group_sums(zero_mean), plain.estimate.group_influence)
    correction = (zero_mean * beta[folds_of(GROUPS)]).sum(1)
    assert float(correction.abs().sum()) > 1e-3
    assert found.control_variates and not plain.control_variates
    assert found.value == pytest.approx(plain.value - float(correction.sum()), rel=RTOL)
    torch.testing.assert_close(found.contributions, plain.contributions - correction)
    assert float(found.contributions.sum()) == pytest.approx(found.value, rel=RTOL)
    assert sum(found.terms.values()) == pytest.approx(found.value, rel=RTOL)
    removed = group_sums(correction)
    if original.size is not None:
        # What is removed is a ratio of its own, with the same denominator.
        shares = original.size / original.denominator
        removed = removed - correction.sum() * group_sums(shares)
    estimate = found.estimate
    influence = plain.estimate.group_influence - removed
    torch.testing.assert_close(estimate.group_influence, influence)
    assert found.se == pytest.approx(delta_method_error(influence), rel=RTOL)
    jackknife = jackknife_error(estimate.without)
    assert estimate.se_jackknife == pytest.approx(jackknife, rel=RTOL)
    if normalize != "sum":
        assert abs(float(influence.sum())) < ATOL


@pytest.mark.parametrize("estimator", UNFITTED)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_error_is_that_of_leaving_each_group_out(
    normalize: Normalize, estimator: tuple[Score, Baseline]
) -> None:
    """The slope recomputed without the group, less beta Z of the groups that stay.

    beta is held fixed in the units of sums over sequences: what is subtracted is
    divided by the denominator of the groups that stay, as the slope is.
    """
    plain, zero_mean = slope(normalize, estimator), batch().zero_mean()
    whole = batch().ratio(normalize, "rb")
    found = adjusted_slope(plain, whole, zero_mean)
    influence = plain.estimate.group_influence
    beta = cross_fitted_slopes(group_sums(zero_mean), influence) * whole.denominator
    expected = []
    for group in range(NUM_GROUPS):
        keep = (group != GROUPS).nonzero().squeeze(1)
        draws = Draws(groups=GROUPS[keep] - (GROUPS[keep] > group).long())
        rest = batch().select(keep)
        original = rest.ratio(normalize, "rb")
        kind = ("rb", normalize, *estimator)
        weights = slope_weights(rest.tokens, rest.ragged, original.value, kind)
        terms = sequence_terms(rest.tokens, rest.ragged, weights, "rb")
        value = slope_from_terms(terms, original, draws, estimator).value
        correction = (rest.zero_mean() * beta[folds_of(GROUPS[keep])]).sum()
        scale = NUM_GROUPS / (NUM_GROUPS - 1) if normalize == "sum" else 1.0
        expected.append(scale * (value - float(correction) / original.denominator))
    assert found.estimate.without.tolist() == pytest.approx(expected, rel=RTOL)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_variates_lower_the_error_of_the_slope(normalize: Normalize) -> None:
    """By a twentieth at least, on 2,000 sequences; the jackknife says the same."""
    draws = Draws(groups=torch.arange(2000))
    large = policy().table(ETA).select(policy().sample(1, 2000, 1, seed=5)[0])
    zero_mean, original = large.zero_mean(), large.ratio(normalize, "rb")
    for (_, baseline), plain in slopes(large, draws, normalize).items():
        found = adjusted_slope(plain, original, zero_mean)
        # Action values have taken out what these variates could.
        assert found.se < (1.01 if baseline == "action_value" else 0.95) * plain.se
        assert found.estimate.se_jackknife == pytest.approx(found.se, rel=0.01)


def test_few_groups_use_few_variates(monkeypatch: pytest.MonkeyPatch) -> None:
    """25 groups at 10 for each variate use the first two columns, and no more."""
    plain, zero_mean = slope("sum", ("full", "none")), batch().zero_mean()
    original = batch().ratio("sum", "rb")
    expected = adjusted_slope(plain, original, zero_mean[:, :2])
    monkeypatch.setattr(control_variates, "GROUPS_PER_VARIATE", 10.0)
    found = adjusted_slope(plain, original, zero_mean)
    assert found.value == expected.value != plain.value
    assert found.se == expected.se


# The adjusted change


def weights_by_hand(change: Estimate, noise: Estimate) -> Tensor:
    """c of each fold: the least-squares share of eta d in Delta H, over the others."""
    fold = folds_of(torch.arange(NUM_GROUPS))
    products, squares = (
        change.group_influence * noise.group_influence,
        (noise.group_influence.square()),
    )
    found = []
    for number in range(NUM_FOLDS):
        others = fold != number
        share = float(products[others].sum() / squares[others].sum())
        found.append(min(1.0, max(0.0, share)))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize(
    ("mode", "pair"), [("snis", ("full", "none")), ("per_decision", ("to_go", "hk"))]
)
def test_adjusted_change_by_hand(
    normalize: Normalize, mode: str, pair: tuple[Score, Baseline]
) -> None:
    """Each sequence's part of eta (partner - best), times its fold's c, is removed."""
    original = batch().ratio(normalize, "rb")
    change = changes(batch(), DRAWS, normalize)[mode]
    partner, best = slope(normalize, pair), slope(normalize, ("to_go", "action_value"))
    fold = folds_of(torch.arange(NUM_GROUPS))
    found = adjusted_change(change, partner, best, original, ETA, fold)
    noise = partner.estimate.minus(best.estimate).scaled(ETA)
    c = weights_by_hand(change.change, noise)
    assert float(c.max()) > 0
    parts = ETA * (partner.contributions - best.contributions)
    assert float(parts.sum()) == pytest.approx(noise.value, rel=RTOL)
    weight = c[fold[GROUPS]]
    # The denominator term is shared out by what every sequence has of the entropy.
    pieces = weight[:, None] * (partner.pieces - best.pieces)
    count, size = float(pieces[:, 3].sum()), original.denominator
    expected = pieces[:, 1] + pieces[:, 2] - original.numerator * count / size
    expected = ETA * expected / size
    removed = change.value - found.value
    assert removed == pytest.approx(float(expected.sum()), rel=RTOL)
    torch.testing.assert_close(found.contributions, change.contributions - expected)
    assert found.after.value - found.before.value == pytest.approx(
        found.value, rel=1e-9
    )
    assert found.control_weight == pytest.approx(float(c.mean()), rel=RTOL)
    same = adjusted_change(change, partner, partner, original, ETA, fold)
    assert same.value == pytest.approx(change.value, rel=RTOL)
    assert same.se == pytest.approx(change.se, rel=RTOL)
    assert same.control_weight == 0.0


def test_the_share_of_one_s_own_fold_is_fitted_without_it() -> None:
    """Another noise in one group moves every fold's share but its own."""
    original = batch().ratio("per_token", "rb")
    change = changes(batch(), DRAWS, "per_token")["per_decision"]
    partner, best = (
        slope("per_token", ("to_go", baseline)) for baseline in ("hk", "action_value")
    )
    noise = partner.estimate.minus(best.estimate)
    weights = weights_by_hand(change.change, noise)
    moved = noise.influence + (GROUPS == 4) * noise.influence.abs().max()
    other = weights_by_hand(change.change, replace(noise, influence=moved))
    own = torch.arange(NUM_FOLDS) == folds_of(torch.tensor([4]))
    inside = (weights > 0) & (weights < 1) & ~own
    assert torch.equal(weights[own], other[own])
    assert bool(inside.any()) and (weights != other)[inside].all()
    assert original.denominator > 0


def test_adjusted_change_has_a_lower_error() -> None:
    draws = Draws(groups=torch.arange(2000))
    large = policy().table(ETA).select(policy().sample(1, 2000, 1, seed=5)[0])
    found, original = slopes(large, draws, "per_token"), large.ratio("per_token", "rb")
    best = found["to_go", "action_value"]
    fold = folds_of(draws.groups)
    for mode, partner, ratio in (
        ("snis", found["full", "none"], 0.9),
        ("per_decision", found["to_go", "hk"], 0.98),
    ):
        change = changes(large, draws, "per_token")[mode]
        adjusted = adjusted_change(change, partner, best, original, ETA, fold)
        assert adjusted.se < ratio * change.se
        exact = policy().change(ETA, "per_token")
        assert abs(adjusted.value - exact) < 4 * adjusted.se
