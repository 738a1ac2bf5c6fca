"""Estimates one below the other, each with its error."""

from dataclasses import dataclass

from matplotlib.axes import Axes

from entropy_ddp.report.figures.canvas import (
    Palette,
    common_exponent,
    label_below_names,
    scale_ticks,
    unit_label,
)

ROW_PIXELS = 24
FRAME_PIXELS = 62


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One row of a forest plot.

    Attributes:
        label: what it is; if empty, the same as the row before, and drawn under it.
        value: the estimate.
        error: its standard error; None if it has none.
        colour: name of its colour in the palette.
        strong: drawn large, as one that the reader should see first.
    """

    label: str
    value: float
    error: float | None
    colour: str = "ink"
    strong: bool = True


def forest_height(rows: int) -> int:
    """Pixels for so many rows and the frame around them."""
    return FRAME_PIXELS + ROW_PIXELS * rows


def draw_forest(
    axes: Axes, palette: Palette, rows: list[Estimate], label: str, unit: str
) -> None:
    """Values with bars of one (thick) and two (thin) standard errors, and zero."""
    places: list[float] = []
    labelled: dict[float, str] = {}
    for row in rows:
        places.append(float(len(labelled)) if row.label else places[-1] + 0.36)
        if row.label:
            labelled[places[-1]] = row.label
    for place, row in zip(places, rows, strict=True):
        colour = getattr(palette, row.colour)
        if row.error:
            for errors, width in ((2, 1.2), (1, 3.2 if row.strong else 2.2)):
                ends = row.value - errors * row.error, row.value + errors * row.error
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
    furthest = max(abs(row.value) + 2 * (row.error or 0) for row in rows)
    exponent = common_exponent([furthest])
    scale_ticks(axes, "x", exponent)
    label_below_names(axes, unit_label(label, unit, exponent))
