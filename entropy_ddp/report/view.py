"""What a page is made of, before it is HTML: words, tables and figures in order."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from entropy_ddp.report.words import (
    around,
    exact,
    number,
    supported,
    visible,
    with_error,
)

if TYPE_CHECKING:
    # Words and tables need no library for figures.
    from entropy_ddp.report.figures.canvas import Figure

# Characters of its context that are shown on either side of a token.
CONTEXT = 60


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what is shown.
        title: what hovering shows, such as all digits of a number; may be empty.
        is_number: set to the right.
        marked: text with a part to be marked: (before, marked, after).
        sign: `cold` or `warm`, the ground of the marked part.
        verdict: ok, warn or fail, which is shown in its colour.
        is_long: text that keeps some width where there is little.
    """

    text: str
    title: str = ""
    is_number: bool = False
    marked: tuple[str, str, str] | None = None
    sign: str = ""
    verdict: str = ""
    is_long: bool = False


def words(text: Any) -> Cell:
    """A cell of text."""
    return Cell(text=str(text))


def digits(value: Any, significant: int = 4, *, signed: bool = False) -> Cell:
    """A cell of a number, rounded in view and whole on hover; None is a dash."""
    if value is None:
        return Cell(text="–", is_number=True)
    return Cell(
        text=number(value, significant, signed=signed),
        title=exact(value),
        is_number=True,
    )


def in_context(share: float, pieces: Sequence[str], most: int = CONTEXT) -> Cell:
    """A cell of a token, on a ground of its share's sign, between what surrounds it.

    Args:
        share: of the token.
        pieces: text before it, the token, text after it.
        most: characters that are shown on either side.
    """
    before, token, after = pieces
    before, after = around(before, after, most)
    sign = "cold" if share < 0 else "warm"
    marked = (before, visible(token), after)
    return Cell(text="", marked=marked, sign=sign, is_long=bool(before + after))


def measured(value: float, error: float) -> Cell:
    """A cell of a number and its standard error, whole on hover."""
    title = f"{value!r} ± {error!r}"
    return Cell(text=with_error(value, error), title=title, is_number=True)


def given_e(value: float, error: float) -> Cell:
    """A cell of a number without an error of its own, whole on hover.

    Args:
        value: the number.
        error: what its last digit is taken from.
    """
    return Cell(
        text=supported(value, error, 3, signed=True), title=exact(value), is_number=True
    )


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table.

    Attributes:
        title: what it holds.
        columns: their names.
        rows: a cell for each column.
        caption: how to read it; may be empty.
        folded: shown when the reader opens it.
        id: what links point at; may be empty.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    folded: bool = False
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Preformatted text, folded.

    Attributes:
        title: what it is.
        text: its lines.
    """

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token in its text.

    Attributes:
        text: as it is shown.
        sign: `cold` (lowers the entropy), `warm` (raises it), or neither: empty.
        strength: darkness of its ground, 0 to 1.
        numbers: position, share, log p, entropy, covariance score; for the tooltip.
        breaks: whether the line ends behind it.
    """

    text: str
    sign: str
    strength: str
    numbers: str
    breaks: bool


@dataclass(frozen=True, kw_only=True)
class TokenText:
    """One response of U, token by token.

    Attributes:
        title: which response it is.
        prompt: the prompt's text, or empty.
        prompt_line: what tells a long prompt, which is folded, from others; empty if
            the prompt is short.
        advantage: its advantage.
        before, shown, after: its tokens; the first and the last part are folded.
        left_out: how many tokens at both ends are not on the page.
    """

    title: str
    prompt: str
    prompt_line: str
    advantage: str
    before: Sequence[Token]
    shown: Sequence[Token]
    after: Sequence[Token]
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
class Section:
    """A part of the page under one heading; whatever is empty is left out."""

    id: str
    title: str
    lead: str = ""
    figures: Sequence["Figure"] = ()
    token_texts: TokenTexts | None = None
    tables: Sequence[Table] = ()
    listings: Sequence[Listing] = ()
    later_figures: Sequence["Figure"] = ()


@dataclass(frozen=True, kw_only=True)
class Glance:
    """One of the questions that the top of the page answers.

    Attributes:
        question: the question.
        answer: in a few words.
        detail: what the answer rests on.
        tone: good, bad, doubtful or empty.
    """

    question: str
    answer: str
    detail: str
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Complaint:
    """A check that is not ok."""

    verdict: str
    name: str
    value: str
    expected: str
    hint: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page.

    Attributes:
        title: of the document.
        kicker: what the page is about, above the answer.
        alarm: why nothing below may be trusted; empty if it may.
        headline: the answer in one sentence: text before the value, the value, text
            after it.
        sign: `cold` if the value is a fall, `warm` if it is a rise, or empty.
        lead: the sentence under it.
        glances: questions and short answers.
        complaints: checks that are not ok, the worst first.
        checked: one line about all checks.
        audits_id: id of the table of all checks; empty if there is none.
        sections: everything else.
    """

    title: str
    kicker: str
    alarm: str = ""
    headline: tuple[str, str, str]
    sign: str = ""
    lead: str
    glances: Sequence[Glance] = ()
    complaints: Sequence[Complaint] = ()
    checked: str = ""
    audits_id: str = ""
    sections: Sequence[Section] = field(default_factory=tuple)

    @property
    def figures(self) -> "list[Figure]":
        """All figures, in order."""
        return [
            figure
            for section in self.sections
            for figure in (*section.figures, *section.later_figures)
        ]
