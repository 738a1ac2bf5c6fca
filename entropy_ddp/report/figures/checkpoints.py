"""Several checkpoints of a training run side by side: entropy, change and its causes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from entropy_ddp.answers.words import RESOLVED, is_resolved, with_error
from entropy_ddp.report.figures.canvas import (
    Draw,
    Figure,
    Palette,
    common_exponent,
    scale_ticks,
    unit_label,
    whole_ticks,
)
from entropy_ddp.report.figures.charts import Estimate, draw_forest, forest_height

MOST_TICKS = 10


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One checkpoint.

    Attributes:
        place: its training step, or its number in the given order.
        label: how it is called.
        checkpoint: the weights it is of.
        entropy, entropy_error: H before the step and its standard error, which old runs
            did not record: None.
        truth, truth_error: the measured change and its standard error.
        linear, linear_error: the predicted one.
        missed_error: standard error of their difference.
        is_trusted: no check says that its numbers are wrong.
    """

    place: float
    label: str
    checkpoint: str
    entropy: float
    entropy_error: float | None
    truth: float
    truth_error: float
    linear: float
    linear_error: float
    missed_error: float
    is_trusted: bool

    @property
    def is_resolved(self) -> bool:
        """Whether the measured change is to be trusted and stands out of its error."""
        return self.is_trusted and is_resolved(self.truth, self.truth_error)


def told_entropy(stages: Sequence[Stage]) -> str:
    """How the entropy of the last compares with that of the first.

    The two are of different responses: sqrt(se^2 + se^2) is the error of their
    difference, and more than that where runs share a file of E. Runs of one checkpoint
    have one entropy, which each measures by its own responses: no fall and no rise.
    """
    first, last = stages[0], stages[-1]
    if not (first.is_trusted and last.is_trusted):
        return "The entropy of each, not all of which are to be trusted"
    if first.entropy_error is None or last.entropy_error is None:
        return "The entropy of each, whose error these runs did not record"
    change = last.entropy - first.entropy
    error = math.hypot(first.entropy_error, last.entropy_error)
    if len({stage.checkpoint for stage in stages}) == 1:
        return "The entropy of one checkpoint, by the responses of each run"
    if not is_resolved(change, error):
        pair = with_error(change, error)
        return f"The entropy changes by {pair}: too little to tell from zero"
    verb = "falls" if change < 0 else "rises"
    return f"The entropy {verb} by {with_error(abs(change), error, signed=False)}"


def entropy_by_step(stages: Sequence[Stage], by_step: bool, unit: str) -> Figure:
    """Entropy of each checkpoint."""

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        places = [stage.place for stage in stages]
        values = [stage.entropy for stage in stages]
        errors = [2 * (stage.entropy_error or 0.0) for stage in stages]
        axes.errorbar(
            places, values, errors, fmt="o-" if by_step else "o", color=palette.ink,
            markersize=6, linewidth=1.4,
        )  # fmt: skip
        highest = max(value + error for value, error in zip(values, errors))
        axes.set_ylim(0, 1.1 * highest or 1)
        axes.set_ylabel(f"entropy H [{unit}]")
        scale_ticks(axes, "y", 0)
        label_stages(axes, stages, by_step)

    return Figure(
        name="entropy-by-step",
        title=told_entropy(stages),
        caption=(
            "Entropy of every checkpoint on its own batch E, before the step that is "
            "probed, with two standard errors. The axis begins at 0: what is left of the "
            "entropy is seen."
        ),
        draw=draw,
    )


def change_by_step(stages: Sequence[Stage], by_step: bool, unit: str) -> Figure:
    """What one step does at each checkpoint, measured and predicted."""
    falls, rises = falls_and_rises(stages)
    lower = sum(stage.truth < 0 for stage in stages if stage.is_trusted)
    title = f"One step lowers the entropy at {falls} of {len(stages)} checkpoints"
    values = [stage.truth for stage in stages] + [stage.linear for stage in stages]
    exponent = common_exponent(values)
    gaps = [b.place - a.place for a, b in pairwise(stages)]
    shift = 0.06 * min(gaps)

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        axes.axhline(0, color=palette.muted, linewidth=1)
        for name, colour, offset, pairs in (
            ("measured", palette.ink, -shift, [(s.truth, s.truth_error) for s in stages]),
            (
                "first order", palette.accent, shift,
                [(s.linear, s.linear_error) for s in stages],
            ),
        ):  # fmt: skip
            places = [stage.place + offset for stage in stages]
            means, errors = zip(*pairs)
            axes.errorbar(
                places, means, [2 * error for error in errors], fmt="o", color=colour,
                markersize=6, linewidth=1.4, label=name,
            )  # fmt: skip
        axes.legend(labelcolor=palette.ink)
        scale_ticks(axes, "y", exponent)
        axes.set_ylabel(unit_label("entropy change", unit, exponent))
        label_stages(axes, stages, by_step)

    return Figure(
        name="change-by-step",
        title=f"{title}, raises it at {rises}" if rises else title,
        caption=(
            "The change that one optimizer step makes at every checkpoint, measured and "
            "predicted, with two standard errors. Where both lie together the prediction "
            "can be read without the measurement. The title counts measured changes of "
            f"at least {RESOLVED:g} standard errors that no check speaks against; by sign "
            f"alone, {lower} lower it."
        ),
        draw=draw,
    )


def falls_and_rises(stages: Sequence[Stage]) -> tuple[int, int]:
    """How many measured changes are falls and rises: trusted, and beyond their error."""
    resolved = [stage for stage in stages if stage.is_resolved]
    falls = sum(stage.truth < 0 for stage in resolved)
    return falls, len(resolved) - falls


def label_stages(axes: Axes, stages: Sequence[Stage], by_step: bool) -> None:
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
