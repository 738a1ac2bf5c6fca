"""A page as one HTML file: nothing is fetched, and text from files stays text.

Every text is escaped. The one script is named by its digest in the page's content
security policy, so that a browser runs no other.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from entropy_ddp import __version__
from entropy_ddp.answers.cells import Cell, Table
from entropy_ddp.answers.headline import Glance
from entropy_ddp.answers.headline import complaints as checks_that_complain
from entropy_ddp.answers.tables import found
from entropy_ddp.answers.words import (
    DASH,
    FIXED,
    around,
    exact,
    interval,
    is_resolved,
    number,
    one_line,
    percent,
    percent_with_error,
    short_name,
    supported,
    supported_percent,
    typeset,
    visible,
    with_error,
)

if TYPE_CHECKING:
    # Words and tables need no library for figures, and a page none before it is made.
    from jinja2 import Environment

    from entropy_ddp.report.figures.canvas import Figure

# Characters of its context that are shown on either side of a token, of an excerpt, and
# digits of a number; hovering shows all.
CONTEXT, EXCERPT, DIGITS = 60, 160, 5


@dataclass(frozen=True, kw_only=True)
class TokenText:
    """One response of U, token by token.

    Attributes:
        title: which response it is.
        prompt: the prompt's text, or empty.
        prompt_line: what tells a long prompt, which is folded, from others; empty if
            the prompt is short.
        advantage: its advantage.
        before, shown, after: its tokens; the first and the last part are folded. Of
            each {text; sign, `cold` if it lowers the entropy, `warm`, or empty; strength
            of its ground, 0 to 1; numbers, for the tooltip: position, share, log p,
            entropy, covariance score; breaks, whether the line ends behind it}.
        left_out: how many tokens at both ends are not on the page.
    """

    title: str
    prompt: str
    prompt_line: str
    advantage: str
    before: Sequence[dict[str, Any]]
    shown: Sequence[dict[str, Any]]
    after: Sequence[dict[str, Any]]
    left_out: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class TokenTexts:
    """The responses that move the entropy most.

    Attributes:
        caption: how to read them.
        texts: one for each response.
        largest: the share of the darkest token, for the legend.
        unit: unit of shares.
        short: whether all fit into half the width.
    """

    caption: str
    texts: Sequence[TokenText]
    largest: str
    unit: str
    short: bool


@dataclass(frozen=True, kw_only=True)
class PageSection:
    """A part of the page under one heading; whatever is empty is left out.

    Attributes:
        listings: preformatted text by its title, folded.
    """

    id: str
    title: str
    lead: str = ""
    figures: Sequence["Figure"] = ()
    token_texts: TokenTexts | None = None
    tables: Sequence[Table] = ()
    listings: Sequence[tuple[str, str]] = ()
    later_figures: Sequence["Figure"] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page.

    Attributes:
        kicker: what the page is about, above the answer.
        alarm: why nothing below may be trusted; empty if it may.
        headline: the answer in one sentence: text before the value, the value, text
            after it.
        sign: `cold` if the value is a fall, `warm` if it is a rise, or empty.
        lead: the sentence under it.
        complaints: checks that are not ok, the worst first: {verdict, name, value,
            expected, hint}.
        checked: one line about all checks.
        audits_id: id of the table of all checks; empty if there is none.
    """

    title: str
    kicker: str
    alarm: str = ""
    headline: tuple[str, str, str]
    sign: str = ""
    lead: str
    glances: Sequence[Glance] = ()
    complaints: Sequence[Mapping[str, str]] = ()
    checked: str = ""
    audits_id: str = ""
    sections: Sequence[PageSection] = ()

    @property
    def figures(self) -> "list[Figure]":
        """All figures, in order."""
        return [
            figure
            for section in self.sections
            for figure in (*section.figures, *section.later_figures)
        ]


def render_page(page: Page) -> str:
    """The HTML document of a page."""
    from markupsafe import Markup

    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            version=__version__,
            # Both are files of this package.
            style=Markup(_asset("style.css")),
            script=Markup(script),
            script_digest=f"sha256-{digest}",
        )
    )


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("entropy_ddp.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.globals.update(
        # matplotlib has escaped the text in a figure.
        svg=lambda figure: Markup(figure.inline_svg()),
        shown=shown,
        hover=hover,
        pieces=pieces,
        numeric=numeric,
    )
    return environment


def _asset(name: str) -> str:
    return files("entropy_ddp.report").joinpath("templates", name).read_text("utf-8")


def shown(cell: Cell) -> str:
    """The text of a cell; numbers are rounded, with a true minus and powers of ten."""
    value, error, signed = cell.value, cell.error, cell.signed
    if value is None:
        return DASH
    match cell.kind:
        case "number" | "decimal" | "size":
            written = number(value, min(cell.digits, DIGITS), signed=signed)
        case "change" | "level":
            written = with_error(value, error, signed=signed)
        case "interval":
            written = bounds(value, signed=signed)
        case "part":
            written = supported(value, error, 3, signed=signed)
        case "share" if error:
            written = percent_with_error(value, error, signed=signed)
        case "share":
            written = percent(value, cell.digits, signed=signed)
        case "share_part":
            told = is_resolved(1.0, error)
            written = supported_percent(value, error) if told else DASH
        case "expression":
            written = typeset(value)
        case "excerpt":
            written = one_line(value, EXCERPT)
        case "verdict":
            written = cell.whole or value
        case _:
            written = str(value)
    return f"{cell.mark} {written}" if cell.mark else written


def bounds(ends: tuple[float | None, float | None], *, signed: bool) -> str:
    """An interval, or the one bound there is."""
    low, high = ends
    if low is None or high is None:
        sign, end = ("≤", high) if low is None else ("≥", low)
        assert end is not None
        return f"{sign}{FIXED}{number(end, 2, signed=signed)}"
    return interval(low, high, signed=signed)


def hover(cell: Cell) -> str:
    """What hovering over a cell shows, such as all digits; empty if that is no more."""
    if cell.kind == "verdict" or cell.value is None:
        return ""
    if cell.kind in ("change", "level") or (cell.kind == "share" and cell.error):
        return f"{cell.value!r} ± {cell.error!r}"
    if cell.kind == "interval":
        return " to ".join("–" if end is None else repr(end) for end in cell.value)
    whole = exact(cell.value) if cell.is_number else cell.whole
    return whole if whole != shown(cell) else ""


def pieces(cell: Cell) -> tuple[str, str, str]:
    """What is shown before a token, the token, and what is shown after it."""
    before, token, after = cell.value
    head, tail = around(before, after, CONTEXT)
    return head, visible(token), tail


def numeric(table: Table, place: int) -> bool:
    """Whether a column is one of numbers, and so set to the right."""
    cells = (row[place] for row in table.rows if len(row) == len(table.columns))
    return any(cell.is_number for cell in cells)


def complaints(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The checks that are not ok in the page's signs, what fails first."""
    return [
        {
            "verdict": row["verdict"],
            "name": row["name"],
            "value": _found(row["value"]),
            "expected": typeset(row["expected"]),
            "hint": row["hint"][:1].upper() + row["hint"][1:],
        }
        for row in checks_that_complain(rows)
    ]


def _found(value: Any) -> str:
    if isinstance(value, dict):
        parts = (f"{short_name(name)}: {_found(item)}" for name, item in value.items())
        return "; ".join(parts)
    return shown(found(value))
