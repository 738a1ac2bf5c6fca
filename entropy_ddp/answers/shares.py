"""Shares of U's tokens summed by the sign of the advantage and by probability."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from entropy_ddp.answers.cells import (
    Cell,
    Row,
    Table,
    change,
    number,
    part,
    share,
    share_part,
    text,
)
from entropy_ddp.answers.words import (
    FIXED,
    GIVEN_E,
    excludes_zero,
    is_resolved,
    percent,
    supported,
    supported_percent,
)
from entropy_ddp.answers.words import (
    number as in_words,
)

# Fewer blocks of E give sums of shares no errors.
LEAST_BLOCKS = 3
# Below this reliability the tokens with the largest shares may be others for another E.
RELIABLE = 0.5
# Below this log p a token is one that the policy held for less likely than not.
IMPROBABLE = math.log(0.5)
BY_KIND = "advantage and probability"
KINDS = (
    "A < 0, p < 0.5",
    "A < 0, p ≥ 0.5",
    "A > 0, p < 0.5",
    "A > 0, p ≥ 0.5",
    "A = 0",
)


class SharesByKind:
    """Sums over tokens by kind, filled row by row.

    Attributes:
        counts: tokens of every kind.
        shares: the sums of their shares.
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(KINDS, 0)
        self.shares = dict.fromkeys(KINDS, 0.0)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row of tokens.jsonl.gz."""
        kind = _kind(row)
        self.counts[kind] += 1
        self.shares[kind] += row["share"]

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return sum(self.counts.values())

    @property
    def share(self) -> float:
        """The gradient's part: the sum of all shares."""
        return math.fsum(self.shares.values())

    def leading(self) -> str:
        """The kind that does most of what all do together."""
        direction = math.copysign(1, self.share)
        return max(KINDS, key=lambda kind: direction * self.shares[kind])


def together(several: Iterable[SharesByKind]) -> SharesByKind:
    """The sums of several runs added up."""
    found = SharesByKind()
    for one in several:
        for kind in KINDS:
            found.counts[kind] += one.counts[kind]
            found.shares[kind] += one.shares[kind]
    return found


def _kind(row: Mapping[str, Any]) -> str:
    if row["advantage"] == 0:
        return "A = 0"
    sign = "<" if row["advantage"] < 0 else ">"
    return f"A {sign} 0, p {'<' if row['logp'] < IMPROBABLE else '≥'} 0.5"


def is_reliable(document: Mapping[str, Any]) -> bool:
    """Whether another E would show about the same tokens; old runs did not ask."""
    found = document["attribution"].get("reliability")
    return found is None or found >= RELIABLE


def not_reliable(document: Mapping[str, Any]) -> str:
    """What heads the tokens with the largest shares where E is too small for them.

    Of k times as many prompts the reliability R is k R / (1 + (k - 1) R).
    """
    found = document["attribution"]["reliability"]
    if not found:
        return "not reliable with this E: its two halves do not agree on them at all"
    needed = document["E"]["num_groups"] * RELIABLE * (1 - found) / found
    needed /= 1 - RELIABLE
    digits = max(0, math.floor(math.log10(needed)) - 1)
    rounded = math.ceil(needed / 10**digits) * 10**digits
    return f"not reliable with this E: {rounded:,} prompts would do"


def reliability_sentence(document: Mapping[str, Any]) -> str:
    """How far another E would give the same shares; empty of old runs."""
    found = document["attribution"].get("reliability")
    if found is None:
        return ""
    return (
        f"Shares of single tokens have a reliability of {in_words(found, 2)}: so much would "
        "they correlate with those of another E as large."
    )


def part_error(document: Mapping[str, Any], part: str) -> float | None:
    """Standard error of a part of the step, by its key; old runs have none."""
    found: float | None = document["attribution"].get(f"{part}_se")
    return found


def part_is_resolved(document: Mapping[str, Any], part: str) -> bool:
    """Whether 0 is outside the 95 % interval of a part; of old runs nobody knows."""
    ends = document["attribution"].get(f"{part}_interval")
    return ends is None or excludes_zero(ends)


def errors_of_kinds(document: Mapping[str, Any]) -> dict[str, float]:
    """Standard errors of the sums over kinds; empty of runs without."""
    rows = document["attribution"]["summaries"].get(BY_KIND, ())
    return {row["label"]: row["se"] for row in rows if "se" in row}


def blocks_sentence(document: Mapping[str, Any]) -> str:
    """Where errors of sums of shares come from, or why there are none."""
    count = document["attribution"].get("num_blocks")
    if count is None:
        return ""
    if count < LEAST_BLOCKS:
        return (
            f"Sums of shares have no errors: they need at least {LEAST_BLOCKS} blocks of "
            f"E (attribution.blocks), found {count}."
        )
    return (
        f"± is one standard error by the spread of {count} blocks of E, with {count - 1} "
        "degrees of freedom."
    )


def left_at_first_order(row: Mapping[str, Any]) -> tuple[float, float | None]:
    """First-order change without a rule's tokens, and its error if there is one.

    Chosen on one half of E and evaluated on the other; old runs did both on all of E.
    """
    if "delta_h1_cross_fitted" in row:
        return row["delta_h1_cross_fitted"], row.get("se")
    return row["delta_h1"], None


def left_in_truth(row: Mapping[str, Any]) -> tuple[float, float]:
    """The same of the masked step taken; its error had another name in old runs."""
    name = "delta_h_true_se" if "delta_h_true_se" in row else "se"
    return row["delta_h_true"], row[name]


def named(kind: str) -> str:
    """A kind at the beginning of a sentence."""
    return f"Tokens with {unbroken(kind).replace(', ', ' and ')}"


def unbroken(kind: str) -> str:
    """A kind whose comparisons stay on one line."""
    return re.sub(r" ([<≥=]) ", rf"{FIXED}\1{FIXED}", kind)


def sentence(found: SharesByKind, unit: str, error: float) -> str:
    """What the leading kind is of the tokens, and of the gradient's part.

    Args:
        error: standard error of the first-order change that they are part of.
    """
    total = found.share
    if not total:
        return "The shares of U's tokens add up to nothing."
    kind = found.leading()
    leading = found.shares[kind]
    of_all = percent(found.counts[kind] / found.num_tokens)
    begin = f"{named(kind)} are {of_all} of U's tokens and "
    ratio = leading / total
    if ratio <= 1 and is_resolved(total, error):
        others = ", all others together the rest" if ratio < 1 else ""
        shown = supported_percent(ratio, error / abs(total))
        return f"{begin}make {shown} of the gradient's part{others}."
    # More than all of it, or of what may be nothing: a percentage would hide that.
    alone = supported(leading, error, 3, signed=True)
    begin += f"would alone move the entropy by {alone} {unit}; the others "
    if ratio <= 1:
        rest = supported(total - leading, error, 3, signed=True)
        return f"{begin}by {rest}, all on this E: the whole is within its error."
    return f"{begin}take {supported(abs(total - leading), error, 3)} of it back."


def table(
    found: SharesByKind,
    unit: str,
    summed_over: str,
    error: float,
    own_errors: Mapping[str, float],
) -> Table:
    """All kinds as numbers; arguments as of `sentence`.

    Args:
        own_errors: of the sum over each kind; empty where they are not known.
    """
    total = found.share

    def summed(kind: str) -> Cell:
        if kind in own_errors:
            return change(found.shares[kind], own_errors[kind])
        return part(found.shares[kind], error)

    note = GIVEN_E
    if own_errors:
        note = "± is one standard error by the spread of blocks of E."
    rows: list[Row] = [
        (
            text(unbroken(kind)), number(count, 9), share(count / found.num_tokens),
            summed(kind),
            share_part(found.shares[kind], total, error),
        )
        for kind, count in found.counts.items()
        if count
    ]  # fmt: skip
    rows.append(
        (
            text("all"), number(found.num_tokens, 9), share(1.0), part(total, error),
            share(1.0 if total else None),
        )
    )  # fmt: skip
    return Table(
        title="Shares by sign of the advantage and by probability",
        columns=(
            "tokens", "number", "of all", f"share, {unit}", "of the gradient's part",
        ),
        rows=rows,
        caption=(
            f"Summed over {summed_over}. A negative share lowers the entropy. {note}"
        ),
    )  # fmt: skip
