"""The change over a grid of step sizes: how far the first order reaches."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from entropy_ddp.report.answer import is_trusted, reach
from entropy_ddp.report.figures.canvas import (
    Figure,
    Palette,
    log_ticks,
    scale_ticks,
    sign_colour,
)
from entropy_ddp.report.words import AXIS_UNITS, FIXED, is_resolved, with_error

Document = dict[str, Any]


def sweep_change(document: Document) -> Figure:
    """|change| against step size, measured and predicted, both signs; log-log."""
    points = sorted(document["sweep"], key=lambda point: point["eta"])
    mirrored = any(point["eta"] < 0 for point in points)
    caption = (
        "Dots are measured, with two standard errors: blue where the entropy falls, "
        "orange where it rises. The violet line is the first order, the dashed one the "
        "second. The violet band is where first order and truth agree within two "
        "standard errors; changes below the noise floor are rounding."
    )
    if mirrored:
        caption += " Hollow dots are steps of the opposite direction."
    if not all(map(is_trusted, points)):
        caption += " Crosses have too few effective responses to be spoken of."

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.set_yscale("log")
        _draw_reach(axes, palette, document)
        _draw_lines(axes, palette, [point for point in points if point["eta"] > 0])
        for point in points:
            _draw_point(axes, palette, point)
        axes.set_xlabel("learning rate (size of the step)")
        unit = AXIS_UNITS[document["truth"]["normalize"]]
        axes.set_ylabel(f"|entropy change| [{unit}]")
        log_ticks(axes, "x")
        log_ticks(axes, "y")

    return Figure(
        name="sweep-change",
        title=reach(document)[1],
        caption=caption,
        draw=draw,
        height=340,
    )


def _draw_point(axes: Axes, palette: Palette, point: dict[str, Any]) -> None:
    value, error = abs(point["delta_h_true"]), 2 * point["se"]
    if value == 0:
        return
    colour = sign_colour(palette, point["delta_h_true"])
    eta = abs(point["eta"])
    lowest = max(value - error, value / 10)
    axes.plot((eta, eta), (lowest, value + error), color=colour, linewidth=1.6)
    filled = colour if point["eta"] > 0 else "none"
    marker = "o" if is_trusted(point) else "x"
    axes.plot(eta, value, marker, color=colour, markerfacecolor=filled, markersize=6)


def _draw_lines(axes: Axes, palette: Palette, points: list[dict[str, Any]]) -> None:
    etas = [point["eta"] for point in points]
    first = [abs(point["delta_h1"]) for point in points]
    if any(first):
        axes.plot(etas, first, color=palette.accent, linewidth=1.4)
    if all(point.get("delta_h2") for point in points):
        second = [abs(point["delta_h2"]) for point in points]
        axes.plot(etas, second, color=palette.accent, linewidth=1.4, linestyle="--")


def _draw_reach(axes: Axes, palette: Palette, document: Document) -> None:
    """Noise floor, range of agreement, eta* and the run's own learning rate."""
    summary = document["sweep_summary"]
    if summary["noise_floor"] > 0:
        axes.axhline(summary["noise_floor"], color=palette.muted, linewidth=1)
        _note(axes, palette, "noise floor", (0.02, summary["noise_floor"]), "y")
    if "agreement" in summary:
        low, high = summary["agreement"]
        axes.axvspan(low, high, color=palette.accent, alpha=0.09, linewidth=0)
    largest = max(abs(point["eta"]) for point in document["sweep"])
    smallest = min(abs(point["eta"]) for point in document["sweep"])
    marks = {"this step": document["update"]["learning_rate_used"]}
    edge = document.get("curvature", {}).get("eta_star")
    if edge is not None:
        marks["η*"] = edge
    for label, eta in marks.items():
        # A mark far outside would squeeze the points into a corner.
        if smallest / 10 <= eta <= 30 * largest:
            axes.axvline(eta, color=palette.muted, linewidth=1, linestyle=":")
            _note(axes, palette, label, (eta, 0.12), "x")


def _note(
    axes: Axes, palette: Palette, text: str, place: tuple[float, float], along: str
) -> None:
    """A word at a line: across the axes at data `along` one axis."""
    if along == "x":
        transform, offset, align = axes.get_xaxis_transform(), (3, 0), "left"
    else:
        transform, offset = axes.get_yaxis_transform(), (0, 3)
        align = "right" if place[0] > 0.5 else "left"
    axes.annotate(
        text, place, xycoords=transform, xytext=offset, textcoords="offset points",
        color=palette.muted, fontsize=11, horizontalalignment=align,
    )  # fmt: skip


def sweep_missed(document: Document) -> Figure:
    """What first order misses in percent of it against step size."""
    points = [p for p in document["sweep"] if p["delta_h1"] and is_trusted(p)]
    points.sort(key=lambda point: abs(point["eta"]))
    largest = max(points, key=lambda point: point["eta"])
    distance, error = (abs(x) for x in _missed(largest, "delta_h_true"))
    title = "At the largest step first order is off by no more than the error"
    if is_resolved(distance, error):
        off = with_error(distance, error, signed=False)
        title = f"At the largest step first order is off by {off}{FIXED}%"
    mirrored = any(point["eta"] < 0 for point in points)

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.axhline(0, color=palette.accent, linewidth=1.4)
        for sign in (1, -1):
            side = [point for point in points if sign * point["eta"] > 0]
            face = palette.ink if sign > 0 else palette.paper
            # Beside each other, so that the bars of one side do not hide the other's.
            etas = [abs(point["eta"]) * (1 if sign > 0 else 1.12) for point in side]
            for point, eta in zip(side, etas, strict=True):
                value, error = _missed(point, "delta_h_true")
                ends = value - 2 * error, value + 2 * error
                axes.plot((eta, eta), ends, color=palette.ink, linewidth=1.6)
                axes.plot(
                    eta,
                    value,
                    "o",
                    color=palette.ink,
                    markerfacecolor=face,
                    markersize=6,
                )
            if all("delta_h2" in point for point in side):
                second = [_missed(point, "delta_h2")[0] for point in side]
                axes.plot(etas, second, "--", color=palette.accent, linewidth=1.4)
        axes.set_xlabel("learning rate (size of the step)")
        axes.set_ylabel("off first order [%]")
        scale_ticks(axes, "y", 0)
        log_ticks(axes, "x")

    return Figure(
        name="sweep-missed",
        title=title,
        caption=(
            "How far the measured change lies from first order, in percent of it, with "
            "two standard errors of the difference. The dashed line is the second order: "
            "where dots follow it, curvature explains what first order misses."
            + (" Hollow dots are steps of the opposite direction." if mirrored else "")
        ),
        draw=draw,
        height=340,
    )


def _missed(point: dict[str, Any], key: str) -> tuple[float, float]:
    """A change's distance from first order and its error, percent of first order."""
    first = point["delta_h1"]
    distance = 100 * (point[key] - first) / abs(first)
    return distance, 100 * point["difference_se"] / abs(first)


def sweep_weights(document: Document, warn: float, abort: float) -> Figure:
    """ESS / N against step size, with the two thresholds of the run."""
    points = sorted(document["sweep"], key=lambda point: abs(point["eta"]))
    low = min(point["ess_fraction"] for point in points)
    title = "The measurement can be trusted at every step size"
    if low < warn:
        title = "At large steps few responses carry the measurement"

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        axes.set_xscale("log")
        for sign, filled in ((1, True), (-1, False)):
            side = [point for point in points if sign * point["eta"] > 0]
            etas = [abs(point["eta"]) for point in side]
            values = [point["ess_fraction"] for point in side]
            face = palette.ink if filled else "none"
            axes.plot(
                etas, values, "o-", color=palette.ink, markersize=5, linewidth=1.2,
                markerfacecolor=face,
            )  # fmt: skip
        for label, level in (("warning", warn), ("untrusted", abort)):
            axes.axhline(level, color=palette.muted, linewidth=1, linestyle=":")
            _note(axes, palette, label, (0.99, level), "y")
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("learning rate (size of the step)")
        axes.set_ylabel("ESS / N")
        log_ticks(axes, "x")

    return Figure(
        name="sweep-weights",
        title=title,
        caption=(
            "Effective sample size of the importance weights over the number of "
            "responses: 1 while the step moves the policy little, near 0 when a few "
            f"responses stand for all. Dotted: warning below {warn:g}, untrusted below "
            f"{abort:g}."
        ),
        draw=draw,
        height=340,
    )
