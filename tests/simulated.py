"""Every estimate of simulated batches, made as the probe makes it.

Batches are drawn from a list of responses: all there are of a small policy, or a large
sample. What an estimator sums over a response depends on no other response, but for Hbar,
in which it is linear, and for the predictions of fitted baselines; so it is summed once
for all batches, and a batch is a selection of rows.

Shape legend: R responses, N sequences of a batch, B batches.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from enumerable import Policy, Table, at, predictions
from torch import Tensor

from entropy_ddp.config import ImportanceMode, Normalize
from entropy_ddp.estimators.baselines import folds_of
from entropy_ddp.estimators.control_variates import adjusted_change, adjusted_slope
from entropy_ddp.estimators.curvature import (
    CurvatureEstimate,
    curvature,
    midpoint_curvature,
)
from entropy_ddp.estimators.entropy import (
    EntropyChange,
    Ratio,
    as_ratio,
    entropy_change,
    per_decision_ratio,
    prefix_log_weights,
    prefix_sums,
    reweighted,
)
from entropy_ddp.estimators.linear import (
    Baseline,
    Score,
    Slope,
    applicable_estimators,
    sequence_terms,
    slope_from_terms,
    slope_weights,
    terms_less_prediction,
)
from entropy_ddp.estimators.midpoint import midpoint_columns, midpoint_slope
from entropy_ddp.estimators.standard_errors import Draws, Estimate

ALL: tuple[Normalize, ...] = ("per_token", "per_sequence", "sum")
MODES: tuple[ImportanceMode, ...] = ("snis", "per_decision")
ESTIMATORS = applicable_estimators("per_token")
FULL, HK, BEST = ("full", "none"), ("to_go", "hk"), ("to_go", "action_value")
PARTNERS: dict[ImportanceMode, tuple[Score, Baseline]] = {
    "snis": FULL,
    "per_decision": HK,
}
UNFITTED = (FULL, ("to_go", "none"), HK)


class Pieces:
    """Sums over each response.

    Args:
        tables: token arrays of all responses, some at a time.
        select: token arrays of the responses with these numbers.
        used: which of the predictors the fitted baselines are given.
    """

    def __init__(
        self,
        tables: Iterable[Table],
        select: Callable[[Tensor], Table],
        used: slice = slice(None),
    ) -> None:
        self._select, self._used = select, used
        parts = [_pieces_of(table) for table in tables]
        self._pieces = {
            name: torch.cat([part[name] for part in parts]) for name in parts[0]
        }

    def __getitem__(self, name: str) -> Tensor:
        """A piece of all responses, [R, ...]."""
        return self._pieces[name]

    def changes(
        self, index: Tensor, draws: Draws, normalize: Normalize
    ) -> Iterator[EntropyChange]:
        """Delta H by `snis`, then by `per_decision`; ESS is not computed."""
        before = self.ratio(index, normalize)
        after = as_ratio(normalize, self["entropy_after"][index], self["length"][index])
        after = reweighted(after, self["log_weight"][index])
        yield entropy_change("snis", before, after, 1.0, draws)
        numerator, size = self["prefix"][index].T
        sums = Ratio(numerator=numerator, size=size)
        after = per_decision_ratio(normalize, sums, 0.0)
        yield entropy_change("per_decision", before, after, 1.0, draws)

    def ratio(self, index: Tensor, normalize: Normalize) -> Ratio:
        """The entropy estimator at theta."""
        return as_ratio(normalize, self["entropy"][index], self["length"][index])

    def slopes(
        self, index: Tensor, draws: Draws, fitted: bool = True
    ) -> dict[tuple[Score, Baseline], Slope]:
        """The slope per token by every estimator, or by those without predictions."""
        original = self.ratio(index, "per_token")
        predicted: dict[Baseline, Tensor] = {}
        if fitted:
            predicted = predictions(self._select(index), draws, "rb", self._used)
        found = {}
        for estimator in ESTIMATORS if fitted else UNFITTED:
            taken = predicted.get(estimator[1])
            terms = self[f"terms {' '.join(estimator if taken is None else HK)}"]
            terms = terms[index]
            terms[:, 0] = terms[:, 1] + terms[:, 2] - original.value * terms[:, 3]
            if taken is not None:
                terms = terms_less_prediction(terms, taken, original.value, "per_token")
            found[estimator] = slope_from_terms(terms, original, draws, estimator)
        return found

    def middle(self, index: Tensor, draws: Draws, normalize: Normalize) -> Slope:
        """The slope in the middle of the step."""
        return midpoint_slope(self["middle"][index], 0.0, normalize, draws)

    def taylor(
        self, index: Tensor, draws: Draws, normalize: Normalize
    ) -> CurvatureEstimate:
        """The second derivative from second derivatives."""
        dlogp, d2logp, first, second = self["derivatives"][index].T
        numerators = [
            as_ratio(normalize, x, self["length"][index]).numerator
            for x in (first, second)
        ]
        return curvature(
            self.ratio(index, normalize),
            draws,
            dlogp=dlogp,
            d2logp=d2logp,
            dnumerator=numerators[0],
            d2numerator=numerators[1],
        )


def _pieces_of(table: Table) -> dict[str, Tensor]:
    """The pieces of some responses."""
    ragged, log_ratio = table.ragged, table["logp_after"] - table["logp"]
    prefix = prefix_sums(
        ragged,
        prefix_log_weights(ragged, log_ratio),
        table["entropy_after"],
        0.0,
    )
    assert prefix.size is not None
    derivatives = ("dlogp", "d2logp", "dentropy", "d2entropy")
    terms = {
        f"terms {' '.join(estimator)}": _terms_at_zero_entropy(table, estimator)
        for estimator in UNFITTED
    }
    return {
        "length": ragged.lengths,
        "entropy": ragged.sum(table["entropy"]),
        "entropy_after": ragged.sum(table["entropy_after"]),
        "log_weight": ragged.sum(log_ratio),
        "prefix": torch.stack([prefix.numerator, prefix.size], dim=1),
        "derivatives": torch.stack([ragged.sum(table[n]) for n in derivatives], dim=1),
        "middle": midpoint_columns(
            table.middle, table["logp_middle"] - table["logp"], ragged, 0.0
        ),
        "zero_mean": table.zero_mean(),
        **terms,
    }


def _terms_at_zero_entropy(table: Table, estimator: tuple[Score, Baseline]) -> Tensor:
    kind = ("rb", "per_token", *estimator)
    weights = slope_weights(table.tokens, table.ragged, 0.0, kind)
    return sequence_terms(table.tokens, table.ragged, weights, "rb")


# The estimates of one batch


def per_token_estimates(
    pieces: Pieces, eta: float, index: Tensor, draws: Draws
) -> dict[str, Estimate]:
    """What a probe tells of a change per token, by default and in its lists."""
    change = {c.is_mode: c for c in pieces.changes(index, draws, "per_token")}
    slope = pieces.slopes(index, draws)
    original = pieces.ratio(index, "per_token")
    fold = folds_of(torch.arange(draws.num_units))
    found = {"before": change["snis"].before, "after": change["snis"].after}
    for estimator, s in slope.items():
        found[f"slope {' '.join(estimator)}"] = s.estimate
    best = slope[BEST]
    for mode, partner in PARTNERS.items():
        plain, noisy = change[mode], slope[partner]
        adjusted = adjusted_change(plain, noisy, best, original, eta, fold)
        found[f"truth {mode}"] = plain.change
        found[f"truth adjusted {mode}"] = adjusted.change
        found[f"difference {mode}"] = plain.change.minus(noisy.estimate, eta)
        found[f"difference adjusted {mode}"] = adjusted.change.minus(best.estimate, eta)
    middle = pieces.middle(index, draws, "per_token")
    bend = midpoint_curvature(middle, slope[HK], eta)
    found["slope middle"] = middle.estimate
    found["curvature midpoint"] = bend.estimate
    found["second order midpoint"] = bend.second_order(eta, best.estimate)
    return found


def other_estimates(
    pieces: Pieces, eta: float, index: Tensor, draws: Draws
) -> dict[str, Estimate]:
    """Those of other normalisations, by other methods, and with control variates."""
    found = {}
    for normalize in ALL[1:]:
        change = {c.is_mode: c for c in pieces.changes(index, draws, normalize)}
        for mode, c in change.items():
            found[f"truth {normalize} {mode}"] = c.change
            found[f"after {normalize} {mode}"] = c.after
        found[f"before {normalize}"] = change["snis"].before
        bend = pieces.taylor(index, draws, normalize)
        found[f"curvature {normalize} taylor"] = bend.estimate
        middle = pieces.middle(index, draws, normalize)
        found[f"slope {normalize} middle"] = middle.estimate
    full = pieces.slopes(index, draws, fitted=False)[FULL]
    original, zero_mean = pieces.ratio(index, "per_token"), pieces["zero_mean"][index]
    adjusted = adjusted_slope(full, original, zero_mean)
    found["slope full none adjusted"] = adjusted.estimate
    bend = pieces.taylor(index, draws, "per_token")
    found["curvature taylor"] = bend.estimate
    second = bend.second_order(eta, full.estimate)
    found["second order taylor"] = second
    snis = next(pieces.changes(index, draws, "per_token")).change
    found["second-order difference taylor"] = snis.minus(second)
    return found


def exact(policy: Policy, eta: float, name: str, sequences: int) -> float:
    """What an estimate of this name is of.

    Args:
        sequences: number of sequences of a batch: the size of a `sum`.
    """
    kind, *words = name.split()
    normalize: Normalize = next((n for n in ALL if n in words), "per_token")
    scale = sequences if normalize == "sum" else 1
    change = policy.change(eta, normalize)
    slope = policy.derivative(1, normalize)
    middle = policy.derivative(1, normalize, place=eta / 2)
    if kind in ("before", "after"):
        place = at(eta if kind == "after" else 0.0)
        return scale * float(policy.entropy(place, normalize, "rb"))
    if kind == "truth":
        return scale * change
    if kind == "slope":
        return scale * (middle if "middle" in words else slope)
    if kind == "curvature" and "midpoint" in words:
        return scale * (middle - slope) * 2 / eta
    if kind == "curvature":
        return scale * policy.derivative(2, normalize)
    if kind == "difference":
        return change - eta * slope
    second = eta * middle
    if "taylor" in words:
        second = eta * slope + eta**2 / 2 * policy.derivative(2, normalize)
    return change - second if kind == "second-order" else second


# What is read off many batches


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """One estimate in all batches, [B] each.

    Attributes:
        value: the estimate.
        se: its standard error by the delta method.
        se_jackknife: the same by the jackknife.
        low, high: its 95 % interval.
    """

    value: Tensor
    se: Tensor
    se_jackknife: Tensor
    low: Tensor
    high: Tensor

    def coverage(self, expected: float) -> float:
        """Share of the intervals that hold the exact value."""
        return float(((self.low <= expected) & (expected <= self.high)).double().mean())

    def bias(self, expected: float) -> float:
        """Mean error in units of the spread."""
        return (float(self.value.mean()) - expected) / float(self.value.std())

    def error_ratio(self, error: Tensor) -> float:
        """Root mean square standard error over the spread of the values."""
        return float(error.square().mean().sqrt() / self.value.std())


def repeated(estimates: Iterable[dict[str, Estimate]]) -> dict[str, Repeated]:
    """The estimates of all batches, by name."""
    rows = defaultdict(list)
    for batch in estimates:
        for name, e in batch.items():
            rows[name].append((e.value, e.se, e.se_jackknife, *e.interval()))
    found = {}
    for name, row in rows.items():
        columns = torch.tensor(row, dtype=torch.float64).T
        names = ("value", "se", "se_jackknife", "low", "high")
        found[name] = Repeated(**dict(zip(names, columns, strict=True)))
    return found
