"""Families of token weights that hold the entropy, each with one parameter.

A member of a family multiplies every token's term in the gradient of the policy loss by a
weight w(log p, A; parameter), with log p of the policy that takes the step, held fixed in
the derivative of the loss, and A the advantage:

    repo                  w = max(0, 1 - zeta sign(A) log p)
    improbable_failures   w = x where A < 0 and p < 1/2, and 1 elsewhere

`repo` is REPO-R (arXiv 2603.11682): zeta > 0 boosts improbable successes and softens the
penalty on improbable failures; no weight is negative, so that no advantage changes its
sign. zeta = 0 and x = 1 are the plain loss. Where A = 0 the weight is 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class WeightFamily:
    """A family of token weights; both functions are element by element and broadcast.

    Attributes:
        neutral: the parameter of the plain loss.
        limits: smallest and largest parameter.
        weight: w of (log p, advantage, parameter).
        slope: dw / d parameter of the same; where a weight is held at 0 it is 0.
    """

    neutral: float
    limits: tuple[float, float]
    weight: Callable[[Tensor, Tensor, float], Tensor]
    slope: Callable[[Tensor, Tensor, float], Tensor]


def improbable_failures(logp: Tensor, advantage: Tensor) -> Tensor:
    """The tokens with A < 0 and p < 1/2, as a mask."""
    return (advantage < 0) & (logp < math.log(0.5))


def _repo_weight(logp: Tensor, advantage: Tensor, zeta: float) -> Tensor:
    return (1 - zeta * advantage.sign() * logp).clamp(min=0)


def _repo_slope(logp: Tensor, advantage: Tensor, zeta: float) -> Tensor:
    slope = -advantage.sign() * logp
    return slope * (_repo_weight(logp, advantage, zeta) > 0)


def _failures_weight(logp: Tensor, advantage: Tensor, weight: float) -> Tensor:
    of_class = improbable_failures(logp, advantage)
    return torch.where(of_class, weight, torch.ones_like(logp))


def _failures_slope(logp: Tensor, advantage: Tensor, weight: float) -> Tensor:
    return improbable_failures(logp, advantage).to(logp)


FAMILIES = {
    "repo": WeightFamily(
        neutral=0.0, limits=(-1.0, 1.0), weight=_repo_weight, slope=_repo_slope
    ),
    "improbable_failures": WeightFamily(
        neutral=1.0, limits=(0.0, 2.0), weight=_failures_weight, slope=_failures_slope
    ),
}
