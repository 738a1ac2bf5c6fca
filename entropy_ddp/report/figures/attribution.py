"""Which part of the step and which tokens of U make the predicted change."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as MatplotlibFigure

from entropy_ddp.answers.headline import Document
from entropy_ddp.answers.shares import (
    left_at_first_order,
    left_in_truth,
    part_error,
    part_is_resolved,
)
from entropy_ddp.answers.words import (
    AXIS_UNITS,
    is_resolved,
    linear_error,
    name_of_kind,
    supported_percent,
    title_of_kinds,
)
from entropy_ddp.report.figures.canvas import (
    Figure,
    Palette,
    common_exponent,
    label_below_names,
    scale_ticks,
    sign_colour,
    unit_label,
)
from entropy_ddp.report.figures.charts import (
    FRAME_PIXELS,
    ROW_PIXELS,
    Axis,
    Estimate,
    forest,
    forest_height,
    scatter,
    what_is_drawn,
)

# Its name, its length, and its standard error if it has one.
Bar = tuple[str, float, float | None]


def parts(document: Document) -> Figure:
    """Momentum, weight decay and U's gradient as parts of the predicted change."""
    found = document["attribution"]
    names = {
        "momentum": "momentum (earlier batches)",
        "weight_decay": "weight decay",
        "gradient": "gradient of U",
    }
    bars: list[Bar] = [
        (name, found[key], part_error(document, key)) for key, name in names.items()
    ]
    largest = max(names, key=lambda key: abs(found[key]))
    name, value = names[largest], found[largest]
    whole = linear_error(document)
    bars.append(("together", found["total"], whole))
    title = "No part of the step changes the entropy"
    if value:
        title = f"The {name} is the largest part, on this E"
        resolved = is_resolved(found["total"], whole)
        if resolved and part_is_resolved(document, largest):
            verb = "lowers" if value < 0 else "raises"
            title = f"The {name} {verb} the entropy most"
    return Figure(
        name="parts",
        title=title,
        caption=(
            "AdamW's step is a sum: what earlier batches left as momentum, weight decay, "
            "and this batch's gradient. The three add up to the first-order change. "
            "Lines: two standard errors."
        ),
        draw=_bars([("", bars)], AXIS_UNITS[document["linear"]["normalize"]]),
        height=FRAME_PIXELS + ROW_PIXELS * len(bars),
    )


def kinds(document: Document) -> Figure:
    """Shares summed by kind of token."""
    groups = [
        (
            title_of_kinds(name),
            [
                (name_of_kind(name, row["label"]), row["share"], row.get("se"))
                for row in rows
            ],
        )
        for name, rows in document["attribution"]["summaries"].items()
    ]
    rows = sum(len(bars) + 1 for _, bars in groups)
    return Figure(
        name="kinds-of-tokens",
        title="Which kinds of tokens lower and raise the entropy",
        caption=(
            "Shares of U's tokens summed by kind; every block of bars adds up to the "
            "gradient's part. Blue lowers the entropy, orange raises it. Lines: two "
            "standard errors, where there are any."
        ),
        draw=_bars(groups, AXIS_UNITS[document["linear"]["normalize"]]),
        height=FRAME_PIXELS + 18 * rows,
    )


def _bars(groups: Sequence[tuple[str, list[Bar]]], unit: str) -> Any:
    """Horizontal bars in blocks, each under its name."""
    labels: list[tuple[str, float | None, float | None]] = []
    for name, bars in groups:
        labels += [(name, None, None)] if name else []
        # Ranges such as 10-20 % with the dash of a range.
        labels += [
            (re.sub(r"(?<=\d)-(?=\d)", "–", text), value, error)
            for text, value, error in bars
        ]

    def draw(figure: MatplotlibFigure, palette: Palette) -> None:
        axes = figure.subplots()
        for place, (_, value, error) in enumerate(labels):
            if value is not None:
                axes.barh(place, value, 0.64, color=sign_colour(palette, value))
            if value is not None and error:
                axes.errorbar(
                    value, place, xerr=2 * error, color=palette.ink, linewidth=1
                )
        axes.axvline(0, color=palette.muted, linewidth=1)
        axes.set_yticks(range(len(labels)), [name for name, _, _ in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0, labelcolor=palette.ink)
        for tick, (_, value, _) in zip(axes.get_yticklabels(), labels, strict=True):
            if value is None:
                tick.set_color(palette.muted)
                tick.set_fontstyle("italic")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        exponent = common_exponent([value or 0 for _, value, _ in labels])
        scale_ticks(axes, "x", exponent)
        label = unit_label("entropy change, first order", unit, exponent)
        label_below_names(axes, label)

    return draw


def shares_against(tokens: dict[str, np.ndarray], key: str, normalize: str) -> Figure:
    """Every token's share against its log-probability or its covariance score."""
    label, title, reading = {
        "logp": (
            "log p of the token [nats]",
            "Shares by probability of the token",
            (
                "Tokens on the left were improbable when drawn: one of them moves the "
                "policy far more than a token it was sure of."
            ),
        ),
        "covariance": (
            "(log p − mean)(A − mean)",
            "Shares by covariance score",
            (
                "The covariance score is a cheap stand-in for the share: a good one would "
                "put blue on the right and orange on the left."
            ),
        ),
    }[key]
    share = tokens["share"]
    return Figure(
        name=f"shares-by-{key}",
        title=title,
        caption=what_is_drawn(len(share), "token of U") + " " + reading,
        draw=scatter(
            Axis(values=tokens[key], label=label),
            Axis(values=share, label="share", unit=AXIS_UNITS[normalize]),
        ),
    )


def shares_by_reward(columns: dict[str, list[Any]], normalize: str) -> Figure:
    """Shares of U's sequences against their reward."""
    share = columns["share"]
    return Figure(
        name="shares-by-reward",
        title="Shares of the responses in U by reward",
        caption=(
            what_is_drawn(len(share), "response of U")
            + " Its share is the sum of its tokens' shares."
        ),
        draw=scatter(
            Axis(values=columns["reward"], label="reward"),
            Axis(values=share, label="share", unit=AXIS_UNITS[normalize]),
        ),
    )


def what_if(document: Document) -> Figure:
    """The change had some tokens been left out of the update."""
    error, unit = linear_error(document), AXIS_UNITS[document["linear"]["normalize"]]
    whole = document["linear"]["delta_h1"]
    found = document["attribution"]["what_if"]
    rows = [Estimate("nothing left out", whole, error, "accent")]
    for row in found:
        value, own = left_at_first_order(row)
        rows.append(Estimate(row["rule"], value, own, "accent", False))
        if "delta_h_true" in row:
            rows.append(Estimate("", *left_in_truth(row), strong=False))
    best = min(found, key=lambda row: abs(left_at_first_order(row)[0]))
    title = "What if"
    if is_resolved(whole, error):
        value, _ = left_at_first_order(best)
        left = supported_percent(value / whole, error / abs(whole))
        title = f"Leaving out “{best['rule']}” leaves {left} of the change"
    caption = "Violet: predicted by first order, had these tokens been left out of U."
    if any("delta_h_true" in row for row in found):
        caption += " The others: the step without them really taken, measured."
    return Figure(
        name="what-if",
        title=title,
        caption=caption,
        draw=forest(rows, "entropy change", unit),
        height=forest_height(1 + len(found)),
    )
