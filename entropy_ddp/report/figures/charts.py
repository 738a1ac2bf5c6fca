"""The kinds of figures: estimates with errors, bars, dots, outlines of histograms."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as MatplotlibFigure
from numpy.typing import ArrayLike

from entropy_ddp.answers.words import RESOLVED
from entropy_ddp.report.figures.canvas import (
    LARGEST_SCATTER,
    Draw,
    Palette,
    common_exponent,
    label_below_names,
    scale_ticks,
    unit_label,
    whole_ticks,
)

ROW_PIXELS = 24
FRAME_PIXELS = 62


class Estimate(NamedTuple):
    """One row of a forest plot.

    Attributes:
        label: what it is; if empty, the same as the row before, and drawn under it.
        value: the estimate.
        error: its standard error; None if it has none.
        colour: name of its colour in the palette.
        strong: drawn large, as one that the reader should see first.
        quantile: standard errors that make half of its 95 % interval.
    """

    label: str
    value: float
    error: float | None
    colour: str = "ink"
    strong: bool = True
    quantile: float = RESOLVED

    @property
    def half(self) -> float:
        """Half of the 95 % interval; 0 without an error."""
        return self.quantile * (self.error or 0.0)


def forest(rows: Sequence[Estimate], label: str, unit: str) -> Draw:
    """All that a figure shows is one forest plot."""
    return lambda figure, palette: draw_forest(
        figure.subplots(), palette, rows, label, unit
    )


def forest_height(rows: int) -> int:
    """Pixels for so many rows and the frame around them."""
    return FRAME_PIXELS + ROW_PIXELS * rows


def draw_forest(
    axes: Axes, palette: Palette, rows: Sequence[Estimate], label: str, unit: str
) -> None:
    """Values with their standard errors (thick) and 95 % intervals (thin), and zero."""
    places: list[float] = []
    labelled: dict[float, str] = {}
    for row in rows:
        places.append(float(len(labelled)) if row.label else places[-1] + 0.36)
        if row.label:
            labelled[places[-1]] = row.label
    for place, row in zip(places, rows, strict=True):
        colour = getattr(palette, row.colour)
        if row.error:
            for half, width in (
                (row.half, 1.2),
                (row.error, 3.2 if row.strong else 2.2),
            ):
                ends = row.value - half, row.value + half
                axes.plot(
                    ends, (place, place), color=colour, linewidth=width,
                    solid_capstyle="butt",
                )  # fmt: skip
        size = 7.5 if row.strong else 5
        axes.plot(row.value, place, "o", color=colour, markersize=size)
    axes.axvline(0, color=palette.muted, linewidth=1)
    axes.set_yticks(list(labelled), list(labelled.values()))
    axes.set_ylim(len(labelled) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=palette.ink)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    furthest = max(abs(row.value) + row.half for row in rows)
    exponent = common_exponent([furthest])
    scale_ticks(axes, "x", exponent)
    label_below_names(axes, unit_label(label, unit, exponent))


NUM_BINS = 60
HEXAGONS_ACROSS = 36


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values along one axis.

    Attributes:
        values: one number for each thing that is drawn.
        label: what they are.
        unit: their unit; empty for counts and pure numbers.
        whole: they are whole numbers, and ticks between them would mislead.
    """

    values: ArrayLike
    label: str
    unit: str = ""
    whole: bool = False


def what_is_drawn(count: int, thing: str) -> str:
    """How a caption begins for so many points, `thing` as in `response of E`."""
    if count <= LARGEST_SCATTER:
        return f"Each dot is a {thing}."
    noun, _, rest = thing.partition(" ")
    return (
        f"{count:,} {noun}s {rest}, counted in hexagons: the stronger the colour, the "
        "more, on a logarithmic scale."
    )


def scatter(across: Axis, up: Axis) -> Draw:
    """One dot for each pair, cold below zero and warm above; hexagons for very many."""
    x = np.asarray(across.values, dtype=float)
    y = np.asarray(up.values, dtype=float)

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        axes.axhline(0, color=palette.muted, linewidth=1)
        if len(x) > LARGEST_SCATTER:
            _draw_hexagons(axes, palette, x, y)
        else:
            _draw_dots(axes, palette, x, y)
        _label_axis(axes, "x", across, x)
        _label_axis(axes, "y", up, y)

    return draw


def _draw_dots(axes: Axes, palette: Palette, x: np.ndarray, y: np.ndarray) -> None:
    alpha = 0.75 if len(x) < 300 else 0.4
    sides = ((y < 0, palette.cold), (y > 0, palette.warm), (y == 0, palette.muted))
    for chosen, colour in sides:
        if chosen.any():
            axes.plot(
                x[chosen], y[chosen], "o", color=colour, markersize=4, alpha=alpha,
                markeredgewidth=0,
            )  # fmt: skip


def _draw_hexagons(axes: Axes, palette: Palette, x: np.ndarray, y: np.ndarray) -> None:
    hexagons = axes.hexbin(x, y, gridsize=HEXAGONS_ACROSS, mincnt=1, linewidths=0)
    counts = np.asarray(hexagons.get_array(), dtype=float)
    middles = np.asarray(hexagons.get_offsets())[:, 1]
    darkness = 0.12 + 0.88 * np.log1p(counts) / np.log1p(counts.max())
    colours = [palette.cold if middle < 0 else palette.warm for middle in middles]
    hexagons.set_array(None)
    hexagons.set_facecolor(
        [(*to_rgb(c), float(d)) for c, d in zip(colours, darkness, strict=True)]
    )


def _label_axis(axes: Axes, which: str, axis: Axis, values: np.ndarray) -> None:
    exponent = 0 if axis.whole else common_exponent([float(abs(values).max())])
    if axis.whole:
        whole_ticks(axes, which)
    else:
        scale_ticks(axes, which, exponent)
    label = unit_label(axis.label, axis.unit, exponent) if axis.unit else axis.label
    getattr(axes, f"set_{which}label")(label)


def _between_powers(count: float) -> str:
    """2 and 5 of every power of ten: of few responses there is only one power."""
    return f"{count:,.0f}" if f"{count:.0e}"[0] in "25" else ""


def histogram(
    series: list[tuple[str, ArrayLike, str]], label: str, unit: str, counted: str
) -> Draw:
    """Outlines of several histograms on one axis; counts on a logarithmic scale.

    Args:
        series: name, values and colour of each.
        counted: what is counted, as the vertical axis is called.
    """
    arrays = [np.asarray(values, dtype=float) for _, values, _ in series]
    low = min(float(values.min()) for values in arrays)
    high = max(float(values.max()) for values in arrays)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, NUM_BINS + 1)

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        for (name, _, colour), values in zip(series, arrays, strict=True):
            counts, _ = np.histogram(values, edges)
            axes.stairs(
                counts, edges, color=getattr(palette, colour), linewidth=1.6, label=name
            )
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
        axes.axvline(0, color=palette.muted, linewidth=1)
        exponent = common_exponent([low, high])
        scale_ticks(axes, "x", exponent)
        axes.set_xlabel(unit_label(label, unit, exponent))
        axes.set_ylabel(counted)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_minor_formatter(lambda value, _: _between_powers(value))
        if len(series) > 1:
            axes.legend(labelcolor=palette.ink)

    return draw
