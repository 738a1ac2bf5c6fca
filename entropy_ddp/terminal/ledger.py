"""The ledger of a run, as tables in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from entropy_ddp.ledger.accumulate import Ledger
from entropy_ddp.ledger.names import NAMES, PART_NAMES, TOKEN_NAMES
from entropy_ddp.report.words import differing, in_line, tenth
from entropy_ddp.terminal.tables import (
    NAME_CELLS,
    beginning,
    cells_beside,
    in_context,
    new_table,
    plus_minus,
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
    truth = ledger.totals.get("truth", {}).get("value")
    for name, label in NAMES.items():
        if name not in ledger.totals:
            continue
        total = ledger.totals[name]
        ratio = f"{total['value'] / truth:.1%}" if truth and name != "curve" else "-"
        cells = [label, plus_minus(total["value"], total["se"]), ratio]
        if ledger.scaled is not None:
            scaled = ledger.scaled.get(name, {})
            known = "se" in scaled
            cells.append(plus_minus(scaled["value"], scaled["se"]) if known else "-")
        table.add_row(*cells)
    return table


def _decomposition(ledger: Ledger) -> Table:
    table = new_table(
        "What it is made of",
        "part",
        "nats/token",
        caption=f"of the {ledger.steps['attributed']:,} steps that are split into parts",
    )
    for name, value in ledger.parts.items():
        table.add_row(PART_NAMES[name], f"{value:+.4e}")
    table.add_row("total", f"{sum(ledger.parts.values()):+.4e}", end_section=True)
    table.add_row("the gradient's part by sign of the advantage", style="bold")
    for name, label in TOKEN_NAMES.items():
        if name in ledger.tokens:
            table.add_row(f"  {label}", f"{ledger.tokens[name]:+.4e}")
    table.add_row("by probability, in tenths of the tokens", style="bold")
    for place, value in enumerate(ledger.deciles):
        table.add_row(f"  {tenth(place)}", f"{value:+.4e}")
    return table


def _print_influential(console: Console, ledger: Ledger) -> None:
    """The tokens and the prompts with the largest sums of shares."""
    shown = [row["text"] for row in ledger.by_token[:MOST]]
    table = new_table("Tokens that moved it most", "token", "nats/token")
    for row, text in zip(ledger.by_token, shown):
        table.add_row(in_context("", text, "", NAME_CELLS), f"{row['share']:+.3e}")
    console.print(table)
    prompts = ledger.by_prompt[:MOST]
    columns = ("nats/token", "prompt")
    sums = [f"{row['share']:+.3e}" for row in prompts]
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
