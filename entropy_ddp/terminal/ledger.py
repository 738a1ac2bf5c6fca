"""The ledger of a run, as tables in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from entropy_ddp.ledger.accumulate import NAMES, PART_NAMES, TOKEN_NAMES, Ledger
from entropy_ddp.report.words import (
    GIVEN_E,
    differing,
    in_line,
    is_resolved,
    percent_with_error,
    tenth,
)
from entropy_ddp.terminal.tables import (
    NAME_CELLS,
    beginning,
    cells_beside,
    in_context,
    new_table,
    plus_minus,
    supported,
)

# Tokens and prompts that are shown.
MOST = 10


def print_ledger(console: Console, ledger: Ledger, out: str) -> None:
    """Totals, the decomposition, the most influential tokens and prompts."""
    for note in ledger.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    console.print(_totals(ledger))
    if ledger.parts:
        console.print(_decomposition(ledger))
        _print_influential(console, ledger)
    console.print(Text(f"written to {out}", style="dim"))


def _totals(ledger: Ledger) -> Table:
    steps = ledger.steps
    columns = ["quantity", "nats/token", "of the truth"]
    if ledger.scaled is not None:
        columns.append(f"scaled to {steps['total']:,} steps")
    table = new_table(
        f"Steps {steps['first']:,} to {steps['last']:,}, {steps['probed']:,} probed",
        *columns,
    )
    for name, label in NAMES.items():
        if name not in ledger.totals:
            continue
        total = ledger.totals[name]
        cells = [label, plus_minus(total["value"], total["se"]), _ratio(ledger, name)]
        if ledger.scaled is not None:
            scaled = ledger.scaled.get(name, {})
            known = "se" in scaled
            cells.append(plus_minus(scaled["value"], scaled["se"]) if known else "-")
        table.add_row(*cells)
    return table


def _ratio(ledger: Ledger, name: str) -> str:
    """A sum in percent of the measured one, with the paired error of the two."""
    truth, total = ledger.totals.get("truth"), ledger.totals[name]
    if truth is None or not is_resolved(truth["value"], truth["se"]):
        return "-"
    share = total["value"] / truth["value"]
    if "difference_se" not in total:
        return "100 %" if name == "truth" else "-"
    error = total["difference_se"] / abs(truth["value"])
    return percent_with_error(share, error, signed=False)


def _decomposition(ledger: Ledger) -> Table:
    error, errors = ledger.share_error, ledger.part_errors
    table = new_table(
        "What it is made of",
        "part",
        "nats/token",
        caption=(
            f"of the {ledger.steps['attributed']:,} steps that are split into parts. "
            f"{GIVEN_E}"
        ),
    )
    total = sum(ledger.parts.values())
    for name, value in ledger.parts.items():
        table.add_row(PART_NAMES[name], _part(value, errors.get(name), error))
    table.add_row("total", _part(total, errors.get("total"), error), end_section=True)
    table.add_row("the gradient's part by sign of the advantage", style="bold")
    for name, label in TOKEN_NAMES.items():
        if name in ledger.tokens:
            table.add_row(f"  {label}", supported(ledger.tokens[name], error))
    table.add_row("by probability, in tenths of the tokens", style="bold")
    for place, value in enumerate(ledger.deciles):
        table.add_row(f"  {tenth(place)}", supported(value, error))
    return table


def _part(value: float, own: float | None, error: float) -> str:
    """A part with its own error, or with the digits that the whole's leaves."""
    return supported(value, error) if own is None else plus_minus(value, own)


def _print_influential(console: Console, ledger: Ledger) -> None:
    """The tokens and the prompts with the largest sums of shares."""
    shown = [row["text"] for row in ledger.by_token[:MOST]]
    table = new_table("Tokens that moved it most", "token", "nats/token")
    for row, text in zip(ledger.by_token, shown):
        total = _summed(row["share"], ledger)
        table.add_row(in_context("", text, "", NAME_CELLS), total)
    console.print(table)
    prompts = ledger.by_prompt[:MOST]
    columns = ("nats/token", "prompt")
    sums = [_summed(row["share"], ledger) for row in prompts]
    table = new_table(
        "Prompts that moved it most",
        *columns,
        caption="sums over the steps in which they were among the largest",
    )
    cells = cells_beside([(text,) for text in sums], columns, console.width)
    numbers, texts = table.columns
    numbers.justify, numbers.no_wrap, texts.justify = "right", True, "left"
    for total, text in zip(sums, differing([row["prompt"] for row in prompts])):
        table.add_row(total, beginning(in_line(text), cells))
    console.print(table)


def _summed(share: float, ledger: Ledger) -> str:
    return supported(share, ledger.relative_error * abs(share))
