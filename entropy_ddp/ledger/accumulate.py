"""What a run's steps add up to.

The responses of every probed step are its own, so that errors of different steps are
independent and a sum's error is the root of the sum of squares. Up to and with step s,

    truth(s)         = sum of importance-weighted changes
    first_order(s)   = sum of slopes along the steps = momentum + decay + gradient
    second_order(s)  = sum of slopes at the middle of the steps

so that the truth is momentum + decay + gradient + curvature + rest, with curvature =
second_order - first_order; the rest is of third order, and what a step that was taken
again from a dump of its batch differs from the trainer's. The curve is the entropy on
fresh responses before each probed step and at the end: nothing of it enters the sums.

Errors are the jackknife's where a line has them. The degrees of freedom of a sum's are

    df = (sum se_s^2)^2 / sum (se_s^4 / (n_s - 1)),     n_s groups in the E of step s

(Satterthwaite 1946), by which it has a 95 % interval.

Sums are of the probed steps. Where those are not all, `scaled` lets each stand for the
steps since the one before: with N steps of which n were probed, N / n times the sum, of
error N / sqrt(n) times the standard deviation of the steps' changes. A few steps may be
alike by luck: it is at least N / n times the error of their sum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from entropy_ddp.estimators.quantiles import two_sided
from entropy_ddp.ledger.lines import RunLog

SERIES = ("truth", "first_order", "second_order")
PARTS = ("momentum", "decay", "gradient")
# The paired difference of the truth with each prediction in a step's line.
PAIRED = {"first_order": "truth_minus_first", "second_order": "truth_minus_second"}
TOP = 20
# Effective share of E below which a truth is not to be trusted: truth.ess_abort.
LEAST_ESS_FRACTION = 0.1

Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The ledger of a run, in nats per token.

    Attributes:
        steps: {first, last, probed, total, attributed}: steps by number; how many were
            probed of how many; how many of those are split into parts.
        curve: [{step, value, se}], `step` the number of steps taken before.
        cumulative: [{step, truth, first_order, second_order}], each {value, se}.
        totals: the last of them by name, and `curve`, the change of the curve; with its
            95 % `interval` where every line has jackknife errors. Of the predictions also
            `difference_se`, the paired error of truth - prediction, where every step has
            one.
        parts: {momentum, decay, gradient, curvature, rest}; the last two where known.
        part_errors: standard errors of `curvature` and `rest` from their paired errors
            at every step, of `total`, the sum of all parts, and of `first_order`, the
            sum of the first three. These three have none of their own: shares are
            conditional on the responses that they were measured on.
        cumulative_parts: [{step, momentum, decay, gradient}].
        tokens: the gradient part by sign of the advantage, and what is unattributed.
        deciles: the gradient part by probability of the token, least probable first.
        by_token, by_prompt: the largest sums of shares.
        top_tokens: the single tokens with the largest shares, with their step.
        checks: the worst of every check.
        scaled: totals of all steps by name, where not all were probed.
        notes: sentences on what is missing.
    """

    steps: dict[str, int]
    curve: list[Entry]
    cumulative: list[Entry]
    totals: dict[str, Entry]
    parts: dict[str, float]
    part_errors: dict[str, float]
    cumulative_parts: list[Entry]
    tokens: dict[str, float]
    deciles: list[float]
    by_token: list[Entry]
    by_prompt: list[Entry]
    top_tokens: list[Entry]
    checks: dict[str, float]
    scaled: dict[str, Entry] | None
    notes: list[str]

    @property
    def share_error(self) -> float:
        """Standard error of the sum that parts and shares are of."""
        return self.part_errors.get("first_order", 0.0)

    @property
    def relative_error(self) -> float:
        """The same over the size of that sum; what is not known at all is 1."""
        total = abs(math.fsum(self.parts.get(name, 0.0) for name in PARTS))
        return min(1.0, self.share_error / total) if total else 1.0

    @property
    def trusted(self) -> bool:
        """Whether no truth hangs on a few responses."""
        return self.checks.get("ess_fraction", 1.0) >= LEAST_ESS_FRACTION

    @property
    def complete(self) -> bool:
        """Whether every step was probed."""
        return self.steps["probed"] == self.steps["total"]


def accumulate(log: RunLog) -> Ledger:
    """The ledger of a run from its lines."""
    entries = log.entries
    attributed = [entry for entry in entries if "parts" in entry]
    first = log.runs[0]["first_step"] if log.runs else _begin(entries[0]) + 1
    last = log.end["step"] if log.end is not None else entries[-1]["step"]
    steps = {
        "first": first,
        "last": last,
        "probed": sum(map(_num_steps, entries)),
        "total": last - first + 1,
        "attributed": len(attributed),
    }
    curve = [{"step": _begin(entry), **_pair(entry["entropy"])} for entry in entries]
    if log.end is not None:
        curve.append({"step": log.end["step"], **_pair(log.end["entropy"])})
    series = [s for s in SERIES if all(s in entry for entry in entries)]
    cumulative = _cumulative(entries, series)
    totals = {name: cumulative[-1][name] for name in series} | _change(curve)
    for name in series:
        interval = _interval(totals[name], entries, name)
        if interval is not None:
            totals[name] = totals[name] | {"interval": interval}
    for name, key in PAIRED.items():
        if name in series and all(key in entry for entry in entries):
            totals[name] = totals[name] | {"difference_se": _error(entries, key)}
    complete = steps["probed"] == steps["total"]
    parts = _parts(attributed)
    return Ledger(
        steps=steps,
        curve=curve,
        cumulative=cumulative,
        totals=totals,
        parts=parts,
        part_errors=_part_errors(attributed, parts),
        cumulative_parts=_cumulative_parts(attributed),
        tokens=_summed(attributed, "tokens"),
        deciles=[sum(x) for x in zip(*(entry["deciles"] for entry in attributed))],
        by_token=_largest(attributed, "by_token", lambda row: row["token_id"]),
        by_prompt=_largest(attributed, "by_prompt", lambda row: row["prompt"]),
        top_tokens=_top_tokens(attributed),
        checks=_checks(entries),
        scaled=None if complete else _scaled(entries, series, steps),
        notes=log.notes + _notes(log, steps, series),
    )


def _num_steps(entry: Entry) -> int:
    """Steps that an entry is about: several between two checkpoints."""
    return entry.get("num_steps", 1)


def _begin(entry: Entry) -> int:
    """Number of steps taken before those of the entry."""
    return entry["step"] - _num_steps(entry)


def _own_error(found: Entry) -> float:
    """A standard error of a line: by the jackknife where the version wrote it."""
    return float(found["se_jackknife" if "se_jackknife" in found else "se"])


def _pair(found: Entry) -> Entry:
    return {"value": found["value"], "se": _own_error(found)}


def _interval(total: Entry, entries: list[Entry], name: str) -> list[float] | None:
    """95 % interval of a sum over steps; None where a line has no jackknife error."""
    if not all("se_jackknife" in entry[name] for entry in entries):
        return None
    squares = [entry[name]["se_jackknife"] ** 2 for entry in entries]
    groups = [entry["E"]["num_groups"] for entry in entries]
    fourth = sum(s**2 / (n - 1) for s, n in zip(squares, groups, strict=True))
    degrees = sum(squares) ** 2 / fourth if fourth else min(groups) - 1
    half = two_sided(max(1, math.floor(degrees))) * total["se"]
    return [total["value"] - half, total["value"] + half]


def _cumulative(entries: list[Entry], series: list[str]) -> list[Entry]:
    rows, value, square = [], dict.fromkeys(series, 0.0), dict.fromkeys(series, 0.0)
    for entry in entries:
        row: Entry = {"step": entry["step"]}
        for name in series:
            value[name] += entry[name]["value"]
            square[name] += _own_error(entry[name]) ** 2
            row[name] = {"value": value[name], "se": math.sqrt(square[name])}
        rows.append(row)
    return rows


def _change(curve: list[Entry]) -> dict[str, Entry]:
    """Last less first of the curve; none of a curve of one point."""
    if len(curve) < 2:
        return {}
    begin, end = curve[0], curve[-1]
    return {
        "curve": {
            "value": end["value"] - begin["value"],
            "se": math.hypot(begin["se"], end["se"]),
        }
    }


def _parts(attributed: list[Entry]) -> dict[str, float]:
    """Of the attributed steps alone."""
    parts = _summed(attributed, "parts")
    # Several steps between two checkpoints: the parts are of the first of them.
    if not attributed or any(_num_steps(entry) > 1 for entry in attributed):
        return parts
    known = [s for s in SERIES if all(s in entry for entry in attributed)]
    total = {s: sum(entry[s]["value"] for entry in attributed) for s in known}
    if "second_order" in total:
        parts["curvature"] = total["second_order"] - total["first_order"]
        if "truth" in total:
            parts["rest"] = total["truth"] - sum(parts.values())
    return parts


def _part_errors(attributed: list[Entry], parts: dict[str, float]) -> dict[str, float]:
    """Of what every step's lines have an error for."""
    if not attributed:
        return {}
    errors = {"first_order": _error(attributed, "first_order")}
    whole = "first_order"
    for part, key, sum_of in (
        ("curvature", "second_minus_first", "second_order"),
        ("rest", "truth_minus_second", "truth"),
    ):
        if part in parts:
            whole = sum_of
            if all(key in entry for entry in attributed):
                errors[part] = _error(attributed, key)
    # Several steps between two checkpoints: the parts are of the first of them alone.
    if all(_num_steps(entry) == 1 for entry in attributed):
        errors["total"] = _error(attributed, whole)
    return errors


def _error(entries: list[Entry], key: str) -> float:
    """Root of the sum of squares: the responses of every step are its own."""
    return math.hypot(*(_own_error(entry[key]) for entry in entries))


def _cumulative_parts(attributed: list[Entry]) -> list[Entry]:
    rows, running = [], dict.fromkeys(PARTS, 0.0)
    for entry in attributed:
        for name in PARTS:
            running[name] += entry["parts"][name]
        rows.append({"step": entry["step"], **running})
    return rows


def _summed(attributed: list[Entry], key: str) -> dict[str, float]:
    totals: dict[str, float] = {}
    for entry in attributed:
        for name, value in entry[key].items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


def _largest(
    attributed: list[Entry], key: str, name_of: Callable[[Entry], Any]
) -> list[Entry]:
    """Sums of rows of the same name; of each step only its largest are known."""
    totals: dict[Any, Entry] = {}
    for entry in attributed:
        for row in entry[key]:
            total = totals.setdefault(
                name_of(row), row | {"share": 0.0, "num_tokens": 0}
            )
            total["share"] += row["share"]
            total["num_tokens"] += row["num_tokens"]
    return sorted(totals.values(), key=lambda row: -abs(row["share"]))[:TOP]


def _top_tokens(attributed: list[Entry]) -> list[Entry]:
    rows = [
        {"step": entry["step"], **row}
        for entry in attributed
        for row in entry["top_tokens"]
    ]
    return sorted(rows, key=lambda row: -abs(row["share"]))[:TOP]


def _checks(entries: list[Entry]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for entry in entries:
        for name, value in entry.get("checks", {}).items():
            if name != "identity":
                worst[name] = max(worst.get(name, 0.0), value)
    fractions = [e["truth"]["ess_fraction"] for e in entries if "truth" in e]
    return worst | ({"ess_fraction": min(fractions)} if fractions else {})


def _scaled(
    entries: list[Entry], series: list[str], steps: dict[str, int]
) -> dict[str, Entry]:
    count, total = len(entries), steps["total"]
    factor = total / steps["probed"]
    scaled = {}
    for name in series:
        values = [entry[name]["value"] for entry in entries]
        mean = sum(values) / count
        row = {"value": factor * sum(values)}
        if count > 1:
            variance = sum((x - mean) ** 2 for x in values) / (count - 1)
            spread = math.sqrt(count * variance)
            row["se"] = factor * max(spread, _error(entries, name))
        scaled[name] = row
    return scaled


def _notes(log: RunLog, steps: dict[str, int], series: list[str]) -> list[str]:
    notes = []
    if steps["probed"] < steps["total"]:
        notes.append(
            f"{steps['probed']} of {steps['total']} steps were probed: sums are of those "
            "alone, and `scaled` lets each stand for the steps since the one before"
        )
    if log.end is None:
        notes.append(
            "the training has not ended: the curve ends before the last probed step"
        )
    few = [
        entry["step"]
        for entry in log.entries
        if "truth" in entry and entry["truth"]["ess_fraction"] < LEAST_ESS_FRACTION
    ]
    if few:
        notes.append(
            f"at step {', '.join(map(str, few[:5]))}{', ...' if few[5:] else ''} the truth "
            f"hangs on less than {LEAST_ESS_FRACTION:.0%} of the responses: not to be "
            "trusted; probe more often, or save checkpoints closer together"
        )
    notes += _of_floor([entry["floor"] for entry in log.entries if "floor" in entry])
    notes += [
        f"{name.replace('_', ' ')} was not measured at every probed step: no sum of it"
        for name in SERIES
        if name not in series
    ]
    return notes


def _of_floor(held: list[Entry]) -> list[str]:
    """What an entropy floor did at the probed steps, in a sentence."""
    if not held:
        return []
    changes = [found["change"] for found in held if "change" in found]
    saturated = sum(found["saturated"] for found in held)
    by_feedback = all("wanted" not in found for found in held)
    done = (
        f"weighed the tokens of all {len(held)} probed steps by feedback"
        if by_feedback
        else f"changed {len(changes)} of {len(held)} probed steps, which is "
        f"{math.fsum(changes):+.2g} nats per token in their gradients' part"
    )
    return [
        f"an entropy floor {done}; its parameter was at its limit at {saturated} of them"
    ]
