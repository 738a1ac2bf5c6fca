"""Is the slope what pen and paper give, with its terms, errors and shares?"""

import math
from itertools import product
from typing import Any

import pytest
import reference as ref
import torch
from reference import Objective, Row
from torch import Tensor

from entropy_ddp.data.batch import Ragged
from entropy_ddp.errors import InputError
from entropy_ddp.estimators.entropy import Ratio, as_ratio, integrand_tokens
from entropy_ddp.estimators.linear import (
    Slope,
    applicable_estimators,
    sequence_terms,
    slope_from_terms,
    slope_weights,
)
from entropy_ddp.estimators.standard_errors import Draws
from entropy_ddp.model.response_tokens import DirectionalScores

RTOL = 1e-12  # the same few sums in another order, relative to the largest term

MEAN = "per_sequence_token_mean"
ESTIMATORS = [("full", "none"), ("to_go", "none"), ("to_go", "hk")]
COMBINATIONS = [
    (normalize, *estimator)
    for normalize, estimator in product(ref.NORMALIZATIONS, ESTIMATORS)
    if normalize != MEAN or estimator == ("full", "none")
]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def compute_slope(
    tokens: DirectionalScores,
    lengths: Tensor,
    groups: Tensor,
    estimator: tuple[Any, Any, Any, Any],
) -> Slope:
    """The slope of one rank's batch; estimator as `slope_weights` takes it."""
    integrand, normalize, score, baseline = estimator
    ragged = Ragged(lengths)
    values = integrand_tokens(integrand, tokens.logp, tokens.entropy)
    original = as_ratio(normalize, ragged.sum(values), lengths)
    weights = slope_weights(tokens, ragged, original.value, estimator)
    terms = sequence_terms(tokens, ragged, weights, integrand)
    draws = Draws(groups=groups)
    return slope_from_terms(terms, original, draws, (score, baseline))


# By hand: two sequences of two tokens and one, each a group

TOKENS = DirectionalScores(
    logp=double(-1.0, -2.0, -0.5),
    entropy=double(0.5, 0.7, 1.1),
    dlogp=double(0.1, -0.5, 0.2),
    dentropy=double(0.3, 0.2, -0.1),
)
LENGTHS, GROUPS = torch.tensor([2, 1]), torch.tensor([0, 1])

# (sum of score, of pathwise, of what Hbar multiplies, Hbar, D)
BY_HAND = {
    ("per_token", "full", "none"): (-0.4 * 1.2 + 0.2 * 1.1, 0.4, -0.6, 2.3 / 3, 3),
    ("per_token", "to_go", "none"): (0.12 - 0.35 + 0.22, 0.4, -0.1, 2.3 / 3, 3),
    ("per_token", "to_go", "hk"): (0.07, 0.4, 0.1, 2.3 / 3, 3),
    ("per_sequence", "full", "none"): (-0.26, 0.4, -0.2, 1.15, 2),
    ("per_sequence", "to_go", "none"): (-0.01, 0.4, 0.0, 1.15, 2),
    ("per_sequence", "to_go", "hk"): (0.07, 0.4, 0.0, 1.15, 2),
    ("sum", "full", "none"): (-0.26, 0.4, 0.0, 2.3, 1),
    ("sum", "to_go", "none"): (-0.01, 0.4, 0.0, 2.3, 1),
    ("sum", "to_go", "hk"): (0.07, 0.4, 0.0, 2.3, 1),
    (MEAN, "full", "none"): (-0.4 * 0.6 + 0.2 * 1.1, 0.25 - 0.1, -0.2, 0.85, 2),
}


@pytest.mark.parametrize(("normalize", "score", "baseline"), BY_HAND)
def test_terms_by_hand(normalize: str, score: str, baseline: str) -> None:
    kind = ("rb", normalize, score, baseline)
    slope = compute_slope(TOKENS, LENGTHS, GROUPS, kind)
    scored, pathwise, remaining, mean, D = BY_HAND[normalize, score, baseline]
    expected = {
        "score": scored / D,
        "pathwise": pathwise / D,
        "denominator": -mean * remaining / D,
    }
    assert slope.terms == pytest.approx(expected, rel=RTOL, abs=RTOL)
    assert slope.value == pytest.approx(sum(expected.values()), rel=RTOL)
    assert (slope.score, slope.baseline) == (score, baseline)


def test_surprisal_by_hand() -> None:
    """H_i = -l_i: 3.0 and 0.5; its derivative is -l'_i; hk subtracts the entropies."""
    full = compute_slope(TOKENS, LENGTHS, GROUPS, ("surprisal", "sum", "full", "none"))
    expected = {"score": -0.4 * 3 + 0.2 * 0.5, "pathwise": 0.2, "denominator": 0.0}
    assert full.terms == pytest.approx(expected, rel=RTOL, abs=RTOL)
    hk = compute_slope(TOKENS, LENGTHS, GROUPS, ("surprisal", "sum", "to_go", "hk"))
    score = 0.1 * (3 - 0.5) - 0.5 * (2 - 0.7) + 0.2 * (0.5 - 1.1)
    assert hk.terms["score"] == pytest.approx(score, rel=RTOL)


def test_weights_by_hand() -> None:
    mean = 2.3 / 3
    weights = slope_weights(
        TOKENS, Ragged(LENGTHS), mean, ("rb", "per_token", "to_go", "hk")
    )
    assert weights.score.tolist() == pytest.approx([0.7, 0.0, 0.0], abs=RTOL)
    assert weights.denominator.tolist() == [1.0, 0.0, 0.0]
    assert weights.centred.tolist() == pytest.approx([0.7 - mean, 0, 0], abs=RTOL)
    assert weights.pathwise.tolist() == [1.0, 1.0, 1.0]
    none = slope_weights(
        TOKENS, Ragged(LENGTHS), mean, ("rb", "per_token", "to_go", "none")
    )
    assert none.score.tolist() == pytest.approx([1.2, 0.7, 1.1], rel=RTOL)
    assert none.denominator.tolist() == [2.0, 1.0, 1.0]
    average = slope_weights(TOKENS, Ragged(LENGTHS), mean, ("rb", MEAN, "full", "none"))
    assert average.pathwise.tolist() == [0.5, 0.5, 1.0]


def test_errors_by_hand_for_a_sum() -> None:
    """Two groups with shares a and b: both errors are |a - b|."""
    slope = compute_slope(TOKENS, LENGTHS, GROUPS, ("rb", "sum", "full", "none"))
    a, b = -0.4 * 1.2 + 0.5, 0.2 * 1.1 - 0.1
    assert slope.contributions.tolist() == pytest.approx([a, b], rel=RTOL)
    assert slope.se == pytest.approx(abs(a - b), rel=RTOL)
    assert slope.estimate.se_jackknife == pytest.approx(abs(a - b), rel=RTOL)


# Against the reference on made-up tokens


def made_up(seed: int, num_groups: int) -> tuple[list[Row], list[Any]]:
    """Rows of 0 to 6 tokens with values and derivatives; no model behind them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 4, (num_groups,), generator=generator).tolist()
    rows, tokens = [], []
    for group, size in enumerate(sizes):
        for _ in range(size):
            length = int(torch.randint(0, 7, (), generator=generator))
            values = torch.randn(4, length, generator=generator, dtype=torch.float64)
            logp, entropy, dlogp, dentropy = values
            rows.append(Row(group, [1], [1] * length))
            tokens.append((-logp.abs(), 1 + entropy.abs(), dlogp, dentropy))
    return rows, tokens


def flat(
    rows: list[Row], tokens: list[Any]
) -> tuple[DirectionalScores, Tensor, Tensor]:
    """The same as flat arrays, with lengths and groups."""
    names = ("logp", "entropy", "dlogp", "dentropy")
    columns = map(torch.cat, zip(*tokens, strict=True))
    return (
        DirectionalScores(**dict(zip(names, columns, strict=True))),
        torch.tensor([len(row.response_ids) for row in rows]),
        torch.tensor([row.group for row in rows]),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("integrand", ["rb", "surprisal"])
@pytest.mark.parametrize(("normalize", "score", "baseline"), COMBINATIONS)
def test_made_up_batches(
    normalize: str, score: str, baseline: str, integrand: str, seed: int
) -> None:
    """Slope, terms, shares and both errors; from two groups on, empty rows included."""
    rows, tokens = made_up(seed, num_groups=(2, 3, 9, 20)[seed])
    found = compute_slope(*flat(rows, tokens), (integrand, normalize, score, baseline))
    objective = Objective(normalize=normalize, integrand=integrand)
    expected = ref.slope_from_tokens(tokens, objective, score=score, baseline=baseline)
    scale = max(map(abs, (expected.score, expected.pathwise, expected.denominator)))
    assert abs(found.value - expected.slope) <= RTOL * scale
    for name in ("score", "pathwise", "denominator"):
        assert abs(found.terms[name] - getattr(expected, name)) <= RTOL * scale, name
    assert found.contributions.tolist() == pytest.approx(
        expected.contributions, rel=RTOL, abs=RTOL * scale
    )
    assert abs(float(found.contributions.sum()) - found.value) <= RTOL * scale
    error = ref.slope_standard_error(rows, expected.pieces, normalize)
    assert found.se == pytest.approx(error, rel=1e-10)
    jackknife = ref.slope_jackknife(rows, expected.pieces, normalize)
    assert found.estimate.se_jackknife == pytest.approx(jackknife, rel=1e-10)
    if normalize != "sum":
        assert abs(float(found.estimate.influence.sum())) <= RTOL * scale * len(rows)


@pytest.mark.parametrize(("normalize", "score", "baseline"), COMBINATIONS)
def test_delta_method_and_jackknife_agree_for_many_groups(
    normalize: str, score: str, baseline: str
) -> None:
    """They differ by the order of 1/n, n = 1,000."""
    slope = compute_slope(
        *flat(*made_up(7, num_groups=1000)), ("rb", normalize, score, baseline)
    )
    assert abs(slope.estimate.se_jackknife / slope.se - 1) < 0.01


@pytest.mark.parametrize("normalize", ref.NORMALIZATIONS)
def test_a_batch_counted_twice_has_the_same_slope(normalize: str) -> None:
    """A mean stays, a sum doubles, and errors fall with the number of groups."""
    rows, tokens = made_up(3, num_groups=40)
    again = [Row(row.group + 40, [1], row.response_ids) for row in rows]
    once, twice = (
        compute_slope(*flat(*batch), ("rb", normalize, "full", "none"))
        for batch in ((rows, tokens), (rows + again, tokens + tokens))
    )
    factor = 2 if normalize == "sum" else 1
    assert twice.value == pytest.approx(factor * once.value, rel=1e-10)
    # n/(n-1) sum psi^2 with n = 40 and 80.
    error = once.se * math.sqrt((80 / 79) / (40 / 39)) * factor / math.sqrt(2)
    assert twice.se == pytest.approx(error, rel=1e-10)


# What does not exist


def test_the_mean_over_tokens_has_no_to_go_form() -> None:
    for baseline in ("none", "hk"):
        with pytest.raises(ValueError, match="no to-go form"):
            slope_weights(TOKENS, Ragged(LENGTHS), 1.0, ("rb", MEAN, "to_go", baseline))
    assert applicable_estimators(MEAN) == [("full", "none")]
    for normalize in ("per_token", "per_sequence", "sum"):
        assert set(ESTIMATORS) <= set(applicable_estimators(normalize))


@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("sized", [True, False])
def test_fewer_than_two_groups_raise(sized: bool, num_sequences: int) -> None:
    ones = torch.ones(num_sequences, dtype=torch.float64)
    original = Ratio(numerator=ones, size=ones if sized else None)
    with pytest.raises(InputError, match="at least 2 groups in E"):
        slope_from_terms(
            torch.ones(num_sequences, 4, dtype=torch.float64),
            original,
            Draws(groups=torch.zeros(num_sequences, dtype=torch.int64)),
            ("full", "none"),
        )
