"""What moves the entropy at several checkpoints: parts of the step, kinds, what if."""

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from entropy_ddp.report.figures.canvas import (
    Draw,
    Figure,
    Palette,
    common_exponent,
    scale_ticks,
    unit_label,
)
from entropy_ddp.report.figures.forest import Estimate, draw_forest, forest_height
from entropy_ddp.report.figures.progress import Stage, label_stages

HEIGHT = 320
# Of the distance between two checkpoints that are nearest.
BAR_WIDTH = 0.62
Series = dict[str, tuple[str, float, list[float]]]


def parts_by_step(
    stages: Sequence[Stage],
    parts: dict[str, list[float]],
    by_step: bool,
    unit: str,
    title: str,
) -> Figure:
    """Momentum, weight decay and U's gradient at every checkpoint.

    Args:
        stages: the checkpoints.
        parts: the value of each part at each of them.
        by_step: whether they stand at their training steps.
        unit: of the entropy.
        title: what is seen.
    """
    looks = {
        "momentum": ("muted", 0.55),
        "weight decay": ("ink", 0.9),
        "gradient of U": ("accent", 1.0),
    }
    series = {
        name: (*looks[name], values) for name, values in parts.items() if any(values)
    }
    return Figure(
        name="parts-by-step",
        title=title,
        caption=(
            "Each bar is the first-order change at one checkpoint in its parts: below "
            "zero what lowers the entropy, above what raises it. Dots are their sum. "
            "Momentum is what the gradients of earlier batches left. The title counts signs."
        ),
        draw=_stacked(stages, series, by_step, unit),
        height=HEIGHT,
    )


def kinds_by_step(
    stages: Sequence[Stage],
    kinds: dict[str, list[float]],
    by_step: bool,
    unit: str,
    title: str,
) -> Figure:
    """The gradient's part at every checkpoint by kind of token; arguments as above."""
    looks = {
        "A < 0, p < 0.5": ("accent", 1.0),
        "A < 0, p ≥ 0.5": ("accent", 0.4),
        "A > 0, p < 0.5": ("muted", 1.0),
        "A > 0, p ≥ 0.5": ("muted", 0.4),
    }
    series = {
        name: (*look, kinds[name]) for name, look in looks.items() if any(kinds[name])
    }
    return Figure(
        name="kinds-by-step",
        title=title,
        caption=(
            "Shares of U's tokens at each checkpoint, summed by the sign of the advantage "
            "(violet: negative, grey: positive) and by the token's probability "
            "(strong: below 0.5, faint: above). Dots are their sum, the gradient's part."
        ),
        draw=_stacked(stages, series, by_step, unit),
        height=HEIGHT,
    )


def _stacked(stages: Sequence[Stage], series: Series, by_step: bool, unit: str) -> Draw:
    """Signed bars on top of each other, away from zero on both sides."""
    places = [stage.place for stage in stages]
    width = BAR_WIDTH * min((b - a for a, b in pairwise(places)), default=1.0)
    columns = [values for _, _, values in series.values()]
    sums = [sum(column) for column in zip(*columns, strict=True)] or [0.0] * len(places)

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        ends = {True: [0.0] * len(places), False: [0.0] * len(places)}
        for name, (colour, alpha, values) in series.items():
            bottoms = [ends[v > 0][at] for at, v in enumerate(values)]
            axes.bar(
                places, values, width, bottoms, color=getattr(palette, colour),
                alpha=alpha, linewidth=0, label=name,
            )  # fmt: skip
            for at, value in enumerate(values):
                ends[value > 0][at] += value
        axes.axhline(0, color=palette.muted, linewidth=1)
        axes.plot(
            places, sums, "o", color=palette.ink, markeredgecolor=palette.paper,
            markersize=6.5, label="together",
        )  # fmt: skip
        exponent = common_exponent([*ends[True], *ends[False]])
        scale_ticks(axes, "y", exponent)
        axes.set_ylabel(unit_label("first order", unit, exponent))
        _legend_below(figure, axes, palette)
        label_stages(axes, stages, by_step)

    return draw


def what_if_by_step(
    stages: Sequence[Stage],
    pairs: dict[str, list[tuple[float, float]]],
    by_step: bool,
    unit: str,
    title: str,
    measured: bool,
) -> Figure:
    """The change with all tokens and without some, at every checkpoint.

    Args:
        stages: the checkpoints.
        pairs: change and standard error (0 if it has none) at each, first of the step
            as it is, then of the one without the tokens.
        by_step: whether they stand at their training steps.
        unit: of the entropy.
        title: what is seen.
        measured: whether the steps were really taken.
    """
    (whole, before), (rule, after) = pairs.items()
    caption = "The change as it is, and of the same step had these tokens been left out of U: "
    caption += (
        "both steps really taken and measured, with two standard errors."
        if measured
        else "both predicted by first order, the whole with two standard errors."
    )
    caption += " The title counts signs of their difference."
    places = [stage.place for stage in stages]
    shift = 0.05 * min((b - a for a, b in pairwise(places)), default=1.0)
    exponent = common_exponent([value for value, _ in before + after])

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        axes.axhline(0, color=palette.muted, linewidth=1)
        for name, colour, offset, points in (
            (whole, palette.ink, -shift, before), (rule, palette.accent, shift, after),
        ):  # fmt: skip
            values, errors = zip(*points)
            axes.errorbar(
                [place + offset for place in places], values,
                [2 * error for error in errors], fmt="o", color=colour, markersize=6,
                linewidth=1.4, label=name,
            )  # fmt: skip
        scale_ticks(axes, "y", exponent)
        axes.set_ylabel(unit_label("entropy change", unit, exponent))
        _legend_below(figure, axes, palette)
        label_stages(axes, stages, by_step)

    return Figure(
        name="what-if-by-step", title=title, caption=caption, draw=draw, height=HEIGHT
    )


def rules_in_all(
    sums: dict[str, tuple[float, float | None]], unit: str, scope: str
) -> Figure:
    """The summed change without the tokens of each rule.

    Args:
        sums: by rule, the predicted and the measured change; None where not every
            checkpoint has one. The first is the change with nothing left out.
        unit: of the entropy.
        scope: over what they are summed.
    """
    rows: list[Estimate] = []
    for place, (rule, (linear, truth)) in enumerate(sums.items()):
        values = [("accent", linear)] + [("ink", truth)] * (truth is not None)
        for (colour, value), label in zip(values, (rule, "")):
            assert value is not None
            rows.append(
                Estimate(
                    label=label,
                    value=value,
                    error=None,
                    colour=colour,
                    strong=not place,
                )
            )
    caption = f"Changes summed over the {scope}. Violet: predicted by first order."
    if any(truth is not None for _, truth in sums.values()):
        caption += " The others: the steps without these tokens really taken, measured."

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        draw_forest(figure.subplots(), palette, rows, "entropy change", unit)

    return Figure(
        name="what-if-in-all",
        title="What each rule leaves of the change",
        caption=caption,
        draw=draw,
        height=forest_height(len(sums)),
    )


def _legend_below(figure: MatplotlibFigure, axes: Axes, palette: Palette) -> None:
    """The legend under the axes, where it hides no bar."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    figure.legend(
        handles, labels, loc="outside lower left", labelcolor=palette.ink,
        ncols=2 if longest < 22 else 1,
    )  # fmt: skip
