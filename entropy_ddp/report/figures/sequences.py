"""The sequences of E: what each contributes to the change, and what it weighs."""

from typing import Any

from entropy_ddp.report.figures.canvas import Figure
from entropy_ddp.report.figures.scatter import Axis, histogram, scatter, what_is_drawn
from entropy_ddp.report.words import AXIS_UNITS, number, percent

Columns = dict[str, list[Any]]


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
