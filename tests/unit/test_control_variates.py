"""Are control variates of mean zero, removed without bias, and of use?"""

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
from entropy_ddp.estimators.standard_errors import delta_method_error, jackknife_error

ATOL = 1e-12
RTOL = 1e-10  # the same sums in another order
ETA = 0.1
NUM_GROUPS = 25
GROUPS = torch.cat([group_numbers(NUM_GROUPS, 2), torch.tensor([3, 3, 20])])
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
    return slopes(batch(), GROUPS, normalize)[estimator]


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
    found = adjusted_slope(plain, zero_mean, GROUPS)
    beta = cross_fitted_slopes(group_sums(zero_mean), plain.influence)
    correction = (zero_mean * beta[folds_of(GROUPS)]).sum(1)
    assert float(correction.abs().sum()) > 1e-3
    assert found.control_variates and not plain.control_variates
    assert found.value == pytest.approx(plain.value - float(correction.sum()), rel=RTOL)
    torch.testing.assert_close(found.contributions, plain.contributions - correction)
    assert float(found.contributions.sum()) == pytest.approx(found.value, rel=RTOL)
    assert sum(found.terms.values()) == pytest.approx(found.value, rel=RTOL)
    influence = plain.influence - group_sums(correction)
    torch.testing.assert_close(found.influence, influence)
    assert found.se == pytest.approx(delta_method_error(influence), rel=RTOL)
    assert found.se_jackknife == pytest.approx(jackknife_error(found.without), rel=RTOL)
    if normalize != "sum":
        # Influences of a ratio sum to zero but for the variates' own mean.
        rest = float(influence.sum() + correction.sum())
        assert abs(rest) < ATOL


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
    found = adjusted_slope(plain, zero_mean, GROUPS)
    denominator = batch().ratio(normalize, "rb").denominator
    beta = cross_fitted_slopes(group_sums(zero_mean), plain.influence) * denominator
    expected = []
    for group in range(NUM_GROUPS):
        keep = (group != GROUPS).nonzero().squeeze(1)
        groups = GROUPS[keep] - (GROUPS[keep] > group).long()
        rest = batch().select(keep)
        original = rest.ratio(normalize, "rb")
        kind = ("rb", normalize, *estimator)
        weights = slope_weights(rest.tokens, rest.ragged, original.value, kind)
        terms = sequence_terms(rest.tokens, rest.ragged, weights, "rb")
        value = slope_from_terms(terms, original, groups, estimator).value
        correction = (rest.zero_mean() * beta[folds_of(GROUPS[keep])]).sum()
        scale = NUM_GROUPS / (NUM_GROUPS - 1) if normalize == "sum" else 1.0
        expected.append(scale * (value - float(correction) / original.denominator))
    assert found.without.tolist() == pytest.approx(expected, rel=RTOL)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_variates_lower_the_error_of_the_slope(normalize: Normalize) -> None:
    """By a twentieth at least, on 2,000 sequences; the jackknife says the same."""
    groups = torch.arange(2000)
    large = policy().table(ETA).select(policy().sample(1, 2000, 1, seed=5)[0])
    zero_mean = large.zero_mean()
    for plain in slopes(large, groups, normalize).values():
        found = adjusted_slope(plain, zero_mean, groups)
        assert found.se < 0.95 * plain.se
        assert found.se_jackknife == pytest.approx(found.se, rel=0.01)


def test_few_groups_use_few_variates(monkeypatch: pytest.MonkeyPatch) -> None:
    """25 groups at 10 for each variate use the first two columns, and no more."""
    plain, zero_mean = slope("sum", ("full", "none")), batch().zero_mean()
    expected = adjusted_slope(plain, zero_mean[:, :2], GROUPS)
    monkeypatch.setattr(control_variates, "GROUPS_PER_VARIATE", 10.0)
    found = adjusted_slope(plain, zero_mean, GROUPS)
    assert found.value == expected.value != plain.value
    assert found.se == expected.se


# The adjusted change


def test_adjusted_change_by_hand() -> None:
    change = changes(batch(), GROUPS, "per_token")["snis"]
    partner = slope("per_token", ("full", "none"))
    best = adjusted_slope(
        slope("per_token", ("to_go", "ridge")), batch().zero_mean(), GROUPS
    )
    value, error = adjusted_change(change, partner, best, ETA)
    difference = ETA * (partner.value - best.value)
    assert value == pytest.approx(change.value - difference, rel=RTOL)
    influence = change.influence - ETA * (partner.influence - best.influence)
    assert error == pytest.approx(delta_method_error(influence), rel=RTOL)
    same = adjusted_change(change, partner, partner, ETA)
    assert same == pytest.approx((change.value, change.se), rel=RTOL)


def test_adjusted_change_has_a_lower_error() -> None:
    groups = torch.arange(2000)
    large = policy().table(ETA).select(policy().sample(1, 2000, 1, seed=5)[0])
    found = slopes(large, groups, "per_token")
    best = found["to_go", "ridge"]
    for mode, partner in (
        ("snis", found["full", "none"]),
        ("per_decision", found["to_go", "hk"]),
    ):
        change = changes(large, groups, "per_token")[mode]
        value, error = adjusted_change(change, partner, best, ETA)
        print(
            mode, error / change.se, (value - policy().change(ETA, "per_token")) / error
        )
