"""How a table of the terminal is made, and how numbers stand in it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from entropy_ddp.names import short_name
from entropy_ddp.report.words import in_line, supported_digits, visible

VERDICT_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
UNITS = {
    "per_token": "nats/token",
    "per_sequence": "nats/sequence",
    "per_sequence_token_mean": "nats/token, mean over sequences",
    "sum": "nats",
}
# Cells of a name below which it is not broken, and beside which numbers must fit.
NAME_CELLS = 24
# Cells that a column takes beside its content, and a table beside its columns.
FRAME_OF_COLUMN, FRAME = 3, 1
# Cells of a context below which it stands on a line of its own.
CONTEXT_CELLS = 24
LIST_INDENT = 2


class FittingTable(Table):
    """A table that is a list where the terminal is too narrow for its numbers.

    Its text is shown as it is: brackets in a name are no markup. What stands above and
    below it is as wide as the terminal.

    Attributes:
        heading: what it is, above it.
        note: how to read it, below it; may be empty.
    """

    def __init__(self, heading: str, note: str) -> None:
        super().__init__()
        self.heading, self.note = heading, note

    def add_row(self, *cells: RenderableType | None, **settings: Any) -> None:
        """A row, as of rich's table."""
        plain = (Text(cell) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*plain, **settings)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """As a table if every number stays whole, otherwise row below row."""
        yield Text(self.heading, style="table.title")
        if self.least_width(console, options) <= options.max_width:
            yield from super().__rich_console__(console, options)
        else:
            yield from self._as_list(options.max_width)
        if self.note:
            yield Text(self.note, style="table.caption")

    def least_width(self, console: Console, options: ConsoleOptions) -> int:
        """Cells of the narrowest form in which no number is broken."""
        widths = [self._least(column, console, options) for column in self.columns]
        return sum(widths) + FRAME_OF_COLUMN * len(widths) + FRAME

    def _least(self, column: Column, console: Console, options: ConsoleOptions) -> int:
        free = options.update(width=10_000)
        found = [Measurement.get(console, free, c) for c in _with_header(column)]
        least = max(m.maximum if column.no_wrap else m.minimum for m in found)
        if column.justify == "left" and not column.no_wrap:
            # Text, such as a path, and no number.
            least = min(least, NAME_CELLS)
        least = min(least, column.max_width or least)
        return max(least, column.min_width or least)

    def _as_list(self, width: int) -> Iterator[RenderableType]:
        """Every row as its name, and below it its other cells under their headers."""
        headers = [f"{column.header} ".lstrip() for column in self.columns]
        for row in zip(*(column.cells for column in self.columns)):
            name, *cells = map(_text, row)
            # A number says nothing without its header.
            yield Text(headers[0] if self.columns[0].no_wrap else "").append_text(name)
            pairs = [
                Text(header).append_text(cell)
                for header, cell in zip(headers[1:], cells)
                if cell
            ]
            for line in _lines(pairs, width - LIST_INDENT):
                yield Padding(line, (0, 0, 0, LIST_INDENT))


def _with_header(column: Column) -> list[RenderableType]:
    return [column.header, *column.cells]


def _text(cell: RenderableType) -> Text:
    return cell if isinstance(cell, Text) else Text(str(cell))


def _lines(parts: Iterable[Text], width: int) -> Iterator[Text]:
    """Parts one after the other, as many on a line as it holds."""
    line = Text()
    for part in parts:
        if line and line.cell_len + 3 + part.cell_len > width:
            yield line
            line = Text()
        line.append_text(Text("   ") + part if line else part)
    if line:
        yield line


def new_table(title: str, *columns: str, caption: str | None = None) -> FittingTable:
    table = FittingTable(title, caption or "")
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        # Names may break over lines; numbers may not.
        table.add_column(column, justify="right", no_wrap=True, overflow="fold")
    return table


def let_pairs_break(table: Table, *columns: int) -> None:
    """In a narrow terminal, let a value and its error stand on two lines."""
    for number_of_column in columns:
        table.columns[number_of_column].no_wrap = False


def cells_beside(
    rows: Sequence[Sequence[str]], columns: Sequence[str], width: int
) -> int:
    """Cells that the other columns leave to a last one of contexts.

    Where they leave few, a context stands below its row, on a line of its own.

    Args:
        rows: the cells of the other columns.
        columns: the names of all.
        width: cells of the terminal.
    """
    taken = FRAME + FRAME_OF_COLUMN * len(columns)
    for *cells, name in zip(*rows, columns[:-1]):
        taken += max(map(cell_len, (*cells, name)))
    left = width - taken
    if left >= CONTEXT_CELLS:
        return left
    return width - LIST_INDENT - cell_len(f"{columns[-1]} ")


def in_context(before: str, token: str, after: str, cells: int) -> Text:
    """A token, marked, and as much of what surrounds it as fits; all on one line.

    Args:
        before, token, after: as they were decoded.
        cells: how many the line has; a token that is longer is broken over lines.
    """
    marked = f"[{visible(token)}]"
    left = cells - cell_len(marked)
    if left < 0:
        return Text("\n".join(chop_cells(marked, cells)), style="bold")
    before, after = in_line(before), in_line(after)
    head = _ending(before, left - min(left // 2, cell_len(after)))
    tail = beginning(after, left - cell_len(head))
    return Text.assemble((head, "dim"), (marked, "bold"), (tail, "dim"))


def beginning(text: str, cells: int) -> str:
    """The first cells of a text; where something is left out, a sign says so."""
    if cell_len(text) <= cells:
        return text
    return f"{chop_cells(text, cells - 1)[0]}…" if cells > 1 else "…"[:cells]


def _ending(text: str, cells: int) -> str:
    """The last cells of a text, likewise."""
    return beginning(text[::-1], cells)[::-1]


def number(value: float, digits: int = 6) -> str:
    """A number in scientific notation that never rounds to 0."""
    return f"{value:.{digits - 1}e}"


def plus_minus(value: float, error: float) -> str:
    return f"{value:+.4e} ± {error:.1e}"


def supported(value: float, error: float) -> str:
    """A number by itself, with no digit behind the first of its error; at least one."""
    if not value:
        return "0"
    digits = supported_digits(value, error, 5) if error > 0 else 5
    return f"{value:+.{digits - 1}e}"


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
