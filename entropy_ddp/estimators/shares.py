"""Which tokens of the update batch move the entropy, and how well cheap scores tell.

The first-order change is linear in the step, and AdamW's step is a sum: momentum, weight
decay, and one part for every token of U (with the denominator and the clip coefficient of
the full gradient held fixed),

    delta_h1 = <grad H, momentum> + <grad H, decay> + sum_ik share_ik
    share_ik = -a_ik D_z log p_ik,      z = gain * grad H

with a_ik the weight of log p_ik in the loss's gradient, gain the factor by which the step
multiplies the gradient, and D_z the derivative along z: one backward pass over E and one
forward-mode pass over U give every token's share, in nats.

`proxies` are scores that practitioners use in place of the share because they need no
gradient. All rank tokens; none has the units of an entropy change.

Shape legend: T tokens and N sequences of U.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOP_SHARES = (0.01, 0.05, 0.2)
NUM_DECILES = 10


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """What is known of every token of U, float64, [T] each, in file order.

    Attributes:
        share: exact share in delta_h1, nats.
        logp: log-probability.
        entropy: entropy of the distribution it was drawn from.
        advantage: advantage of its sequence.
        sequence: number of its sequence, int64.
        position: 0-based position in its response, int64.
    """

    share: Tensor
    logp: Tensor
    entropy: Tensor
    advantage: Tensor
    sequence: Tensor
    position: Tensor


def covariance_score(logp: Tensor, advantage: Tensor) -> Tensor:
    """(log p - mean)(A - mean), means over the tokens of the batch, [T].

    Its mean is the covariance that the entropy-mechanism paper (arXiv 2505.22617) makes
    responsible for entropy loss: a positive score predicts a negative share. Exactly 0
    where all advantages are equal, whatever their mean rounds to.
    """
    if bool((advantage == advantage[:1]).all()):
        return torch.zeros_like(logp)
    return (logp - logp.mean()) * (advantage - advantage.mean())


def proxies(table: TokenTable) -> dict[str, Tensor]:
    """Cheap scores of every token, [T] each, signed so that they predict entropy loss.

    `covariance` as above; `surprisal` -log p; `entropy` H; `advantage` |A|;
    `advantage_logp` A log p; `discriminator` -A p (H + log p) (arXiv 2602.03392).
    """
    probability = table.logp.exp()
    return {
        "covariance": covariance_score(table.logp, table.advantage),
        "surprisal": -table.logp,
        "entropy": table.entropy,
        "advantage": table.advantage.abs(),
        "advantage_logp": table.advantage * table.logp,
        "discriminator": table.advantage * probability * (table.entropy + table.logp),
    }


def graded(values: Tensor) -> Tensor:
    """Integers in the order of these values, equal where they agree to 0.1 %, [T].

    Tokens in the same context have the same numbers, of which every pass computes other
    last digits: to choose tokens by those would be to choose by rounding.
    """
    # The sign, the exponent and ten digits of the fraction, rounded.
    bits = values.double().abs().view(torch.int64)
    return ((bits + (1 << 41)) >> 42) * values.sign().long()


def first_places(grades: Tensor, count: int) -> Tensor:
    """Places of the largest, in their order; of equal ones those that come first."""
    return grades.argsort(descending=True, stable=True)[:count]


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties sharing the mean of theirs, [T]."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    # Of a run of ties that ends at rank `last` - 1.
    mean_rank = last - (count.double() + 1) / 2
    return mean_rank[place]


def spearman(left: Tensor, right: Tensor) -> float | None:
    """Rank correlation of two scores [T]; None if one of them is constant.

    What agrees to 0.1 % has one rank (`graded`).
    """
    a, b = ranks(graded(left)), ranks(graded(right))
    a, b = a - a.mean(), b - b.mean()
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    return float(a @ b) / scale if scale else None


def top_overlap(score: Tensor, share: Tensor, fraction: float) -> float | None:
    """Share of the tokens largest by |share| that are also largest by |score|.

    None if all are 0: there is no largest.
    """
    if not bool(score.any() and share.any()):
        return None
    count = max(1, round(fraction * len(share)))
    chosen, wanted = (_largest(values.abs(), count) for values in (score, share))
    return int((chosen & wanted).sum()) / count


def judge_proxy(score: Tensor, share: Tensor) -> dict[str, Any]:
    """How well a score ranks tokens against their exact share.

    Returns:
        `spearman` of score and share (a score that predicts entropy loss has a negative
        one), and `top_overlap` of the tokens largest by absolute value, by fraction;
        each only where it is defined.
    """
    overlaps = {f"{f:g}": top_overlap(score, share, f) for f in TOP_SHARES}
    judged: dict[str, Any] = {
        "top_overlap": {f: o for f, o in overlaps.items() if o is not None}
    }
    correlation = spearman(score, share)
    return judged if correlation is None else {"spearman": correlation} | judged


def concentration(share: Tensor) -> float:
    """Smallest fraction of tokens that holds half of the sum of |share|.

    0.5 if all tokens count alike; near 0 if few do all of it.
    """
    sizes = share.abs().sort(descending=True).values
    running = sizes.cumsum(0)
    if not float(running[-1]):
        return 0.5
    # The first place at which half is reached.
    needed = int((running < running[-1] / 2).sum()) + 1
    return needed / len(share)


def probability_deciles(logp: Tensor) -> Tensor:
    """Tenth of the tokens that each is in by its probability, 0 the least probable, [T].

    As many in each, or one more; tokens of one probability come in their order. They
    are compared by -log p, which tells apart the probable from the certain.
    """
    decile = torch.empty(len(logp), dtype=torch.int64)
    places = first_places(graded(-logp), len(logp))
    decile[places] = torch.arange(len(logp)) * NUM_DECILES // max(len(logp), 1)
    return decile


def rules_by_share(share: Tensor, fraction: float) -> dict[str, Tensor]:
    """Choices of the tokens with the largest shares, as masks by name in words, [T].

    Args:
        fraction: share of the tokens that each chooses.
    """
    count, percent = _number_chosen(len(share), fraction)
    return {
        # A loss of entropy is a negative share.
        f"largest entropy loss, {percent}": _largest(-share, count),
        f"largest entropy gain, {percent}": _largest(share, count),
    }


def rules(table: TokenTable, fraction: float) -> dict[str, Tensor]:
    """Choices of tokens to leave out of the update, as masks by their name in words, [T].

    Those by share first; the others do not look at shares.

    Args:
        fraction: share of the tokens that a rule which ranks tokens chooses.
    """
    count, percent = _number_chosen(len(table.share), fraction)
    covariance = covariance_score(table.logp, table.advantage)
    failed, succeeded = table.advantage < 0, table.advantage > 0
    improbable = table.logp < math.log(0.5)
    return rules_by_share(table.share, fraction) | {
        f"largest covariance, {percent}": _largest(covariance, count),
        "tokens with A < 0 and p < 0.5": failed & improbable,
        "tokens with A > 0 and p < 0.5": succeeded & improbable,
        "all tokens with A < 0": failed,
        "all tokens with A > 0": succeeded,
    }


def _number_chosen(num_tokens: int, fraction: float) -> tuple[int, str]:
    """How many tokens a rule which ranks them chooses, and its words for it."""
    count = max(1, round(fraction * num_tokens))
    return count, f"{100 * fraction:g} % of the tokens"


def _largest(score: Tensor, count: int) -> Tensor:
    """The tokens with the largest scores; of equal ones those that come first, [T]."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[first_places(graded(score), count)] = True
    return mask
