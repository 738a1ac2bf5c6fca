"""The ledger of a run, as tables in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from entropy_ddp.ledger.accumulate import Ledger
from entropy_ddp.ledger.names import NAMES, PART_NAMES, TOKEN_NAMES
from entropy_ddp.terminal.tables import new_table, plus_minus


def print_ledger(console: Console, ledger: Ledger, out: str) -> None:
    """Totals, the decomposition, the most influential tokens and prompts."""
    for note in ledger.notes:
        console.print(f"note: {note}", style="yellow")
    console.print(_totals(ledger))
    if ledger.parts:
        console.print(_decomposition(ledger))
        console.print(_influential(ledger))
    console.print(f"written to {out}", style="dim")


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
    table.add_row("by probability of the token", style="bold")
    for decile, value in enumerate(ledger.deciles):
        table.add_row(f"  {10 * decile}-{10 * decile + 10} %", f"{value:+.4e}")
    return table


def _influential(ledger: Ledger) -> Table:
    table = new_table(
        "Who moved it most",
        *("token", "nats/token", "prompt", "nats/token"),
        caption="sums over the steps in which they were among the largest",
    )
    table.columns[2].justify = "left"
    table.columns[2].no_wrap = False
    for place in range(min(10, max(len(ledger.by_token), len(ledger.by_prompt)))):
        cells: list[str | Text] = []
        for rows, key in ((ledger.by_token, "text"), (ledger.by_prompt, "prompt")):
            known = place < len(rows)
            cells += [
                Text(repr(rows[place][key])[1:-1][:40] if known else ""),
                f"{rows[place]['share']:+.3e}" if known else "",
            ]
        table.add_row(*cells)
    return table
