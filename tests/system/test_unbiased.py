"""Do the estimators estimate the entropy's change, its slope and its curvature?

If the responses of a policy can all be listed, so can all batches of two or three
groups. The sum over these batches of probability times estimate is the expectation, and
must be the exact value where no ratio is formed; where one is, the bias is known or
falls as 1/N.
"""

from collections.abc import Callable, Iterable
from functools import cache
from itertools import combinations_with_replacement, product
from math import factorial

import pytest
import torch
from enumerable import (
    Policy,
    Table,
    at,
    changes,
    curvature_of,
    draws_of,
    middle_slope,
    predictions,
    second_order,
    slopes,
)
from torch import Tensor

from entropy_ddp.config import Integrand, Normalize
from entropy_ddp.estimators import control_variates
from entropy_ddp.estimators.control_variates import adjusted_change, adjusted_slope
from entropy_ddp.estimators.curvature import curvature
from entropy_ddp.estimators.entropy import (
    Ratio,
    Reweighting,
    per_decision_ratio,
    prefix_log_weights,
    prefix_sums,
    reweighted,
)
from entropy_ddp.estimators.linear import (
    Baseline,
    Score,
    applicable_estimators,
    sequence_terms,
    slope_from_terms,
    slope_weights,
)
from entropy_ddp.estimators.midpoint import midpoint_columns, midpoint_slope
from entropy_ddp.estimators.standard_errors import Draws

ATOL = 1e-10  # the contract's bar for expectations in float64
ETA = 0.3
SAMPLER = -0.2  # where E of another policy was sampled
INTEGRANDS: tuple[Integrand, ...] = ("rb", "surprisal")
NORMALIZATIONS: tuple[Normalize, ...] = (
    "per_token",
    "per_sequence",
    "per_sequence_token_mean",
    "sum",
)
UNFITTED = (("full", "none"), ("to_go", "none"), ("to_go", "hk"))
ESTIMATORS = applicable_estimators("sum")
# Of the predictors of fitted baselines 1, Var(log p) and a hidden projection: the proofs
# hold for any, and a fit with all is twenty times as long.
USED = slice(None, None, 4)


@pytest.fixture(autouse=True)
def all_variates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use every variate, however few the groups: the proofs hold for any number."""
    monkeypatch.setattr(control_variates, "GROUPS_PER_VARIATE", 0.01)


@cache
def policy(name: str) -> Policy:
    """Policies of 170, 15, 7 and 6 responses; two of them have two prompts."""
    sizes = {
        "large": (5, 3, 2),
        "long": (3, 3, 1),
        "short": (3, 2, 1),
        "prompts": (2, 2, 2),
    }
    vocabulary, length, num_prompts = sizes[name]
    return Policy(
        vocabulary=vocabulary, length=length, num_prompts=num_prompts, seed=length
    )


BATCHES = {
    "two sequences": ("long", 2, 1),
    "three sequences": ("short", 3, 1),
    "two groups of two": ("prompts", 2, 2),
}
"""Policy, number of groups, responses of each."""
EACH_BATCHES = pytest.mark.parametrize(
    "batches",
    [
        pytest.param(name, marks=pytest.mark.long if name.startswith("three") else ())
        for name in BATCHES
    ],
)


def expectation(
    batches: str, estimates: Callable[[Table, Draws], dict[object, float]]
) -> dict[object, float]:
    """Sum over all batches of probability times estimate."""
    name, num_groups, responses = BATCHES[batches]
    table = policy(name).table(ETA)
    draws = draws_of(num_groups, responses)
    index, probability = policy(name).ordered_batches(num_groups, responses)
    return weighted(table, index, probability, lambda x: estimates(x, draws))


def weighted(
    table: Table,
    index: Iterable[Tensor],
    weights: Tensor,
    estimates: Callable[[Table], dict[object, float]],
) -> dict[object, float]:
    """Sum of weight times estimate over these batches."""
    total: dict[object, float] = {}
    with torch.no_grad():
        for rows, weight in zip(index, weights.tolist(), strict=True):
            for key, value in estimates(table.select(rows)).items():
                total[key] = total.get(key, 0.0) + weight * value
    return total


def num_sequences(batches: str) -> int:
    """N of every batch."""
    return BATCHES[batches][1] * BATCHES[batches][2]


# The oracle itself


@pytest.mark.parametrize("name", ["large", "long", "short", "prompts"])
def test_responses_are_all_there_is(name: str) -> None:
    """Probabilities sum to one at any theta; scores and the entropy's noise to zero."""
    p = policy(name)
    table = p.table(ETA)
    for eta in (0.0, ETA):
        total = float(p.probability(at(eta)).sum())
        assert abs(total - 1) < 1e-14
    log_weights = p.ragged.sum(table["logp_after"] - table["logp"])
    after = p.probability(at(ETA))
    torch.testing.assert_close(p.probabilities * log_weights.exp(), after)
    assert abs(float((p.probabilities * p.ragged.sum(table["dlogp"])).sum())) < 1e-14
    # The two integrands have the same mean: chain rule of the entropy.
    rb, surprisal = (p.entropy(at(0.0), "sum", kind) for kind in INTEGRANDS)
    assert abs(float(rb - surprisal)) < 1e-14


def differences(function: Callable[[float], Tensor], h: float) -> tuple[Tensor, Tensor]:
    """First and second derivative at 0 by five points; errors of order h^4."""
    a, b, c, d, e = (function(k * h) for k in (-2, -1, 0, 1, 2))
    first = (a - 8 * b + 8 * d - e) / (12 * h)
    return first, (-a + 16 * b - 30 * c + 16 * d - e) / (12 * h**2)


@pytest.mark.parametrize("integrand", INTEGRANDS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_exact_derivatives_are_differences_of_the_exact_entropy(
    normalize: Normalize, integrand: Integrand
) -> None:
    p = policy("large")
    found = differences(lambda eta: p.entropy(at(eta), normalize, integrand), 3e-3)
    for order, value in enumerate(found, start=1):
        assert abs(float(value) - p.derivative(order, normalize, integrand)) < 1e-8


@pytest.mark.parametrize(("row", "name"), enumerate(("logp", "entropy")))
def test_tokens_of_the_table_are_those_of_the_policy(row: int, name: str) -> None:
    p = policy("large")
    table = p.table(ETA)
    first, second = differences(lambda eta: p.token_scores(at(eta))[row], 3e-3)
    for found, expected in (
        (table[name + "_after"], p.token_scores(at(ETA))[row]),
        (table["d" + name], first),
        (table["d2" + name], second),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_samples_have_the_listed_probabilities() -> None:
    """Prompts are shared within a group, and responses come as often as they should."""
    p = policy("prompts")
    index = p.sample(num_batches=100, num_groups=100, responses=2, seed=0)
    prompts = p.prompt[index].view(100, 100, 2)
    assert (prompts[..., 0] == prompts[..., 1]).all()
    share = torch.bincount(index.flatten(), minlength=len(p.prompt)) / index.numel()
    # Five standard deviations of the share of 10,000 independent groups.
    spread = (p.probabilities / 10_000).sqrt()
    assert ((share - p.probabilities).abs() < 5 * spread).all()
    for num_groups, responses in ((2, 2), (3, 1)):
        batches, probability = p.ordered_batches(num_groups, responses)
        assert len({tuple(rows) for rows in batches.tolist()}) == len(batches)
        assert abs(float(probability.sum()) - 1) < 1e-14


# The slope


def unweighted_terms(
    p: Policy,
    estimator: tuple[Score, Baseline],
    normalize: Normalize,
    integrand: Integrand,
    mean_entropy: float,
) -> Tensor:
    """`sequence_terms` of every response at a given Hbar, [R, 4]."""
    table = p.table()
    kind = (integrand, normalize, *estimator)
    weights = slope_weights(table.tokens, table.ragged, mean_entropy, kind)
    return sequence_terms(table.tokens, table.ragged, weights, integrand)


def at_infinite_size(p: Policy, ratio: Ratio) -> Ratio:
    """The estimator on a batch with each response as often as it is probable."""
    size = None if ratio.size is None else ratio.size * p.probabilities
    return Ratio(numerator=ratio.numerator * p.probabilities, size=size)


@pytest.mark.parametrize("integrand", INTEGRANDS)
@pytest.mark.parametrize(
    ("normalize", "estimator"),
    [
        (n, e)
        for n, e in product(NORMALIZATIONS, UNFITTED)
        if e in applicable_estimators(n)
    ],
)
def test_slope_of_all_responses(
    normalize: Normalize, estimator: tuple[Score, Baseline], integrand: Integrand
) -> None:
    """Each response as often as it is probable: the exact derivative, term by term."""
    p = policy("large")
    original = at_infinite_size(p, p.table().ratio(normalize, integrand))
    entropy = float(p.entropy(at(0.0), normalize, integrand))
    assert original.value == pytest.approx(entropy, rel=1e-14)
    terms = unweighted_terms(p, estimator, normalize, integrand, original.value)
    terms = terms * p.probabilities[:, None]
    slope = slope_from_terms(
        terms, original, draws_of(len(p.probabilities), 1), estimator
    )
    expected = p.derivative(1, normalize, integrand)
    assert abs(slope.value - expected) < ATOL
    assert abs(sum(slope.terms.values()) - expected) < ATOL


@pytest.mark.parametrize("integrand", INTEGRANDS)
@pytest.mark.parametrize("estimator", UNFITTED)
def test_slope_of_single_sequences(
    estimator: tuple[Score, Baseline], integrand: Integrand
) -> None:
    """Where no ratio is formed every sequence alone is unbiased, whatever Hbar is."""
    p = policy("large")
    exact = p.derivative(1, "sum", integrand)
    without_ratio: list[Normalize] = ["sum"]
    if estimator[0] == "to_go":
        without_ratio.append("per_sequence")
    for normalize, mean_entropy in product(without_ratio, (0.0, 1.7)):
        terms = unweighted_terms(p, estimator, normalize, integrand, mean_entropy)
        centred, score, pathwise, count = p.probabilities @ terms
        assert abs(centred - exact) < ATOL
        assert abs(score + pathwise - exact) < ATOL
        assert abs(count) < ATOL


def test_pathwise_term_of_the_surprisal_has_mean_zero() -> None:
    p = policy("large")
    terms = unweighted_terms(p, ("full", "none"), "sum", "surprisal", 0.0)
    assert abs(float(p.probabilities @ terms[:, 2])) < 1e-14
    assert float(p.probabilities @ terms[:, 2].abs()) > 0.1


@cache
def expected_slopes(batches: str, integrand: Integrand) -> dict[object, float]:
    """Expectation of every slope, by normalisation, estimator and adjustment."""

    def estimates(batch: Table, draws: Draws) -> dict[object, float]:
        predicted = predictions(batch, draws, integrand, USED)
        zero_mean = batch.zero_mean()
        found: dict[object, float] = {}
        for normalize in ("sum", "per_sequence"):
            for estimator, slope in slopes(
                batch, draws, normalize, integrand, predicted=predicted
            ).items():
                found[normalize, *estimator] = slope.value
                if normalize == "sum" and estimator in UNFITTED:
                    original = batch.ratio(normalize, integrand)
                    adjusted = adjusted_slope(slope, original, zero_mean)
                    found["adjusted", *estimator] = adjusted.value
        return found

    return expectation(batches, estimates)


@pytest.mark.parametrize("integrand", INTEGRANDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@EACH_BATCHES
def test_slope_of_batches(
    batches: str, estimator: tuple[Score, Baseline], integrand: Integrand
) -> None:
    """Also with baselines that are fitted on the other groups of the same batch."""
    p = policy(BATCHES[batches][0])
    exact = p.derivative(1, "sum", integrand)
    found = expected_slopes(batches, integrand)
    assert abs(found["sum", *estimator] / num_sequences(batches) - exact) < ATOL
    bias = 0.0
    if estimator == ("full", "none"):
        # - Hbar sum l' / N: the mean of H_i l'_i for i the same sequence, over N.
        table = p.table()
        score = p.ragged.sum(table["dlogp"]) * table.integrand(integrand)
        bias = -float(p.probabilities @ score) / num_sequences(batches)
        assert abs(bias) > 1e-3
    assert abs(found["per_sequence", *estimator] - exact - bias) < ATOL


@pytest.mark.parametrize("integrand", INTEGRANDS)
@pytest.mark.parametrize("estimator", UNFITTED)
@EACH_BATCHES
def test_control_variates_do_not_move_the_mean_of_a_sum(
    batches: str, estimator: tuple[Score, Baseline], integrand: Integrand
) -> None:
    """Coefficients come from the other groups alone.

    With a fitted baseline these groups' influence has seen the own group, and a bias of
    the order of the ratio's is left: `test_coverage` bounds it.
    """
    exact = policy(BATCHES[batches][0]).derivative(1, "sum", integrand)
    found = expected_slopes(batches, integrand)
    assert abs(found["adjusted", *estimator] / num_sequences(batches) - exact) < ATOL


# The bias of a ratio


def multisets(p: Policy, size: int) -> tuple[Tensor, Tensor]:
    """Every batch up to its order, and its probability: for symmetric estimators."""
    num_responses = len(p.probabilities)
    rows = torch.tensor(list(combinations_with_replacement(range(num_responses), size)))
    counts = torch.zeros(len(rows), num_responses, dtype=torch.float64)
    counts.scatter_add_(1, rows, torch.ones(rows.shape, dtype=torch.float64))
    orders = factorial(size) / torch.lgamma(counts + 1).exp().prod(1)
    return rows, orders * p.probabilities[rows].prod(1)


@cache
def ratio_bias(size: int) -> dict[object, float]:
    """Exact bias of every slope per token in batches of `size` sequences."""
    p = policy("short")
    draws = draws_of(size, 1)
    rows, probability = multisets(p, size)
    assert abs(float(probability.sum()) - 1) < 1e-13

    def estimates(batch: Table) -> dict[object, float]:
        predicted = predictions(batch, draws, "rb", USED)
        found = slopes(batch, draws, "per_token", predicted=predicted)
        return {estimator: slope.value for estimator, slope in found.items()}

    mean = weighted(
        p.table(),
        rows,
        probability,
        estimates,
    )
    exact = p.derivative(1, "per_token")
    return {estimator: value - exact for estimator, value in mean.items()}


def leading_bias(estimator: tuple[Score, Baseline]) -> float:
    """N times the bias for N to infinity, by the second-order delta method.

    The slope per token is (b - (a / d) r) / d of four means; the bias of a smooth
    function of means is tr(f'' Cov) / 2 / N.
    """
    p = policy("short")
    ratio = p.table().ratio("per_token", "rb")
    terms = unweighted_terms(p, estimator, "per_token", "rb", 0.0)
    columns = torch.stack([terms[:, 0], terms[:, 3], ratio.numerator, ratio.size])
    mean = columns @ p.probabilities
    centred = columns - mean[:, None]
    covariance = (centred * p.probabilities) @ centred.T

    def slope(x: Tensor) -> Tensor:
        return (x[0] - x[2] / x[3] * x[1]) / x[3]

    hessian = torch.autograd.functional.hessian(slope, mean)
    return float((hessian * covariance).sum()) / 2


@pytest.mark.long
@pytest.mark.parametrize("estimator", UNFITTED)
def test_bias_of_the_slope_per_token_falls_as_one_over_n(
    estimator: tuple[Score, Baseline],
) -> None:
    """Exact biases at N = 3 and 6; without the next order, what theory says."""
    leading = leading_bias(estimator)
    small, large = (size * ratio_bias(size)[estimator] / leading for size in (3, 6))
    assert abs(large - 1) < abs(small - 1) < 0.1
    assert abs(2 * large - small - 1) < 0.02


@pytest.mark.parametrize("estimator", ESTIMATORS[3:])
def test_bias_with_fitted_baselines_falls_as_one_over_n(
    estimator: tuple[Score, Baseline],
) -> None:
    """The predictions, too, are multiplied by an Hbar that has seen the own group."""
    small, large = (ratio_bias(size)[estimator] for size in (3, 6))
    assert small / large == pytest.approx(2, rel=0.1)


# The change of the entropy


@pytest.mark.parametrize("integrand", INTEGRANDS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_change_of_all_responses(normalize: Normalize, integrand: Integrand) -> None:
    """Each response as often as it is probable: weights give exactly H(theta')."""
    p = policy("large")
    table, ragged = p.table(ETA), p.ragged
    exact = p.entropy(at(ETA), normalize, integrand)
    after = at_infinite_size(p, table.ratio(normalize, integrand, "_after"))
    log_ratio = table["logp_after"] - table["logp"]
    found = reweighted(after, ragged.sum(log_ratio)).value
    assert abs(found - float(exact)) < ATOL
    if integrand == "rb" and normalize != "per_sequence_token_mean":
        log_weights = prefix_log_weights(ragged, log_ratio)
        sums = prefix_sums(ragged, log_weights, table["entropy_after"], 0.5)
        ratio = per_decision_ratio(
            normalize,
            Ratio(
                numerator=sums.numerator * p.probabilities,
                size=sums.size * p.probabilities,
            ),
            0.5,
        )
        # The number of sequences is not weighted: here it is sum p = 1.
        value = ratio.value if normalize == "per_token" else ratio.numerator.sum()
        assert abs(float(value) - float(exact)) < ATOL


@pytest.mark.parametrize("integrand", INTEGRANDS)
@EACH_BATCHES
def test_change_of_a_sum(batches: str, integrand: Integrand) -> None:
    """`snis` and `per_decision` have no bias over batches; `clip` does."""
    p = policy(BATCHES[batches][0])

    def estimates(batch: Table, draws: Draws) -> dict[object, float]:
        found = changes(batch, draws, "sum", integrand)
        return {mode: change.value for mode, change in found.items()}

    found = expectation(batches, estimates)
    exact = num_sequences(batches) * p.change(ETA, "sum", integrand)
    assert abs(found["snis"] - exact) < ATOL
    if integrand == "rb":
        assert abs(found["per_decision"] - exact) < ATOL


def test_change_per_sequence_per_decision_has_no_bias() -> None:
    """N is not weighted and so there is no ratio."""
    p = policy(BATCHES["two sequences"][0])

    def estimates(batch: Table, draws: Draws) -> dict[object, float]:
        found = changes(batch, draws, "per_sequence")
        return {mode: change.value for mode, change in found.items()}

    found = expectation("two sequences", estimates)
    exact = p.change(ETA, "per_sequence")
    assert abs(found["per_decision"] - exact) < ATOL
    assert abs(found["snis"] - exact) > 1e-4


@EACH_BATCHES
def test_first_order_noise_has_mean_zero_whatever_share_is_removed(
    batches: str,
) -> None:
    """The share of a group comes from the other groups alone, where no baseline is fitted.

    The coefficients of a fitted one come from all folds but one, and so do the shares: a
    bias of the order of the ratio's is left, which falls as 1/N.
    """
    p = policy(BATCHES[batches][0])
    fold = torch.arange(BATCHES[batches][1])

    def estimates(batch: Table, draws: Draws) -> dict[object, float]:
        change = changes(batch, draws, "sum")["snis"]
        predicted = predictions(batch, draws, "rb", USED)
        found = slopes(batch, draws, "sum", predicted=predicted)
        original = batch.ratio("sum", "rb")
        partner, best = found["full", "none"], found["to_go", "hk"]
        adjusted = adjusted_change(change, partner, best, original, ETA, fold)
        assert adjusted.control_weight is not None
        return {
            "value": adjusted.value,
            "weight": adjusted.control_weight,
            "moved": abs(adjusted.value - change.value),
        }

    found = expectation(batches, estimates)
    exact = num_sequences(batches) * p.change(ETA, "sum")
    assert abs(found["value"] - exact) < ATOL
    assert 0.1 < found["weight"] < 1 and found["moved"] > 1e-2


# The slope in the middle of the step


@pytest.mark.parametrize("normalize", ["per_token", "per_sequence", "sum"])
def test_middle_slope_of_all_responses(normalize: Normalize) -> None:
    """Each response as often as it is probable: the derivative there, by autograd."""
    p = policy("large")
    table = p.table(ETA)
    log_ratio = table["logp_middle"] - table["logp"]
    columns = midpoint_columns(table.middle, log_ratio, table.ragged, 0.7)
    columns = columns * p.probabilities[:, None]
    if normalize != "per_token":
        # The number of sequences is not weighted: a mean is a sum of probable ones.
        normalize = "sum"
    draws = draws_of(len(p.probabilities), 1)
    found = midpoint_slope(columns, 0.7, normalize, draws).value
    assert abs(found - p.derivative(1, normalize, place=ETA / 2)) < ATOL


@EACH_BATCHES
def test_middle_slope_of_batches(batches: str) -> None:
    """Without a ratio there is no bias."""
    p = policy(BATCHES[batches][0])

    def estimates(batch: Table, draws: Draws) -> dict[object, float]:
        return {n: middle_slope(batch, draws, n).value for n in ("sum", "per_sequence")}

    found = expectation(batches, estimates)
    exact = p.derivative(1, "sum", place=ETA / 2)
    assert abs(found["sum"] / num_sequences(batches) - exact) < ATOL
    assert abs(found["per_sequence"] - exact) < ATOL


# E of another policy


def expectation_elsewhere(
    batches: str, estimates: Callable[[Table, Tensor, Draws], dict[object, float]]
) -> dict[object, float]:
    """Sum over all batches of probability where E was sampled times estimate.

    The estimate is given the sampler's log-probabilities, [t].
    """
    name, num_groups, responses = BATCHES[batches]
    p, draws = policy(name), draws_of(num_groups, responses)
    sampler = p.table(SAMPLER)
    index, probability = p.ordered_batches(num_groups, responses)
    ratio = p.probability(at(SAMPLER)) / p.probabilities
    pairs = p.table(ETA), sampler
    total: dict[object, float] = {}
    with torch.no_grad():
        for rows, weight in zip(index, probability * ratio[index].prod(1), strict=True):
            batch, there = (table.select(rows) for table in pairs)
            found = estimates(batch, there["logp_after"], draws)
            for key, value in found.items():
                total[key] = total.get(key, 0.0) + float(weight) * value
    return total


@EACH_BATCHES
def test_E_of_another_policy_is_weighed_without_bias(batches: str) -> None:
    """Entropy, change and every slope, with baselines fitted on the same batch."""
    p = policy(BATCHES[batches][0])

    def estimates(batch: Table, sampled: Tensor, draws: Draws) -> dict[object, float]:
        ragged = batch.ragged
        weighting = Reweighting.of(ragged, batch["logp"] - sampled)
        ratios = {}
        for suffix in ("", "_after"):
            weights = prefix_log_weights(ragged, batch["logp" + suffix] - sampled)
            sums = prefix_sums(ragged, weights, batch["entropy" + suffix], 0.0)
            ratios[suffix] = per_decision_ratio("sum", sums, 0.0).value
        found: dict[object, float] = {
            "before": ratios[""],
            "change": ratios["_after"] - ratios[""],
        }
        predicted = predictions(batch, draws, "rb", USED, weighting)
        for estimator, slope in slopes(
            batch, draws, "sum", predicted=predicted, reweighting=weighting
        ).items():
            found[estimator] = slope.value
        unweighted = slopes(batch, draws, "sum", predicted=predicted)
        found["unweighted"] = unweighted["to_go", "hk"].value
        return found

    found = expectation_elsewhere(batches, estimates)
    count = num_sequences(batches)
    exact = {
        "before": float(p.entropy(at(0.0), "sum", "rb")),
        "change": p.change(ETA, "sum"),
        **dict.fromkeys(applicable_estimators("sum", True), p.derivative(1, "sum")),
    }
    for key, value in exact.items():
        assert abs(found[key] / count - value) < ATOL, key
    # What is taken for a sample of this policy tells of another one.
    assert abs(found["unweighted"] / count - p.derivative(1, "sum")) > 1e-2


# The second derivative


@pytest.mark.parametrize("integrand", INTEGRANDS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_curvature_of_all_responses(normalize: Normalize, integrand: Integrand) -> None:
    """Each response as often as it is probable: exactly the second derivative."""
    p = policy("large")
    table = p.table()
    derivatives = second_order(table, normalize, integrand)
    found = curvature(
        at_infinite_size(p, table.ratio(normalize, integrand)),
        draws_of(len(p.probabilities), 1),
        dlogp=derivatives["dlogp"],
        d2logp=derivatives["d2logp"],
        dnumerator=derivatives["dnumerator"] * p.probabilities,
        d2numerator=derivatives["d2numerator"] * p.probabilities,
    )
    assert abs(found.value - p.derivative(2, normalize, integrand)) < ATOL


@pytest.mark.parametrize("integrand", INTEGRANDS)
@EACH_BATCHES
def test_curvature_of_a_sum(batches: str, integrand: Integrand) -> None:
    p = policy(BATCHES[batches][0])

    def estimates(batch: Table, draws: Draws) -> dict[object, float]:
        return {"value": curvature_of(batch, draws, "sum", integrand).value}

    found = expectation(batches, estimates)["value"] / num_sequences(batches)
    assert abs(found - p.derivative(2, "sum", integrand)) < ATOL
