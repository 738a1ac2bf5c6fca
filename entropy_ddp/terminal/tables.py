"""A table in the terminal: every number whole, in any width."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, zip_longest

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from entropy_ddp.answers.cells import Cell, Row, Table, text
from entropy_ddp.answers.words import (
    DASH,
    in_line,
    is_decimal,
    is_resolved,
    percent,
    percent_with_error,
    supported_percent,
    visible,
    with_error,
    without_digits_behind,
)

VERDICT_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
# Cells of a name below which it is not broken, and beside which numbers must fit.
NAME_CELLS = 24
# Cells that a column takes beside its content, and a table beside its columns.
FRAME_OF_COLUMN, FRAME = 3, 1
# Kinds of cells that are cut to the room that others leave.
LONG = ("context", "excerpt")
# Cells of a context below which it stands on a line of its own.
CONTEXT_CELLS = 20
# Below this an interval is written with powers of ten.
DECIMAL = 0.01
# Cells of what a check found, and of what it expects.
EXPRESSION_CELLS = 22
LIST_INDENT = 2


def written(table: Table, width: int) -> "FittingTable":
    """A table for a terminal of this width.

    Blocks of rows, each under a head, stand beside each other where there is room.
    """
    table = replace(table, rows=list(_indented(table.rows)))
    beside = _in_two_halves(table)
    if _natural_width(beside) <= width:
        table = beside
    made = FittingTable(table.title, table.caption)
    for place, name in enumerate(table.columns):
        cells = _column(table, place)
        kinds = {cell.kind for cell in cells if cell.value not in ("", None)}
        is_text = not any(cell.is_number for cell in cells)
        # Text may break between words, and a number from its error, but no number.
        may_break = is_text or kinds & {"change", "expression", "text"}
        made.add_column(
            name,
            overflow="fold",
            justify="left" if is_text else "right",
            no_wrap=not may_break,
            max_width=EXPRESSION_CELLS if "expression" in kinds else None,
        )
    room = _room_for_contexts(table, width)
    for row in table.rows:
        if row:
            made.add_row(*(shown(cell, room) for cell in row))
        else:
            made.add_section()
    return made


def _indented(rows: Iterable[Row]) -> Iterator[Row]:
    """What stands below a head begins further to the right."""
    below = False
    for row in rows:
        below = bool(row) and (below or row[0].kind == "head")
        if below and row[0].kind == "text":
            row = (replace(row[0], kind="entry"), *row[1:])
        yield row


def _column(table: Table, place: int) -> list[Cell]:
    """The cells of a column, but for heads."""
    return [
        row[place]
        for row in table.rows
        if place < len(row) and row[place].kind != "head"
    ]


def shown(cell: Cell, room: int = NAME_CELLS) -> Text:
    """A cell as the terminal shows it; what can be long takes no more cells than `room`."""
    value = cell.value
    if value is None:
        return Text(DASH)
    match cell.kind:
        case "context":
            before, token, after = value
            return in_context(before, token, after, room)
        case "excerpt":
            return Text(beginning(in_line(value), room))
        case "verdict":
            return Text(value, style=VERDICT_STYLES[value])
        case "head":
            return Text(value, style="bold")
        case "entry":
            return Text(f"  {value}")
    return Text(f"{cell.mark} {_number(cell)}".lstrip() if cell.mark else _number(cell))


def _number(cell: Cell) -> str:
    """The text of a cell; numbers in the notation of e, to be read by programs too."""
    value, sign = cell.value, "+" if cell.signed else ""
    match cell.kind:
        case "change":
            return plus_minus(value, cell.error)
        case "level":
            return with_error(value, cell.error, signed=False)
        case "interval":
            return bounds(value, "+" if cell.signed else "")
        case "part":
            return supported(value, cell.error)
        case "share" if cell.error:
            return percent_with_error(value, cell.error, signed=False)
        case "share":
            return percent(value, cell.digits)
        case "share_part":
            told = is_resolved(1.0, cell.error)
            return supported_percent(value, cell.error) if told else DASH
        case "size":
            return f"{value:{sign}.{cell.digits - 1}e}"
        case "decimal":
            return f"{value:{sign}.3f}"
        case "number" if isinstance(value, int):
            return f"{value:{sign},}"
        case "number":
            return f"{value:{sign}.{cell.digits}g}"
    return str(value)


def plus_minus(value: float, error: float) -> str:
    return f"{value:+.4e} ± {error:.1e}"


def bounds(ends: tuple[float | None, float | None], sign: str) -> str:
    """An interval, to the second digit of half of it, or the one bound there is.

    Args:
        sign: `+` if positive ends have a sign.
    """
    low, high = ends
    if low is None or high is None:
        return f"<= {high:.1e}" if low is None else f">= {low:.1e}"
    half = (high - low) / 2
    largest = max(abs(low), abs(high))
    if not half > 0:
        return f"[{low:.4g}, {high:.4g}]"
    last = math.floor(math.log10(float(f"{half:.1e}"))) - 1
    places = max(0, -last)
    decimal = [f"{end:{sign}.{places}f}" if end else "0" for end in ends]
    # No end reads as 0 that is not: its sign is the verdict.
    reads_as_zero = any(end and not float(t) for end, t in zip(ends, decimal))
    if is_decimal(largest) and largest >= DECIMAL and not reads_as_zero:
        return f"[{', '.join(decimal)}]"
    return f"[{_short(low, last, sign)}, {_short(high, last, sign)}]"


def _short(value: float, last: int, sign: str) -> str:
    """A number down to this power of ten, its exponent without a leading zero."""
    if not value:
        return "0"
    places = max(0, math.floor(math.log10(abs(value))) - last)
    mantissa, exponent = f"{value:{sign}.{places}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def supported(value: float, error: float) -> str:
    """A number by itself, with no digit behind the first of its error; at least one."""
    if not value:
        return "0"
    digits = 5
    if error > 0:
        value, digits = without_digits_behind(value, error, digits)
    return f"{value:+.{digits - 1}e}"


def _in_two_halves(table: Table) -> Table:
    """Blocks of rows in two halves beside each other, if there are several."""
    blocks: list[list[Row]] = []
    for row in table.rows:
        if not blocks or not row or row[0].kind == "head":
            blocks.append([])
        if row:
            blocks[-1].append(row)
    blocks = [block for block in blocks if block]
    numbers = all(cell.is_number for row in table.rows for cell in row[1:])
    if len(blocks) < 2 or not numbers:
        return table

    def height(half: int) -> int:
        return max(sum(map(len, blocks[:half])), sum(map(len, blocks[half:])))

    half = min(range(1, len(blocks)), key=height)
    width = len(table.columns)
    empty = [text("")] * width
    left, right = chain(*blocks[:half]), chain(*blocks[half:])
    rows = [
        [*([*one, *empty][:width]), *([*other, *empty][:width])]
        for one, other in zip_longest(left, right, fillvalue=())
    ]
    return replace(table, columns=[*table.columns, *table.columns], rows=rows)


def _natural_width(table: Table) -> int:
    """Cells in which no line of the table is broken, but for contexts."""
    widths = [cell_len(name) for name in table.columns]
    for row in table.rows:
        for place, cell in enumerate(row):
            if cell.kind not in LONG:
                widths[place] = max(widths[place], shown(cell).cell_len)
    return sum(widths) + FRAME_OF_COLUMN * len(widths) + FRAME


def _room_for_contexts(table: Table, width: int) -> int:
    """Cells that the other columns leave to contexts, which stand in one column.

    Where they leave few, a context stands below its row, on a line of its own.
    """
    names = [
        name
        for place, name in enumerate(table.columns)
        if any(cell.kind in LONG for cell in _column(table, place))
    ]
    if not names:
        return NAME_CELLS
    left = width - _natural_width(table) + cell_len(names[0])
    return left if left >= CONTEXT_CELLS else width - LIST_INDENT - len(names[0]) - 1


class FittingTable(RichTable):
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
        found = [
            Measurement.get(console, free, c) for c in (column.header, *column.cells)
        ]
        least = max(m.maximum if column.no_wrap else m.minimum for m in found)
        if column.justify == "left" and not column.no_wrap:
            # Text, such as a path, and no number.
            least = min(least, NAME_CELLS)
        return min(least, column.max_width or least)

    def _as_list(self, width: int) -> Iterator[RenderableType]:
        """Every row as its name, and below it its other cells under their headers."""
        headers = [f"{column.header} ".lstrip() for column in self.columns]
        for row in zip(*(column.cells for column in self.columns)):
            name, *cells = (c if isinstance(c, Text) else Text(str(c)) for c in row)
            # A number says nothing without its header.
            is_number = self.columns[0].justify == "right"
            yield Text(headers[0] if is_number else "").append_text(name)
            pairs = [
                Text(header).append_text(cell)
                for header, cell in zip(headers[1:], cells)
                if cell
            ]
            for line in _lines(pairs, width - LIST_INDENT):
                yield Padding(line, (0, 0, 0, LIST_INDENT))


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
