"""A whole run: its entropy curve, the sums of its steps, and what they are made of."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from entropy_ddp.answers.words import GIVEN_E, number
from entropy_ddp.ledger.accumulate import PARTS, Ledger
from entropy_ddp.report.figures.canvas import (
    Figure,
    Palette,
    common_exponent,
    scale_ticks,
    sign_colour,
    unit_label,
    whole_ticks,
)

UNIT = "nats/token"
# Name in the legend, colour in the palette, and line of each series.
SERIES = {
    "truth": ("sum of measured changes", "ink", "-"),
    "first_order": ("first order", "warm", "-"),
    # It lies on the truth, where all is well.
    "second_order": ("second order", "cold", "--"),
}
PART_LINES = {
    "momentum": ("momentum", "accent"),
    "gradient": ("gradient", "cold"),
    "decay": ("weight decay", "muted"),
}


def curve_and_sums(ledger: Ledger) -> Figure:
    """The measured curve, and the sums from where it begins."""

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        begin = ledger.curve[0]
        _band(axes, ledger.curve, palette.muted, "fresh responses", 0.0)
        for name, (label, colour, style) in SERIES.items():
            if name not in ledger.totals:
                continue
            points = [{"step": begin["step"], "value": 0.0, "se": 0.0}]
            points += [{"step": row["step"], **row[name]} for row in ledger.cumulative]
            line = _band(axes, points, getattr(palette, colour), label, begin["value"])
            line.set_linestyle(style)
        axes.set_xlabel("optimizer step")
        whole_ticks(axes, "x")
        axes.set_ylabel(f"entropy H [{UNIT}]")
        scale_ticks(axes, "y", 0)
        axes.legend(labelcolor=palette.ink)

    return Figure(
        name="ledger-curve",
        title="The measured curve, and what the steps add up to",
        caption=(
            "Entropy on fresh responses before every probed step, and the sums of the "
            "steps' changes from its first point on, with one standard error. Nothing of "
            "the curve is in the sums: where they follow it, no change is left out."
        ),
        draw=draw,
        height=320,
    )


def parts_by_step(ledger: Ledger) -> Figure:
    """Sums of the parts of the first-order changes."""
    rows = ledger.cumulative_parts
    exponent = common_exponent([row[name] for row in rows for name in PARTS])

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        axes.axhline(0, color=palette.muted, linewidth=1)
        for name, (label, colour) in PART_LINES.items():
            axes.plot(
                [row["step"] for row in rows],
                [row[name] for row in rows],
                color=getattr(palette, colour),
                linewidth=1.4,
                label=label,
            )
        axes.set_xlabel("optimizer step")
        whole_ticks(axes, "x")
        axes.set_ylabel(unit_label("sum", UNIT, exponent))
        scale_ticks(axes, "y", exponent)
        axes.legend(labelcolor=palette.ink)

    return Figure(
        name="ledger-parts",
        title="Which part of the steps did it",
        caption=(
            "Sums of the first-order changes by part of the optimizer's step: the moment "
            "of earlier batches, the gradient of the step's own batch, and weight decay. "
            f"{GIVEN_E}"
        ),
        draw=draw,
    )


def gradient_by_probability(ledger: Ledger) -> Figure:
    """The gradient's part by probability of the token."""
    values = ledger.deciles
    exponent = common_exponent(values)

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        labels = [str(place) for place in range(1, len(values) + 1)]
        axes.bar(labels, values, color=[sign_colour(palette, v) for v in values])
        axes.axhline(0, color=palette.muted, linewidth=1)
        axes.set_xlabel("tenth of the tokens, from least to most probable")
        axes.set_ylabel(unit_label("sum of shares", UNIT, exponent))
        scale_ticks(axes, "y", exponent)

    return Figure(
        name="ledger-deciles",
        title="Which tokens: improbable or probable ones",
        caption=(
            "The gradient's part by tenths of the tokens of a batch in order of their "
            "probability: 1 is the least probable tenth, 10 the most probable one. Their "
            "sum is part of the first-order change, of standard error "
            f"{number(ledger.share_error, 2)}."
        ),
        draw=draw,
    )


def _band(
    axes: Axes, points: Sequence[dict[str, Any]], colour: str, label: str, offset: float
) -> Any:
    """A line with one standard error on either side."""
    steps = [point["step"] for point in points]
    values = [offset + point["value"] for point in points]
    errors = [point["se"] for point in points]
    low = [value - error for value, error in zip(values, errors)]
    high = [value + error for value, error in zip(values, errors)]
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    return axes.plot(steps, values, color=colour, linewidth=1.4, label=label)[0]
