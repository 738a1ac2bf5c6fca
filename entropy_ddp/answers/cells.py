"""What a table is made of, before it is text in a terminal or HTML.

A cell holds a number with what is known of its precision, not a string: `terminal` and
`report` write it in their own signs. A number stands with its error; one that has none of
its own ends at the first digit of the error of what it is a part of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# How a cell's value is written:
# text        as it is
# head        of the rows below it, up to the next one or to a line
# entry       the name of one of several values of the row above
# excerpt     the beginning of a long text, on one line
# expression  text with comparisons and numbers, as of what a check expects
# verdict     ok, warn or fail, in its colour
# context     (before, token, after), the token marked
TEXTS = ("text", "head", "entry", "excerpt", "expression", "verdict", "context")
# number      one that is exact, or whose error is not known
# size        the same, of any order of magnitude
# decimal     the same, of one order: three places in a terminal, one below the other
# place       a number that counts nothing: of a step, of a line
# change      with its standard error, and a sign
# level       with its standard error: an entropy, an exponent
# interval    (low, high); either is None where there is no such bound
# part        one without an error of its own: its digits end where `error` begins
# share       a ratio, in percent; with its own error if there is one
# share_part  a part's ratio to a whole of this relative error, likewise; not shown where
#             the whole may be nothing


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table.

    Attributes:
        value: what it holds; None of what is not known.
        kind: how it is written.
        error: standard error of the value, or of what it is a part of.
        digits: significant digits of a number without an error. The page shows five at
            most, and all of the number on hover.
        signed: a positive number has a plus.
        mark: a sign that stands with the number, as * of what is configured.
        whole: of text that is shortened, all of it.
        falls: of a context, whether its token lowers the entropy.
    """

    value: Any
    kind: str = "text"
    error: float = 0.0
    digits: int = 4
    signed: bool = False
    mark: str = ""
    whole: str = ""
    falls: bool = False

    @property
    def is_number(self) -> bool:
        """Set to the right, and never broken."""
        return self.kind not in TEXTS


Row = Sequence[Cell]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table.

    Attributes:
        title: what it holds.
        columns: their names.
        rows: a cell for each column; a head stands alone, and an empty row is a line
            between two.
        caption: how to read it; may be empty.
        folded: on the page, shown when the reader opens it.
        id: what links point at; may be empty.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    caption: str = ""
    folded: bool = False
    id: str = ""


def text(value: Any, *, whole: str = "") -> Cell:
    return Cell(value=str(value), whole=whole)


def head(value: str) -> Row:
    """A row that names the rows below it."""
    return (Cell(value=value, kind="head"),)


def entry(name: str) -> Cell:
    return Cell(value=name, kind="entry")


def excerpt(value: str, whole: str) -> Cell:
    return Cell(value=value, kind="excerpt", whole=whole)


def number(value: float | None, digits: int = 4, *, signed: bool = False) -> Cell:
    return Cell(value=value, kind="number", digits=digits, signed=signed)


def place(value: int) -> Cell:
    return Cell(value=value, kind="place")


def decimal(value: float | None, digits: int = 4, *, signed: bool = False) -> Cell:
    return Cell(value=value, kind="decimal", digits=digits, signed=signed)


def size(value: float | None, digits: int = 4) -> Cell:
    return Cell(value=value, kind="size", digits=digits)


def change(value: float | None, error: float | None, mark: str = "") -> Cell:
    """A number with its error; a dash where either is not known."""
    known = None if error is None else value
    return Cell(value=known, kind="change", error=error or 0.0, mark=mark, signed=True)


def level(value: float, error: float | None) -> Cell:
    """An entropy with its error; of a run that did not record one, two digits."""
    if error is None:
        return Cell(value=value, kind="number", digits=2)
    return Cell(value=value, kind="level", error=error)


def interval(ends: Sequence[float | None] | None, *, signed: bool = True) -> Cell:
    """A 95 % interval; a dash where there is none."""
    if ends is None or all(end is None for end in ends):
        return Cell(value=None, kind="interval")
    return Cell(value=tuple(ends), kind="interval", signed=signed)


def part(value: float, error: float) -> Cell:
    return Cell(value=value, kind="part", error=error, signed=True)


def share(
    value: float | None,
    digits: int = 2,
    *,
    error: float = 0.0,
    signed: bool = False,
) -> Cell:
    return Cell(value=value, kind="share", digits=digits, error=error, signed=signed)


def share_part(value: float, total: float, error: float) -> Cell:
    """A part's ratio to a total of this error: a dash where that may be nothing."""
    if not total:
        return share(None)
    return Cell(value=value / total, kind="share_part", error=error / abs(total))


def context(pieces: Sequence[str], falls: bool) -> Cell:
    return Cell(value=tuple(pieces), kind="context", falls=falls)


def verdict(value: str, told: str = "") -> Cell:
    """ok, warn or fail; in these words on the page."""
    return Cell(value=value, kind="verdict", whole=told)


def expression(value: str) -> Cell:
    return Cell(value=value, kind="expression")
