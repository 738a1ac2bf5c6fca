"""Several checkpoints of a training run side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from entropy_ddp.report.figures.canvas import (
    Figure,
    Palette,
    common_exponent,
    scale_ticks,
    unit_label,
    whole_ticks,
)
from entropy_ddp.report.words import RESOLVED, is_resolved, with_error

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
