"""Quantiles of Student's t, by which a standard error becomes an interval; no torch.

With theta = atan(t / sqrt(d)), the probability of |T| <= t at d degrees of freedom is a
finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4),

    d odd    2/pi [ theta + sin theta (cos + 2/3 cos^3 + 2 4/(3 5) cos^5 + ...) ]
    d even   sin theta (1 + 1/2 cos^2 + 1 3/(2 4) cos^4 + ...)

with powers up to cos^(d - 2). From a thousand degrees of freedom the quantile is expanded
about the normal one (26.7.5), with an error below 1e-13.
"""

import math
from functools import lru_cache
from statistics import NormalDist

CONFIDENCE = 0.95
_LARGE = 1000


def probability_within(t: float, degrees: int) -> float:
    """P(|T| <= t) of Student's t with these degrees of freedom, t >= 0."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    # Powers 1, 3, ... d - 2 or 0, 2, ... d - 2.
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@lru_cache(maxsize=256)
def student_quantile(probability: float, degrees: int) -> float:
    """t with P(T <= t) = probability at an integer number of degrees of freedom.

    Args:
        probability: from 0.5 up, below 1.
        degrees: at least 1.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"no quantile of {probability} with {degrees} degrees")
    normal = NormalDist().inv_cdf(probability)
    if degrees > _LARGE:
        return _expanded(normal, degrees)
    within = 2 * probability - 1
    low, high = 0.0, 1.0
    while probability_within(high, degrees) < within:
        high *= 2
    # As many halvings as a float64 has bits, and some for the doublings.
    for _ in range(64):
        middle = (low + high) / 2
        below = probability_within(middle, degrees) < within
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def _expanded(z: float, degrees: int) -> float:
    coefficients = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(c / degrees**k for k, c in enumerate(coefficients, start=1))


def two_sided(degrees: int) -> float:
    """What a standard error is multiplied by for a 95 % interval."""
    return student_quantile((1 + CONFIDENCE) / 2, degrees)
