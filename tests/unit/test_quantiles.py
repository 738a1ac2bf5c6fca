"""Are quantiles of Student's t those of the tables, and of its own density?"""

import math

import pytest

from entropy_ddp.estimators.quantiles import (
    probability_within,
    student_quantile,
    two_sided,
)

# To the digits of printed tables: probability, degrees of freedom, quantile.
TABLE = [
    (0.975, 1, 12.706),
    (0.975, 2, 4.303),
    (0.975, 3, 3.182),
    (0.975, 10, 2.228),
    (0.975, 30, 2.042),
    (0.975, 120, 1.980),
    (0.80, 5, 0.920),
    (0.995, 15, 2.947),
]


@pytest.mark.parametrize(("probability", "degrees", "expected"), TABLE)
def test_quantiles_of_the_tables(
    probability: float, degrees: int, expected: float
) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(expected, abs=6e-4)


def density(t: float, degrees: int) -> float:
    logarithm = (
        math.lgamma((degrees + 1) / 2)
        - math.lgamma(degrees / 2)
        - math.log(math.pi * degrees) / 2
        - (degrees + 1) / 2 * math.log1p(t * t / degrees)
    )
    return math.exp(logarithm)


@pytest.mark.parametrize("degrees", [1, 2, 3, 8, 63, 1000])
def test_the_probability_is_the_integral_of_the_density(degrees: int) -> None:
    """By Simpson's rule with 2,000 intervals."""
    end, count = 2.5, 2000
    width = end / count
    total = sum(
        (1 if k in (0, count) else 4 if k % 2 else 2) * density(k * width, degrees)
        for k in range(count + 1)
    )
    expected = 2 * total * width / 3
    assert probability_within(end, degrees) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("probability", [0.6, 0.8, 0.975])
def test_the_expansion_joins_the_sum(probability: float) -> None:
    """Across a thousand degrees of freedom; far beyond it is the normal quantile."""
    below, above = (student_quantile(probability, d) for d in (1000, 1001))
    assert below > above
    assert below - above == pytest.approx(below * 1e-6, rel=3)
    far = student_quantile(probability, 10**9)
    assert probability_within(far, 1001) == pytest.approx(2 * probability - 1, abs=3e-4)
    assert two_sided(10**9) == pytest.approx(1.959963984540054, rel=1e-8)


@pytest.mark.parametrize(("probability", "degrees"), [(0.4, 3), (1.0, 3), (0.9, 0)])
def test_there_is_no_such_quantile(probability: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="no quantile"):
        student_quantile(probability, degrees)
