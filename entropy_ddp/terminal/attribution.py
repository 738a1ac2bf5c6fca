"""The attribution of a change to the update batch, as tables in the terminal."""

import math
from itertools import chain, zip_longest
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from entropy_ddp.estimators.shares import TOP_SHARES
from entropy_ddp.report.words import (
    GIVEN_E,
    is_resolved,
    linear_error,
    name_of_kind,
    relative_error,
    title_of_kinds,
)
from entropy_ddp.results import AttributionResult, Results
from entropy_ddp.terminal.details import WIDTH_OF_TWO_HALVES
from entropy_ddp.terminal.heading import print_heading, verdict_line
from entropy_ddp.terminal.tables import (
    cells_beside,
    in_context,
    new_table,
    number,
    plus_minus,
    supported,
)


def print_attribution(console: Console, results: Results, out: str | None) -> None:
    """Parts of the step, tokens that matter most, cheap scores against exact shares."""
    print_heading(console, results)
    print_shares(console, results)
    console.print(verdict_line(results, out))


def print_shares(console: Console, results: Results) -> None:
    """The attribution alone."""
    found = results.attribution
    assert found is not None
    document = results.to_dict()
    error, relative = linear_error(document), relative_error(document)
    console.print(_parts(found, error))
    console.print(_top_tokens(found, console.width, relative))
    console.print(_summaries(found, console.width, error))
    console.print(_proxies(found))
    console.print(_what_if(found, error, results.truth.noise_floor or 0.0))


def _parts(found: AttributionResult, error: float) -> Table:
    """The parts of the change; `error` is that of their sum."""
    table = new_table(
        "ΔH first order by part of the step",
        "part",
        "nats",
        "of the total",
        caption=(
            f"attribution gap {number(found.attribution_gap, 3)}; half of the sum of "
            f"|share| is in {found.concentration:.1%} of U's tokens. {GIVEN_E}"
        ),
    )
    parts = {
        "momentum (earlier batches)": found.momentum,
        "weight decay": found.weight_decay,
        "gradient of U": found.gradient,
        "total": found.total,
    }
    for name, value in parts.items():
        share = "-"
        if is_resolved(found.total, error):
            # + 0.0: a part of zero has no sign.
            percent = 100 * value / found.total + 0.0
            own = supported(percent, 100 * error / abs(found.total))
            share = f"{float(own):+.0f}%"
        shown = supported(value, error)
        if name == "total":
            shown = plus_minus(value, error)
        table.add_row(name, shown, share)
    return table


def _top_tokens(found: AttributionResult, width: int, relative: float) -> Table:
    columns = ("share, nats", "log p", "A", "line", "k", "token in its context")
    table = new_table(f"The {len(found.top_tokens)} tokens that matter most", *columns)
    shares, *_, contexts = table.columns
    shares.justify, shares.no_wrap = "right", True
    contexts.justify = "left"
    numbers = [
        (
            supported(row["share"], relative * abs(row["share"])),
            f"{row['logp']:.3f}",
            f"{row['advantage']:+.3f}",
            str(row["index"] + 1),
            str(row["k"]),
        )
        for row in found.top_tokens
    ]
    cells = cells_beside(numbers, columns, width)
    for row, others in zip(found.top_tokens, numbers, strict=True):
        context = Text("-")
        if "context" in row:
            before, token, after = row["context"]
            context = in_context(before, token, after, cells)
        table.add_row(*others, context)
    return table


def _summaries(found: AttributionResult, width: int, error: float) -> Table:
    """Sums of shares by several kinds; in a wide terminal in two halves."""
    kinds = [_summary_rows(name, rows, error) for name, rows in found.summaries.items()]
    columns = ("kind", "nats", "tokens")
    if width < WIDTH_OF_TWO_HALVES or len(kinds) < 2:
        table = new_table("Shares summed by kind of token", *columns)
        for row in chain.from_iterable(kinds):
            table.add_row(*row)
        return table
    half = min(range(1, len(kinds)), key=lambda n: _height(kinds, n))
    table = new_table("Shares summed by kind of token", *columns, *columns)
    table.columns[3].justify = "left"
    left, right = chain(*kinds[:half]), chain(*kinds[half:])
    for pair in zip_longest(left, right, fillvalue=("", "", "")):
        table.add_row(*chain(*pair))
    return table


def _summary_rows(
    name: str, rows: list[Any], error: float
) -> list[tuple[str | Text, str, str]]:
    kinds: list[tuple[str | Text, str, str]] = [
        (
            f"  {name_of_kind(name, row['label'])}",
            supported(row["share"], error),
            f"{row['num_tokens']:,}",
        )
        for row in rows
    ]
    return [(Text(f"by {title_of_kinds(name)}", style="bold"), "", ""), *kinds]


def _height(kinds: list[list[Any]], half: int) -> int:
    """Rows of the table with so many kinds on the left."""
    return max(sum(map(len, kinds[:half])), sum(map(len, kinds[half:])))


def _proxies(found: AttributionResult) -> Table:
    scores = {"covariance": found.covariance, **found.proxies}
    fractions = [f"{fraction:g}" for fraction in TOP_SHARES]
    table = new_table(
        "How well cheap scores rank tokens by their share",
        "score",
        "Spearman",
        *(f"top {float(f):.0%}" for f in fractions),
        caption=(
            "a score that predicts entropy loss has a Spearman correlation near -1; top: "
            "how much of the tokens with the largest |share| is among its largest"
        ),
    )
    for name, judged in scores.items():
        correlation = judged.get("spearman")
        table.add_row(
            name,
            "-" if correlation is None else f"{correlation:+.2f}",
            *(_share(judged["top_overlap"].get(f)) for f in fractions),
        )
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _what_if(found: AttributionResult, error: float, noise: float) -> Table:
    verified = any("delta_h_true" in row for row in found.what_if)
    table = new_table(
        "What if these tokens had been left out of the update",
        "rule",
        "tokens",
        "ΔH first order",
        *(("ΔH true",) if verified else ()),
        caption=(
            "first order: with the Adam denominator of the whole update; true: the "
            "masked step taken"
        ),
    )
    for row in found.what_if:
        first = supported(row["delta_h1"], error)
        cells = [row["rule"], f"{row['num_tokens']:,}", first]
        if verified:
            cells.append(plus_minus(row["delta_h_true"], math.hypot(row["se"], noise)))
        table.add_row(*cells)
    return table
