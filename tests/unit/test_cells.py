"""Is a cell written with the digits that it has, in the terminal and on the page?"""

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from entropy_ddp.answers import cells
from entropy_ddp.answers.cells import Cell, Table
from entropy_ddp.report import page
from entropy_ddp.terminal import tables as terminal

MINUS, FIXED = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
# What is shown in the terminal, on the page, and on hover there.
WRITTEN: dict[str, tuple[Cell, str, str, str]] = {
    "text": (cells.text("as it is"), "as it is", "as it is", ""),
    "short name": (
        cells.text("q_proj", whole="model.q_proj"), "q_proj", "q_proj", "model.q_proj",
    ),
    "head": (cells.head("by position")[0], "by position", "by position", ""),
    "entry": (cells.entry("lora_A"), "  lora_A", "lora_A", ""),
    "expression": (cells.expression("<= -1e-4"), "<= -1e-4", "≤ −1e−4", ""),
    "verdict": (cells.verdict("warn", "2 warnings"), "warn", "2 warnings", ""),
    "excerpt": (cells.excerpt("a\nb", "the a\nb"), "a↵b", "a b", "the a\nb"),
    "exact number": (cells.number(0.0123456789, 7), "0.01234568", "0.012346", "0.0123456789"),
    "count": (cells.number(18531), "18,531", "18,531", "18531"),
    "place": (cells.place(18531), "18531", "18531", ""),
    "decimal": (cells.decimal(-2.5, signed=True), "-2.500", "−2.5", "-2.5"),
    "size": (cells.size(2.5e-7, 2), "2.5e-07", "2.5 × 10⁻⁷", "2.5e-07"),
    "change": (
        cells.change(-0.0019644, 0.000127), "-1.9644e-03 ± 1.3e-04",
        "−0.00196 ± 0.00013", "-0.0019644 ± 0.000127",
    ),
    "configured": (
        cells.change(0.5, 0.1, "*"), "* +5.0000e-01 ± 1.0e-01", "* +0.50 ± 0.10",
        "0.5 ± 0.1",
    ),
    "level": (
        cells.level(0.27652, 0.0017), "0.2765 ± 0.0017", "0.2765 ± 0.0017",
        "0.27652 ± 0.0017",
    ),
    "level of an old run": (cells.level(0.27652, None), "0.28", "0.28", "0.27652"),
    "part": (cells.part(-0.001734, 0.0001), "-1.7e-03", "−0.0017", "-0.001734"),
    "part of zero": (cells.part(0.0, 0.0001), "0", "0", "0.0"),
    "share": (cells.share(0.388, 3), "38.8 %", "38.8 %", "0.388"),
    "share with an error": (
        cells.share(0.5, error=0.01), "50.0 ± 1.0 %", "50.0 ± 1.0 %", "0.5 ± 0.01",
    ),
    "share of a total": (cells.share_part(0.86, 1.0, 0.1), "90 %", "90 %", "0.86"),
    "share of what may be nothing": (
        cells.share_part(0.86, 1.0, 0.6), "–", "–", "0.86",
    ),
    "share of nothing": (cells.share_part(0.0, 0.0, 0.1), "–", "–", ""),
    "interval": (
        cells.interval([-0.0022225, -0.0017775]), "[-2.22e-3, -1.78e-3]",
        "−0.00222 to −0.00178", "-0.0022225 to -0.0017775",
    ),
    "interval of an entropy": (
        cells.interval((0.2732, 0.2798), signed=False), "[0.2732, 0.2798]",
        "0.2732 to 0.2798", "0.2732 to 0.2798",
    ),
    "interval that is open above": (
        cells.interval([1.67e-5, None], signed=False), ">= 1.7e-05",
        "≥ 1.7 × 10⁻⁵", "1.67e-05 to –",
    ),
    "interval that is open below": (
        cells.interval([None, 1.67e-5], signed=False), "<= 1.7e-05",
        "≤ 1.7 × 10⁻⁵", "– to 1.67e-05",
    ),
    "no interval": (cells.interval([None, None]), "–", "–", ""),
    "not known": (cells.change(0.1, None), "–", "–", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_every_kind_is_written_by_both(name: str) -> None:
    """In the notation of each; all digits are a hover away."""
    cell, in_terminal, on_page, on_hover = WRITTEN[name]
    assert terminal.shown(cell).plain.replace(FIXED, " ") == in_terminal
    assert page.shown(cell).replace(FIXED, " ") == on_page
    assert page.hover(cell) == on_hover


def test_a_token_is_marked_in_its_context() -> None:
    """In brackets, or on a ground of its sign."""
    cell = cells.context(("1+1=", "2", "<eos>"), falls=True)
    assert terminal.shown(cell).plain == "1+1=[2]<eos>"
    assert page.pieces(cell) == ("1+1=", "2", "<eos>")


@given(value=st.floats(-1e3, 1e3), exponent=st.floats(-6, 3))
@example(value=950.0, exponent=2.0)
@example(value=-980.0, exponent=2.0)
def test_a_part_has_no_digit_behind_the_first_of_the_error(
    value: float, exponent: float
) -> None:
    """And reads the same in both: within half a unit of its last digit."""
    error = 10.0**exponent
    cell = cells.part(value, error)
    for text in (terminal.shown(cell).plain, page.shown(cell)):
        plain = text.replace(MINUS, "-").replace(FIXED, "").replace(",", "")
        plain = re.sub("×10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", _power, plain)
        mantissa, _, power = plain.partition("e")
        digits = len(mantissa.partition(".")[2])
        if "." not in mantissa:
            # Zeros of a whole number are places, not digits.
            digits = len(mantissa.rstrip("0")) - len(mantissa)
            mantissa = mantissa.rstrip("0")
        significant = len(re.sub(r"^[-+0.]+|\.", "", mantissa))
        last = 10.0 ** (int(power or 0) - digits)
        assert significant <= 1 or last >= 10 ** math.floor(math.log10(error)) * 0.99
        # Of one digit, of which nothing is known, at least the size.
        assert abs(float(plain) - value) <= max(error, 0.51 * last, 0.51 * abs(value))


def _power(found: re.Match[str]) -> str:
    return "e" + found[1].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))


@pytest.mark.parametrize(("width", "lines"), [(200, 2), (30, 4)])
def test_blocks_stand_beside_each_other_where_there_is_room(
    width: int, lines: int
) -> None:
    """And below each other, indented, where there is none."""
    table = Table(
        title="Shares",
        columns=("kind", "nats"),
        rows=[
            cells.head("first"), (cells.text("a"), cells.part(1.0, 0.1)),
            cells.head("second"), (cells.text("b"), cells.part(2.0, 0.1)),
        ],
    )  # fmt: skip
    console = Console(width=width)
    with console.capture() as capture:
        console.print(terminal.written(table, width))
    body = [line for line in capture.get().splitlines() if line.startswith("│")]
    assert len(body) == lines
    assert all(f"  {name} " in capture.get() for name in "ab")
