"""The change as figures: against its prediction, by estimator, step size and response."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from entropy_ddp.answers.headline import Document, is_trusted, reach
from entropy_ddp.answers.words import (
    AXIS_UNITS,
    FIXED,
    error_of,
    is_missed,
    is_resolved,
    linear_error,
    missed,
    number,
    percent,
    percent_with_error,
    quantile_of,
    shown_error,
    with_error,
)
from entropy_ddp.report.figures.canvas import (
    Figure,
    Palette,
    log_ticks,
    scale_ticks,
    sign_colour,
)
from entropy_ddp.report.figures.charts import (
    Axis,
    Estimate,
    draw_forest,
    forest,
    forest_height,
    histogram,
    scatter,
    what_is_drawn,
)
from entropy_ddp.results.reading import Columns


def prediction_against_truth(document: Document) -> Figure:
    """Truth, first and second order on one axis; what first order misses on another."""
    truth, linear = document["truth"]["delta_h_true"], document["linear"]["delta_h1"]
    unit = AXIS_UNITS[document["truth"]["normalize"]]
    t = quantile_of(document)
    rows = [
        Estimate("measured", truth, shown_error(document["truth"]), quantile=t),
        Estimate("first order", linear, linear_error(document), "accent", quantile=t),
    ]
    if "curvature" in document:
        curvature = document["curvature"]
        value, error = curvature["delta_h2"], None
        if "delta_h2_se" in curvature:
            error = error_of(curvature, "delta_h2_se")
        rows.append(Estimate("second order", value, error, "accent", quantile=t))
    off_by = Estimate("measured − first order", *missed(document, "linear"), quantile=t)

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        ratios = [len(rows) + 0.6, 1.3]
        above, below = figure.subplots(2, height_ratios=ratios)
        draw_forest(above, palette, rows, "entropy change", unit)
        draw_forest(below, palette, [off_by], "what first order misses", unit)

    return Figure(
        name="prediction-against-truth",
        title=_prediction_title(truth, off_by, is_missed(document, "linear")),
        caption=(
            f"Thick: one standard error; thin: the 95{FIXED}% interval. Measured and predicted "
            "come from the same responses and share most of their error; their "
            "difference, below on a scale of its own, has a much smaller one."
            + (" Second order adds the curvature of the step." if len(rows) > 2 else "")
        ),
        draw=draw,
        height=forest_height(len(rows)) + forest_height(1),
    )


def _prediction_title(truth: float, off_by: Estimate, is_off: bool) -> str:
    if truth == 0:
        return "Nothing changes, as predicted" if off_by.value == 0 else "No change"
    share, error = (x / abs(truth) for x in (abs(off_by.value), off_by.error or 0.0))
    if is_off:
        off = percent_with_error(share, error, signed=False)
        return f"First order is off by {off}, more than its error explains"
    within = percent(off_by.quantile * error)
    return f"First order agrees with the change within {within} of it"


def all_estimators(document: Document) -> Figure:
    """Every estimator of the change, with its error."""
    rows = _estimators(document)
    unit = AXIS_UNITS[document["truth"]["normalize"]]
    return Figure(
        name="all-estimators",
        title="All estimators of the same change",
        caption=(
            "The same change by every estimator that comes from the same passes; large "
            "dots are the configured ones. Violet is predicted by first order, the others "
            f"are measured. Thick: one standard error; thin: the 95{FIXED}% interval. The "
            "smallest of several "
            "errors is itself too small: choose an estimator before you look."
        ),
        draw=forest(rows, "entropy change", unit),
        height=forest_height(len(rows)),
    )


def _estimators(document: Document) -> list[Estimate]:
    """Every estimator of the change, measured ones first; configured ones are strong."""
    eta, truth = document["update"]["learning_rate_used"], document["truth"]
    is_adjusted, t = truth.get("control_variates", False), quantile_of(document)
    rows = []
    for row in document["truth_all"]:
        name, strong = f"true, {row['is_mode']}", row["is_mode"] == truth["is_mode"]
        value, error = row["delta_h_true"], error_of(row)
        plain = strong and not is_adjusted
        rows.append(Estimate(name, value, error, strong=plain, quantile=t))
        if "se_adjusted" in row:
            value = row["delta_h_true_adjusted"]
            error = row.get("se_jackknife_adjusted", row["se_adjusted"])
            adjusted, strong = f"{name}, adjusted", strong and is_adjusted
            rows.append(Estimate(adjusted, value, error, strong=strong, quantile=t))
    keys = ("score", "baseline", "control_variates")
    configured = [document["linear"][key] for key in keys]
    for row in document["linear_all"]:
        value, error = eta * row["slope"], abs(eta) * error_of(row)
        strong = [row[key] for key in keys] == configured
        rows.append(Estimate(_linear_label(row), value, error, "accent", strong, t))
    return rows


def _linear_label(row: dict[str, Any]) -> str:
    """The name of a first-order estimator."""
    name = f"first order, {row['score']}"
    if row["score"] == "to_go":
        name += f", {row['baseline']}"
    return name + (", cv" if row["control_variates"] else "")


def gradient_dot(document: Document) -> Figure:
    """The gradient-dot form beside the slope, and where its variance comes from."""
    dot, unit = document["gradient_dot"], AXIS_UNITS["per_token"]
    linear = document["linear"]["delta_h1"]
    rows = [
        Estimate("gradient-dot form", dot["deltaH1"], dot["se_deltaH1"]),
        Estimate(
            "first order",
            linear,
            linear_error(document),
            "accent",
            quantile=quantile_of(document),
        ),
    ]
    errors = [
        Estimate(f"error from {batch}", dot["learning_rate"] * variance**0.5, None)
        for batch, variance in (("E", dot["V_X"]), ("U", dot["V_Y"]))
    ]

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        above, below = figure.subplots(2)
        draw_forest(above, palette, rows, "entropy change", unit)
        draw_forest(below, palette, errors, "standard error due to one batch", unit)

    larger, smaller = ("E", "U") if dot["V_X"] >= dot["V_Y"] else ("U", "E")
    held = " The error from U holds the gain of the step fixed."
    return Figure(
        name="gradient-dot",
        title=f"Most of the gradient-dot form's error comes from {larger}",
        caption=(
            "The inner product of two mean gradients weighs responses differently from "
            "the entropy: expect its sign and size to agree with first order, not its "
            f"digits. More groups in {larger} reduce its error most; more in {smaller} "
            "hardly matter while that error is the smaller one."
            + held
            * (dot["direction"] == "step")
        ),
        draw=draw,
        height=2 * forest_height(2),
    )


def sweep_change(document: Document) -> Figure:
    """|change| against step size, measured and predicted, both signs; log-log."""
    points = sorted(document["sweep"], key=lambda point: point["eta"])
    mirrored = any(point["eta"] < 0 for point in points)
    caption = (
        f"Dots are measured, with 95{FIXED}% intervals: blue where the entropy falls, "
        "orange where it rises. The violet line is the first order, the dashed one the "
        "second. The violet band is where first order is within the truth's own "
        "interval; changes below the noise floor are rounding."
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
            _draw_point(axes, palette, point, quantile_of(document))
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


def _draw_point(
    axes: Axes, palette: Palette, point: dict[str, Any], quantile: float
) -> None:
    value, error = abs(point["delta_h_true"]), quantile * error_of(point)
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
    curvature = document.get("curvature", {})
    edge = curvature.get("eta_star")
    # What has no largest value is not a place.
    if edge is not None and curvature.get("eta_star_interval", [edge, edge])[1]:
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
    quantile = quantile_of(document)
    title = "At the largest step first order is off by no more than the error"
    if is_resolved(distance, error, quantile):
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
                ends = value - quantile * error, value + quantile * error
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
            f"95{FIXED}% intervals of the difference. The dashed line is the second order: "
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
    return distance, 100 * error_of(point, "difference_se") / abs(first)


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


def contributions(columns: Columns, normalize: str) -> Figure:
    """How contributions to the change are spread, measured and predicted."""
    unit = AXIS_UNITS[normalize]
    true, linear = columns["contribution_true"], columns["contribution_linear"]
    falls = sum(value < 0 for value in true)
    return Figure(
        name="contributions",
        title=f"{percent(falls / len(true))} of the responses lower the entropy",
        caption=(
            "What each response of E contributes to the change; measured contributions "
            "add up to the measured change, predicted ones to first order. Where the "
            "outlines lie on each other, first order is right response by response. "
            "Counts on a logarithmic scale."
        ),
        draw=histogram(
            [("measured", true, "ink"), ("first order", linear, "accent")],
            "contribution to the change", unit, "responses",
        ),
    )  # fmt: skip


def against(columns: Columns, normalize: str, key: str) -> Figure:
    """Measured contributions against a column of the responses."""
    label, whole, title = {
        "num_tokens": (
            "response tokens", True, "Contributions by length of the response",
        ),
        "reward": ("reward", False, "Contributions by reward"),
        "log_weight": (
            "log importance weight [nats]", False, "Contributions by importance weight",
        ),
    }[key]  # fmt: skip
    captions = {
        "num_tokens": (
            "If the long ones lie on one side of zero, the "
            "step changes how long responses are as well as how sure they are."
        ),
        "reward": (
            "If one reward lies on one side of zero, the "
            "step changes the entropy where the policy succeeds, or where it fails."
        ),
        "log_weight": (
            "Those on the right become likelier by the "
            "step, those on the left less likely; a slope says that the change comes "
            "from which responses are drawn."
        ),
    }
    true = columns["contribution_true"]
    return Figure(
        name=f"contributions-by-{key.replace('_', '-')}",
        title=title,
        caption=what_is_drawn(len(true), "response of E") + " " + captions[key],
        draw=scatter(
            Axis(values=columns[key], label=label, whole=whole),
            Axis(values=true, label="contribution", unit=AXIS_UNITS[normalize]),
        ),
    )


def weights(columns: Columns, truth: dict[str, Any]) -> Figure:
    """How the logarithms of the importance weights are spread."""
    spread = truth["log_weight"]
    return Figure(
        name="weights",
        title=f"Effective sample size: {percent(truth['ess_fraction'], 3)} of E",
        caption=(
            "How much likelier each response of E became by the step. All near 0: every "
            "response counts alike. From "
            f"{number(spread['min'], 2)} to {number(spread['max'], 2)}, half of them "
            f"below {number(spread['median'], 2, signed=True)}. Counts on a logarithmic "
            "scale."
        ),
        draw=histogram(
            [("log weight", columns["log_weight"], "ink")],
            "log importance weight", "nats", "responses",
        ),
    )  # fmt: skip
