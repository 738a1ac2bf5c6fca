"""How a table of the terminal is made, and how numbers stand in it."""

from typing import Any

from rich.table import Table

from entropy_ddp.names import short_name

VERDICT_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
UNITS = {
    "per_token": "nats/token",
    "per_sequence": "nats/sequence",
    "per_sequence_token_mean": "nats/token, mean over sequences",
    "sum": "nats",
}


def new_table(title: str, *columns: str, caption: str | None = None) -> Table:
    table = Table(
        title=title, title_justify="left", caption=caption, caption_justify="left"
    )
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        # Names may break over lines; numbers may not.
        table.add_column(column, justify="right", no_wrap=True, overflow="fold")
    return table


def let_pairs_break(table: Table, *columns: int) -> None:
    """In a narrow terminal, let a value and its error stand on two lines."""
    for number_of_column in columns:
        table.columns[number_of_column].no_wrap = False


def number(value: float, digits: int = 6) -> str:
    """A number in scientific notation that never rounds to 0."""
    return f"{value:.{digits - 1}e}"


def plus_minus(value: float, error: float) -> str:
    return f"{value:+.4e} ± {error:.1e}"


def as_text(value: Any) -> str:
    if isinstance(value, bool):
        # As JSON and the column of what is expected spell it.
        return str(value).lower()
    if not isinstance(value, (int, float, dict)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.11g}"
    return "\n".join(f"{short_name(k)}: {as_text(item)}" for k, item in value.items())
