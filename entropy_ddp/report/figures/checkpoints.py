"""Several checkpoints of a training run side by side: entropy, change and its causes."""

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from entropy_ddp.answers import shares
from entropy_ddp.answers.checkpoints import (
    NOTHING,
    PARTS,
    Checkpoints,
    Pair,
    Stage,
    told_entropy,
)
from entropy_ddp.answers.holding import FAMILIES, NEUTRAL, Curve, target_of, title
from entropy_ddp.answers.words import FIXED
from entropy_ddp.report.figures.canvas import (
    Draw,
    Figure,
    Palette,
    common_exponent,
    scale_ticks,
    unit_label,
    whole_ticks,
)
from entropy_ddp.report.figures.charts import Estimate, forest, forest_height

MOST_TICKS = 10
HEIGHT = 320
# Of a panel, and around all of them.
PANEL, PANEL_FRAME = 100, 50
# Of the distance between two checkpoints that are nearest.
BAR_WIDTH = 0.62
# Colour and strength of the bars.
PART_LOOKS = {
    "momentum": ("muted", 0.55),
    "weight decay": ("ink", 0.9),
    "gradient of U": ("accent", 1.0),
}
KIND_LOOKS = {
    "A < 0, p < 0.5": ("accent", 1.0),
    "A < 0, p ≥ 0.5": ("accent", 0.4),
    "A > 0, p < 0.5": ("muted", 1.0),
    "A > 0, p ≥ 0.5": ("muted", 0.4),
}
# By name: colour in the palette, strength, and a value for each checkpoint.
Series = dict[str, tuple[str, float, list[float]]]


def entropy_by_step(found: Checkpoints) -> Figure:
    """Entropy of each checkpoint."""

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        places = [stage.place for stage in found.stages]
        values = [stage.entropy[0] for stage in found.stages]
        errors = [s.quantile * (s.entropy[1] or 0.0) for s in found.stages]
        axes.errorbar(
            places, values, errors, fmt="o-" if found.by_step else "o",
            color=palette.ink, markersize=6, linewidth=1.4,
        )  # fmt: skip
        highest = max(value + error for value, error in zip(values, errors))
        axes.set_ylim(0, 1.1 * highest or 1)
        axes.set_ylabel(f"entropy H [{found.axis_unit}]")
        scale_ticks(axes, "y", 0)
        _label_stages(axes, found.stages, found.by_step)

    return Figure(
        name="entropy-by-step",
        title=told_entropy(found),
        caption=(
            "Entropy of every checkpoint on its own batch E, before the step that is "
            f"probed, with 95{FIXED}% intervals. The axis begins at 0: what is left of the "
            "entropy is seen."
        ),
        draw=draw,
    )


def change_by_step(found: Checkpoints) -> Figure:
    """What one step does at each checkpoint, measured and predicted."""
    falls, rises = found.falls_and_rises
    stages = found.stages
    lower = sum(stage.truth[0] < 0 for stage in stages if stage.is_trusted)
    title = f"One step lowers the entropy at {falls} of {len(stages)} checkpoints"
    points = {
        "measured": [stage.truth for stage in stages],
        "first order": [stage.linear for stage in stages],
    }

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        _draw_beside(axes, palette, found, stages, points, 0.06)
        axes.legend(labelcolor=palette.ink)

    return Figure(
        name="change-by-step",
        title=f"{title}, raises it at {rises}" if rises else title,
        caption=(
            "The change that one optimizer step makes at every checkpoint, measured and "
            f"predicted, with 95{FIXED}% intervals. Where both lie together the prediction "
            "can be read without the measurement. The title counts measured changes whose "
            "interval leaves zero out and that no check speaks against; by sign "
            f"alone, {lower} lower it."
        ),
        draw=draw,
    )


def parts_by_step(found: Checkpoints) -> Figure:
    """Momentum, weight decay and U's gradient at every checkpoint."""
    parts = {name: [stage.part(name) for stage in found.moved] for name in PARTS}
    gradient, total = parts["gradient of U"], len(found.moved)
    downs = sum(value < 0 for value in gradient)
    title = f"The gradient of U has a negative part at {downs} of {total}"
    if 2 * downs < total:
        ups = sum(value > 0 for value in gradient)
        title = f"The gradient of U has a positive part at {ups} of {total}"
    return Figure(
        name="parts-by-step",
        title=title,
        caption=(
            "Each bar is the first-order change at one checkpoint in its parts: below "
            "zero what lowers the entropy, above what raises it. Dots are their sum. "
            "Momentum is what the gradients of earlier batches left. The title counts signs."
        ),
        draw=_stacked(
            found,
            {name: (*PART_LOOKS[name], v) for name, v in parts.items() if any(v)},
        ),
        height=HEIGHT,
    )


def kinds_by_step(found: Checkpoints) -> Figure:
    """The gradient's part at every checkpoint by kind of token."""
    total = found.by_kind
    title = "No token of U has a share"
    if total.share:
        verb = "lower" if total.share < 0 else "raise"
        title = f"{shares.named(total.leading())} {verb} the entropy most"
    kinds = {
        kind: (*look, [stage.of_kind(kind) for stage in found.moved])
        for kind, look in KIND_LOOKS.items()
    }
    return Figure(
        name="kinds-by-step",
        title=title,
        caption=(
            "Shares of U's tokens at each checkpoint, summed by the sign of the advantage "
            "(violet: negative, grey: positive) and by the token's probability "
            "(strong: below 0.5, faint: above). Dots are their sum, the gradient's part."
        ),
        draw=_stacked(found, {kind: s for kind, s in kinds.items() if any(s[2])}),
        height=HEIGHT,
    )


def _stacked(found: Checkpoints, series: Series) -> Draw:
    """Signed bars on top of each other, away from zero on both sides."""
    places = [stage.place for stage in found.moved]
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
        axes.set_ylabel(unit_label("first order", found.axis_unit, exponent))
        _legend_below(figure, axes, palette)
        _label_stages(axes, found.moved, found.by_step)

    return draw


def what_if_by_step(found: Checkpoints) -> Figure:
    """The change with all tokens and without those of the best rule."""
    rule, stages = found.best_rule, found.moved
    left = found.measured if found.verified else found.predicted
    points = {
        NOTHING: [left(stage, NOTHING) for stage in stages],
        f"without {rule}": [left(stage, rule) for stage in stages],
    }
    raised = sum(b[0] < a[0] for b, a in zip(*points.values(), strict=True))
    caption = "The change as it is, and of the same step had these tokens been left out of U: "
    caption += (
        f"both steps really taken and measured, with 95{FIXED}% intervals."
        if found.verified
        else f"both predicted by first order, with 95{FIXED}% intervals."
    )

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        _draw_beside(axes, palette, found, stages, points, 0.05)
        _legend_below(figure, axes, palette)

    return Figure(
        name="what-if-by-step",
        title=f"Without {rule} it is higher at {raised} of {len(stages)}",
        caption=caption + " The title counts signs of their difference.",
        draw=draw,
        height=HEIGHT,
    )


def rules_in_all(found: Checkpoints) -> Figure:
    """The summed change without the tokens of each rule."""
    rows: list[Estimate] = []
    for rule in (NOTHING, *found.rules):
        strong = rule == NOTHING
        value, _ = found.predicted_in_all(rule)
        rows.append(Estimate(rule, value, None, "accent", strong))
        if found.verified:
            value, _ = found.measured_in_all(rule)
            rows.append(Estimate("", value, None, strong=strong))
    caption = (
        f"Changes summed over the {found.scope}. Violet: predicted by first order."
    )
    if found.verified:
        caption += " The others: the steps without these tokens really taken, measured."
    return Figure(
        name="what-if-in-all",
        title="What each rule leaves of the change",
        caption=caption,
        draw=forest(rows, "entropy change", found.axis_unit),
        height=forest_height(1 + len(found.rules)),
    )


def held_by_step(found: Checkpoints, curves: Sequence[Curve]) -> Figure:
    """What would have held the entropy at every checkpoint, a panel for each family."""
    stages, target = found.moved, target_of(found.moved[0].document)
    places = [stage.place for stage in stages]

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
        for axes, curve in zip(panels, curves, strict=True):
            for place, stage, (value, error, saturated) in zip(
                places, stages, curve.values, strict=True
            ):
                axes.errorbar(
                    place, value, stage.quantile * (error or 0.0) or None, fmt="o",
                    color=palette.accent, markersize=5, linewidth=1.4,
                    markerfacecolor=palette.paper if saturated else palette.accent,
                )  # fmt: skip
            axes.axhline(
                NEUTRAL.get(curve.family, 0.0), color=palette.muted, linewidth=1
            )
            axes.set_title(FAMILIES[curve.family], loc="left", color=palette.ink)
            axes.margins(y=0.2)
        _label_stages(panels[-1], stages, found.by_step)

    return Figure(
        name="held-by-step",
        title=title(target, found.unit),
        caption=(
            "The parameter of each family that makes the first-order change of the step "
            f"what is wanted, with 95{FIXED}% intervals. Open: saturated, no member reaches "
            "it and the nearest is shown. Line: the plain loss."
        ),
        draw=draw,
        height=PANEL_FRAME + PANEL * len(curves),
    )


def _draw_beside(
    axes: Axes,
    palette: Palette,
    found: Checkpoints,
    stages: Sequence[Stage],
    points: dict[str, list[Pair]],
    shift: float,
) -> None:
    """Two changes at every checkpoint, with 95 % intervals, beside each other.

    Args:
        points: of each name, for every checkpoint.
        shift: of either from its place, in the least distance of two places.
    """
    places = [stage.place for stage in stages]
    shift *= min((b - a for a, b in pairwise(places)), default=1.0)
    looks = ((palette.ink, -shift), (palette.accent, shift))
    axes.axhline(0, color=palette.muted, linewidth=1)
    for (name, pairs), (colour, offset) in zip(points.items(), looks, strict=True):
        values, errors = zip(*pairs)
        axes.errorbar(
            [place + offset for place in places], values,
            [s.quantile * error for s, error in zip(stages, errors, strict=True)],
            fmt="o", color=colour, markersize=6, linewidth=1.4, label=name,
        )  # fmt: skip
    exponent = common_exponent([v for pairs in points.values() for v, _ in pairs])
    scale_ticks(axes, "y", exponent)
    axes.set_ylabel(unit_label("entropy change", found.axis_unit, exponent))
    _label_stages(axes, stages, found.by_step)


def _label_stages(axes: Axes, stages: Sequence[Stage], by_step: bool) -> None:
    """Name the axis of checkpoints, and show where they stand."""
    if by_step:
        axes.set_xlabel("training step of the checkpoint")
    else:
        axes.set_xlabel("run, in the given order")
    places = [stage.place for stage in stages]
    if len(places) <= MOST_TICKS:
        axes.set_xticks(places, [f"{place:,g}" for place in places])
    else:
        whole_ticks(axes, "x")


def _legend_below(figure: MatplotlibFigure, axes: Axes, palette: Palette) -> None:
    """The legend under the axes, where it hides no bar."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    figure.legend(
        handles, labels, loc="outside lower left", labelcolor=palette.ink,
        ncols=2 if longest < 22 else 1,
    )  # fmt: skip
