"""The ledger of a run in words and tables."""

from collections.abc import Sequence
from typing import Any

from entropy_ddp.answers.cells import (
    Cell,
    Row,
    Table,
    change,
    context,
    decimal,
    excerpt,
    head,
    interval,
    number,
    part,
    place,
    share,
    text,
)
from entropy_ddp.answers.words import (
    GIVEN_E,
    count,
    differing,
    excludes_zero,
    is_resolved,
    tenth,
    with_error,
)
from entropy_ddp.ledger.accumulate import Ledger

NAMES = {
    "curve": "entropy on fresh responses, last - first",
    "truth": "sum of ΔH true",
    "first_order": "sum of ΔH first order",
    "second_order": "sum of ΔH second order",
}
PART_NAMES = {
    "momentum": "momentum (earlier batches)",
    "decay": "weight decay",
    "gradient": "gradient of the step's batch",
    "curvature": "curvature (second order - first)",
    "rest": "rest",
}
TOKEN_NAMES = {
    "positive": "tokens with A > 0",
    "negative": "tokens with A < 0",
    "zero": "tokens with A = 0",
    "unattributed": "not of the tokens (dropout, rounding)",
}


def headline(ledger: Ledger) -> tuple[str, str, str]:
    """The answer in one sentence; a verb only where the sum stands out of its error."""
    total = ledger.totals.get("truth", ledger.totals["first_order"])
    value, error = total["value"], total["se"]
    steps = count(ledger.steps["probed"], "step")
    if not is_told(total):
        begin = f"{steps} changed the entropy by "
        after = " nats per token: too little to tell from zero"
        return begin, with_error(value, error), after
    verb = "lowered" if value < 0 else "raised"
    pair = with_error(abs(value), error, signed=False)
    return f"{steps} {verb} the entropy by ", pair, " nats per token"


def is_told(total: dict[str, Any]) -> bool:
    """Whether a sum stands out of its error."""
    if "interval" in total:
        return excludes_zero(total["interval"])
    return is_resolved(total["value"], total["se"])


def sign(ledger: Ledger) -> str:
    """`cold` for a fall, `warm` for a rise, empty for what may be neither."""
    total = ledger.totals.get("truth", ledger.totals["first_order"])
    if not (is_told(total) and ledger.trusted):
        return ""
    return "cold" if total["value"] < 0 else "warm"


def totals(ledger: Ledger) -> Table:
    """Sums over the run."""
    steps = ledger.steps
    known = any("interval" in total for total in ledger.totals.values())
    columns = ["quantity", "nats/token", "of the truth"]
    if known:
        columns.insert(2, "95 % interval")
    if ledger.scaled is not None:
        columns.append(f"scaled to {steps['total']:,} steps")
    rows = []
    for name, label in NAMES.items():
        if name in ledger.totals:
            total = ledger.totals[name]
            row = [text(label), change(total["value"], total["se"])]
            if known:
                row.append(interval(total.get("interval")))
            row.append(_of_truth(ledger, name))
            if ledger.scaled is not None:
                scaled = ledger.scaled.get(name, {})
                row.append(change(scaled.get("value"), scaled.get("se")))
            rows.append(row)
    return Table(
        title=f"Steps {steps['first']:,} to {steps['last']:,}, {steps['probed']:,} probed",
        columns=columns,
        rows=rows,
    )


def _of_truth(ledger: Ledger, name: str) -> Cell:
    """A sum in percent of the measured one, with the paired error of the two."""
    truth, total = ledger.totals.get("truth"), ledger.totals[name]
    if truth is None or not is_told(truth):
        return share(None)
    if "difference_se" not in total:
        return share(1.0 if name == "truth" else None)
    error = total["difference_se"] / abs(truth["value"])
    return share(total["value"] / truth["value"], error=error)


def parts(ledger: Ledger) -> Table:
    """The first-order changes by part of the step, and the gradient's by token."""
    error, errors = ledger.share_error, ledger.part_errors

    def cell(name: str, value: float) -> Cell:
        """A part with its own error, or with the digits that the whole's leaves."""
        return change(value, errors[name]) if name in errors else part(value, error)

    rows: list[Row] = [
        (text(PART_NAMES[name]), cell(name, value))
        for name, value in ledger.parts.items()
    ]
    rows += [
        (text("total"), cell("total", sum(ledger.parts.values()))),
        (),
        head("the gradient's part by sign of the advantage"),
        *(
            (text(label), part(ledger.tokens[name], error))
            for name, label in TOKEN_NAMES.items()
            if name in ledger.tokens
        ),
        head("by probability, in tenths of the tokens"),
        *(
            (text(tenth(place)), part(value, error))
            for place, value in enumerate(ledger.deciles)
        ),
    ]
    return Table(
        title="What it is made of",
        columns=("part", "nats/token"),
        rows=rows,
        caption=(
            f"Of the {ledger.steps['attributed']:,} steps that are split into parts. "
            f"{GIVEN_E}"
        ),
    )


def tokens(ledger: Ledger, most: int | None = None) -> Table:
    """The tokens with the largest sums of shares."""
    return _influence(
        "Tokens that moved it most",
        "token",
        [
            (context(("", row["text"], ""), row["share"] < 0), row)
            for row in ledger.by_token[:most]
        ],
        ledger,
    )


def prompts(ledger: Ledger, most: int | None = None) -> Table:
    """The prompts with the largest sums of shares, each by what tells it from others."""
    shown = ledger.by_prompt[:most]
    whole = [row["prompt"] for row in shown]
    return _influence(
        "Prompts that moved it most",
        "prompt",
        [
            (excerpt(short, row["prompt"]), row)
            for short, row in zip(differing(whole), shown, strict=True)
        ],
        ledger,
    )


def _influence(
    title: str, what: str, named: Sequence[tuple[Cell, dict[str, Any]]], ledger: Ledger
) -> Table:
    rows = [
        (_share(row, ledger), number(row["num_tokens"], 9), name) for name, row in named
    ]
    return Table(
        title=title,
        columns=("nats/token", "tokens trained on", what),
        rows=rows,
        caption="Sums over the steps in which they were among the largest.",
    )


def _share(row: dict[str, Any], ledger: Ledger) -> Cell:
    return part(row["share"], ledger.relative_error * abs(row["share"]))


def single_tokens(ledger: Ledger) -> Table:
    """The single tokens with the largest shares."""
    rows = [
        (
            place(row["step"]),
            _share(row, ledger),
            decimal(row["logp"]),
            decimal(row["advantage"], signed=True),
            context(row.get("context", ("", "–", "")), row["share"] < 0),
        )
        for row in ledger.top_tokens
    ]
    return Table(
        title="Single tokens",
        columns=("step", "share", "log p", "A", "token in its context"),
        rows=rows,
        folded=True,
    )


def checks(ledger: Ledger) -> Table:
    """The worst of every check."""
    return Table(
        title="The worst of all steps",
        columns=("check", "value"),
        rows=[
            (text(name.replace("_", " ")), number(value))
            for name, value in ledger.checks.items()
        ],
    )
