"""The answer as figures: prediction against truth, every estimator, the variance."""

from typing import Any

from matplotlib.figure import Figure as MatplotlibFigure

from entropy_ddp.report.figures.canvas import Figure, Palette
from entropy_ddp.report.figures.forest import Estimate, draw_forest, forest_height
from entropy_ddp.report.words import (
    AXIS_UNITS,
    is_resolved,
    linear_error,
    missed_error,
    number,
    percent,
    percent_with_error,
    shown_error,
)

Document = dict[str, Any]


def prediction_against_truth(document: Document) -> Figure:
    """Truth, first and second order on one axis; what first order misses on another."""
    truth, linear = document["truth"], document["linear"]
    error, unit = linear_error(document), AXIS_UNITS[truth["normalize"]]
    rows = [
        Estimate(
            label="measured", value=truth["delta_h_true"], error=shown_error(truth)
        ),
        Estimate(
            label="first order", value=linear["delta_h1"], error=error, colour="accent"
        ),
    ]
    if "curvature" in document:
        curvature = document["curvature"]
        rows.append(
            Estimate(
                label="second order",
                value=curvature["delta_h2"],
                error=curvature.get("delta_h2_se"),
                colour="accent",
            )
        )
    missed = Estimate(
        label="measured − first order",
        value=truth["delta_h_true"] - linear["delta_h1"],
        error=missed_error(document, "linear"),
    )

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        ratios = [len(rows) + 0.6, 1.3]
        above, below = figure.subplots(2, height_ratios=ratios)
        draw_forest(above, palette, rows, "entropy change", unit)
        draw_forest(below, palette, [missed], "what first order misses", unit)

    return Figure(
        name="prediction-against-truth",
        title=_prediction_title(truth["delta_h_true"], missed),
        caption=(
            "Bars are one (thick) and two (thin) standard errors. Measured and predicted "
            "come from the same responses and share most of their error; their "
            "difference, below on a scale of its own, has a much smaller one."
            + (" Second order adds the curvature of the step." if len(rows) > 2 else "")
        ),
        draw=draw,
        height=forest_height(len(rows)) + forest_height(1),
    )


def _prediction_title(truth: float, missed: Estimate) -> str:
    if truth == 0:
        return "Nothing changes, as predicted" if missed.value == 0 else "No change"
    share, error = (x / abs(truth) for x in (abs(missed.value), missed.error or 0.0))
    if is_resolved(share, error):
        off = percent_with_error(share, error, signed=False)
        return f"First order is off by {off}, more than its error explains"
    return f"First order agrees with the change within {percent(2 * error)} of it"


def all_estimators(document: Document) -> Figure:
    """Every estimator of the change, with its error."""
    rows = estimator_rows(document)
    smallest = min(rows, key=lambda row: row.error or 0)
    unit = AXIS_UNITS[document["truth"]["normalize"]]

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        draw_forest(figure.subplots(), palette, rows, "entropy change", unit)

    title = "All estimators"
    if smallest.error and rows[0].error:
        title += f": the smallest error is ±{number(smallest.error, 2)}"
    return Figure(
        name="all-estimators",
        title=title,
        caption=(
            "The same change by every estimator that comes from the same passes; large "
            "dots are the configured ones. Violet is predicted by first order, the others "
            "are measured; bars are one and two standard errors."
        ),
        draw=draw,
        height=forest_height(len(rows)),
    )


def estimator_rows(document: Document) -> list[Estimate]:
    """Every estimator of the change, measured ones first; configured ones are strong."""
    eta = document["update"]["learning_rate_used"]
    rows = []
    for row in document["truth_all"]:
        rows.append(
            Estimate(
                label=f"true, {row['is_mode']}",
                value=row["delta_h_true"],
                error=row["se"],
                strong=row["is_mode"] == document["truth"]["is_mode"],
            )
        )
        if "se_adjusted" in row:
            rows.append(
                Estimate(
                    label=f"true, {row['is_mode']}, adjusted",
                    value=row["delta_h_true_adjusted"],
                    error=row["se_adjusted"],
                    strong=False,
                )
            )
    keys = ("score", "baseline", "control_variates")
    configured = [document["linear"][key] for key in keys]
    for row in document["linear_all"]:
        rows.append(
            Estimate(
                label=linear_label(row),
                value=eta * row["slope"],
                error=abs(eta) * row["se"],
                colour="accent",
                strong=[row[key] for key in keys] == configured,
            )
        )
    return rows


def linear_label(row: dict[str, Any]) -> str:
    """The name of a first-order estimator."""
    name = f"first order, {row['score']}"
    if row["score"] == "to_go":
        name += f", {row['baseline']}"
    return name + (", cv" if row["control_variates"] else "")


def gradient_dot(document: Document) -> Figure:
    """The gradient-dot form beside the slope, and where its variance comes from."""
    dot, linear = document["gradient_dot"], document["linear"]
    eta, unit = document["update"]["learning_rate_used"], AXIS_UNITS["per_token"]
    rows = [
        Estimate(
            label="gradient-dot form", value=dot["deltaH1"], error=dot["se_deltaH1"]
        ),
        Estimate(
            label="first order",
            value=linear["delta_h1"],
            error=abs(eta) * linear["se"],
            colour="accent",
        ),
    ]
    rate = dot["learning_rate"]
    parts = {"from E": rate * dot["V_X"] ** 0.5, "from U": rate * dot["V_Y"] ** 0.5}

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        above, below = figure.subplots(2)
        draw_forest(above, palette, rows, "entropy change", unit)
        errors = [
            Estimate(label=f"error {name}", value=value, error=None)
            for name, value in parts.items()
        ]
        draw_forest(below, palette, errors, "standard error due to one batch", unit)

    larger, smaller = ("E", "U") if dot["V_X"] >= dot["V_Y"] else ("U", "E")
    return Figure(
        name="gradient-dot",
        title=f"Most of the gradient-dot form's error comes from {larger}",
        caption=(
            "The inner product of two mean gradients weighs responses differently from "
            "the entropy: expect its sign and size to agree with first order, not its "
            f"digits. More groups in {larger} reduce its error most; more in {smaller} "
            "hardly matter while that error is the smaller one."
        ),
        draw=draw,
        height=2 * forest_height(2),
    )
