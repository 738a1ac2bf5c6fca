"""Are the scores of tokens what their definitions say, ties and constants included?

Every expectation is a double loop over the definition, or an array made by hand.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from entropy_ddp.estimators.shares import (
    TokenTable,
    concentration,
    covariance_score,
    first_places,
    graded,
    judge_proxy,
    probability_deciles,
    proxies,
    ranks,
    rules,
    spearman,
    top_overlap,
)

ATOL = 1e-14  # float64, sums of a dozen numbers of order 1
DOUBLE = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def random_scores(seed: int, count: int, *, levels: int | None = None) -> Tensor:
    """Normal numbers; rounded to few levels, so that many are equal, if asked."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator, dtype=DOUBLE)
    return values if levels is None else (values * levels).round() / levels


def rank_of(value: float, values: list[float]) -> float:
    """Number of smaller values, plus half of the number of other equal ones."""
    smaller = sum(other < value for other in values)
    equal = sum(other == value for other in values) - 1
    return smaller + equal / 2


def naive_spearman(left: list[float], right: list[float]) -> float:
    """Pearson's correlation of the ranks."""
    a = [rank_of(value, left) for value in left]
    b = [rank_of(value, right) for value in right]
    middle = (len(a) - 1) / 2
    products = math.fsum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    squares = [math.fsum((x - middle) ** 2 for x in xs) for xs in (a, b)]
    return products / math.sqrt(squares[0] * squares[1])


def make_table(seed: int = 0) -> TokenTable:
    """Four responses of 3, 5, 4 and 1 tokens; one of them has advantage 0."""
    lengths = torch.tensor([3, 5, 4, 1])
    sequence = torch.arange(4).repeat_interleave(lengths)
    count = len(sequence)
    return TokenTable(
        share=random_scores(seed, count),
        logp=-random_scores(seed + 1, count).abs(),
        entropy=random_scores(seed + 2, count).abs(),
        advantage=tensor(-0.5, 1.5, 0.0, -1.0)[sequence],
        sequence=sequence,
        position=torch.cat([torch.arange(int(n)) for n in lengths]),
    )


# Ranks and their correlation


@pytest.mark.parametrize("levels", [None, 2, 1])
def test_ranks_by_a_double_loop(levels: int | None) -> None:
    values = random_scores(1, 30, levels=levels)
    listed = values.tolist()
    assert ranks(values).tolist() == [rank_of(value, listed) for value in listed]


@pytest.mark.parametrize("levels", [(None, None), (2, None), (1, 2), (2, 1)])
def test_spearman_by_a_double_loop(levels: tuple[int | None, int | None]) -> None:
    left, right = random_scores(2, 40, levels=levels[0]), random_scores(3, 40)
    right = right + 0.7 * left
    if levels[1] is not None:
        right = (right * levels[1]).round()
    expected = naive_spearman(left.tolist(), right.tolist())
    found = spearman(left, right)
    assert found is not None
    assert abs(found - expected) <= ATOL
    assert abs(expected) < 0.99


def test_spearman_sees_the_order_only() -> None:
    values = random_scores(4, 25)
    rising, falling = spearman(values, values.exp()), spearman(values, -values.exp())
    assert rising == pytest.approx(1.0, abs=ATOL)
    assert falling == pytest.approx(-1.0, abs=ATOL)


def test_spearman_of_a_constant_does_not_exist() -> None:
    varied, constant = random_scores(5, 9), torch.full((9,), 0.3, dtype=DOUBLE)
    for pair in ((varied, constant), (constant, varied), (constant, constant)):
        assert spearman(*pair) is None
        assert "spearman" not in judge_proxy(*pair)
    assert spearman(tensor(1.0), tensor(2.0)) is None


# Scores


def test_covariance_score_by_hand() -> None:
    """Means over tokens, not over sequences; its mean is the covariance."""
    logp, advantage = tensor(-1.0, -2.0, -3.0, -6.0), tensor(1.0, 1.0, 1.0, -1.0)
    found = covariance_score(logp, advantage)
    assert found.tolist() == [1.0, 0.5, 0.0, 4.5]
    both = torch.stack([logp, advantage])
    covariance = torch.cov(both, correction=0)[0, 1]
    assert abs(float(found.mean() - covariance)) <= ATOL


def test_covariance_score_of_equal_advantages_is_zero() -> None:
    logp = random_scores(6, 8)
    found = covariance_score(logp, torch.full_like(logp, -0.25))
    assert not bool(found.any())


def test_proxies_token_by_token() -> None:
    table = make_table()
    found = proxies(table)
    count = len(table.share)
    columns = zip(table.logp.tolist(), table.entropy.tolist(), table.advantage.tolist())
    mean_logp, mean_advantage = (
        math.fsum(column.tolist()) / count for column in (table.logp, table.advantage)
    )
    for token, (logp, entropy, advantage) in enumerate(columns):
        expected = {
            "covariance": (logp - mean_logp) * (advantage - mean_advantage),
            "surprisal": -logp,
            "entropy": entropy,
            "advantage": abs(advantage),
            "advantage_logp": advantage * logp,
            "discriminator": advantage * math.exp(logp) * (entropy + logp),
        }
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert abs(float(found[name][token]) - value) <= ATOL, name


def test_top_overlap_by_hand() -> None:
    share = tensor(5.0, -4.0, 3.0, -2.0, 1.0, 0.0, 0.1, 0.2, 0.3, 0.4)
    score = tensor(9.0, 0.0, -8.0, -7.0, 0.0, 0.0, 0.0, 0.0, 0.0, 6.0)
    # The largest by size are 0 1 2 3 of the shares, and 0 2 3 9 of the scores.
    for fraction, expected in ((0.1, 1.0), (0.2, 0.5), (0.3, 2 / 3), (0.4, 0.75)):
        assert top_overlap(score, share, fraction) == expected
    assert top_overlap(score, share, 0.01) == 1.0  # one token at least
    assert top_overlap(-score, -share, 0.4) == 0.75


def test_judge_proxy_has_the_fractions_as_keys() -> None:
    score, share = random_scores(7, 200), random_scores(8, 200)
    judged = judge_proxy(score, share)
    assert list(judged) == ["spearman", "top_overlap"]
    assert list(judged["top_overlap"]) == ["0.01", "0.05", "0.2"]
    for fraction, overlap in judged["top_overlap"].items():
        count = round(200 * float(fraction))
        tops = [
            {t for t in range(200) if sum(x.abs() > x[t].abs()) < count}
            for x in (score, share)
        ]
        assert overlap == len(tops[0] & tops[1]) / count


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        ((1.0, 1.0, 1.0, 1.0), 0.5),
        ((0.0, -8.0, 1.0, 1.0, 1.0), 0.2),
        ((4.0, -3.0, 2.0, 1.0), 0.5),
        ((-1.0, 1.0, 1.0), 2 / 3),
        ((0.0, 0.0, 3.0), 1 / 3),
        ((7.0,), 1.0),
        ((0.0, 0.0), 0.5),
    ],
)
def test_concentration_by_hand(share: tuple[float, ...], expected: float) -> None:
    assert concentration(tensor(*share)) == expected


# Groups of tokens


def test_probability_deciles_hold_a_tenth_each() -> None:
    logp = random_scores(9, 50)
    found = probability_deciles(logp)
    assert torch.bincount(found).tolist() == [5] * 10
    order = logp.argsort()
    assert found[order].tolist() == [place // 5 for place in range(50)]


def test_probability_deciles_of_equal_and_of_few_tokens() -> None:
    """Equal tokens come in their order."""
    equal = torch.zeros(20, dtype=DOUBLE)
    assert probability_deciles(equal).tolist() == [t // 2 for t in range(20)]
    assert probability_deciles(equal[:0]).tolist() == []
    assert probability_deciles(tensor(-1.0)).tolist() == [0]
    assert probability_deciles(tensor(-1.0, -3.0, -2.0)).tolist() == [6, 0, 3]


def noisy(values: Tensor, seed: int, relative: float = 1e-7) -> Tensor:
    """The values as another pass computes them."""
    return values * (1 + relative * random_scores(seed, len(values)))


@pytest.mark.bits
def test_rounding_does_not_choose_among_tokens_in_one_context() -> None:
    """Eight responses of one beginning: its tokens have the same numbers eight times."""
    shared = torch.cat([random_scores(10, 30)] * 8)
    logp, score = -(4 * shared).exp(), shared
    table = make_table()
    for seed in range(20):
        again = probability_deciles(noisy(logp, seed))
        assert torch.equal(again, probability_deciles(logp))
        found, expected = (
            rules(replace(table, share=share, logp=share, advantage=share), 0.1)
            for share in (noisy(score, seed), score)
        )
        for name in list(expected)[:3]:
            assert torch.equal(found[name], expected[name]), name
        assert top_overlap(noisy(score, seed), score, 0.1) == 1.0


def test_what_differs_by_a_hundredth_is_told_apart() -> None:
    """By -log p: of certain tokens, too, the less certain come first."""
    surprisal = 1.01 ** -torch.arange(2000, dtype=DOUBLE)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    grades = graded(surprisal[order])
    assert torch.equal(first_places(grades, 2000), order.argsort())
    assert torch.equal(graded(-surprisal), -graded(surprisal))
    assert graded(tensor(0.0, -0.0, math.inf)).tolist()[:2] == [0, 0]
    found = probability_deciles(-surprisal[order])
    assert found[order.argsort()].tolist() == [place // 200 for place in range(2000)]


# What is left out


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.9])
def test_rules_choose_what_they_say(fraction: float) -> None:
    """Sorted by hand: as many as the fraction says, one at least."""
    table = make_table()
    chosen = [
        set(mask.nonzero()[:, 0].tolist()) for mask in rules(table, fraction).values()
    ]
    tokens = range(len(table.share))
    count = max(1, round(fraction * len(tokens)))
    share, logp = table.share.tolist(), table.logp.tolist()
    advantage = table.advantage.tolist()
    covariance = covariance_score(table.logp, table.advantage).tolist()
    improbable = {t for t in tokens if math.exp(logp[t]) < 0.5}
    assert 0 < len(improbable) < len(tokens)
    assert chosen == [
        set(sorted(tokens, key=lambda t: share[t])[:count]),
        set(sorted(tokens, key=lambda t: -share[t])[:count]),
        set(sorted(tokens, key=lambda t: -covariance[t])[:count]),
        {t for t in improbable if advantage[t] < 0},
        {t for t in improbable if advantage[t] > 0},
        {t for t in tokens if advantage[t] < 0},
        {t for t in tokens if advantage[t] > 0},
    ]
