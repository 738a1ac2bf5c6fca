"""What would have held the entropy, in words and tables: of a step, and along a run."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entropy_ddp.answers.cells import (
    Cell,
    Row,
    Table,
    change,
    decimal,
    part,
    share,
    text,
)
from entropy_ddp.answers.words import (
    UNITS,
    count,
    is_missed,
    linear_error,
    listed,
    missed,
    with_error,
)
from entropy_ddp.answers.words import number as in_words

FAMILIES = {
    "repo": "REPO-R weights, ζ",
    "improbable_failures": "improbable failures",
    "tokens_left_out": "tokens left out",
    "entropy_coefficient": "entropy_coef of TRL",
    "projection": "projection",
    "learning_rate": "learning rate",
}
# Those that a training can be given as they are, and how a sentence names them.
SETTINGS = {
    "repo": "REPO-R weights with ζ",
    "improbable_failures": "a weight for improbable failures (A < 0, p < 0.5)",
    "entropy_coefficient": "an entropy coefficient (TRL's entropy_coef)",
}
# The parameter of the plain loss; of the others 0.
NEUTRAL = {"improbable_failures": 1.0, "learning_rate": 1.0}
SATURATED = "*"
# What the parameter of each family is, in their order.
PARAMETERS = (
    "Parameter: ζ, weight of improbable failures (A < 0, p < 0.5), number of tokens, "
    "coefficient, length of the shortest change over the step's, factor."
)
SATURATION = f" {SATURATED} saturated: no member reaches it, the nearest is shown."


def rows_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The families of an attribution; none of old runs."""
    found = document["attribution"].get("would_hold")
    return [] if found is None else list(found["families"])


def target_of(document: Mapping[str, Any]) -> float:
    """The change that was wanted; of an attribution that has families."""
    return float(document["attribution"]["would_hold"]["target"])


def is_taken(row: Mapping[str, Any]) -> bool:
    """Whether the step of a family was taken."""
    return "parameter_taken" in row


def parameter(row: Mapping[str, Any]) -> tuple[float, float | None, bool]:
    """Its value, its error, and whether the family is saturated; of the step taken.

    The error of a corrected parameter is that of the shares' in proportion.
    """
    value, error = row["parameter"], row.get("parameter_se")
    if not is_taken(row):
        return value, error, row["saturated"]
    taken, saturated = row["parameter_taken"], row["saturated_taken"]
    neutral = NEUTRAL.get(row["family"], 0.0)
    if error is None or saturated or value == neutral:
        return taken, None, saturated
    return taken, error * abs((taken - neutral) / (value - neutral)), saturated


def title(target: float, unit: str) -> str:
    """What the table or figure is of."""
    if not target:
        return "What would have held the entropy"
    return f"What would have left a change of {in_words(target, 3, signed=True)} {unit}"


def tables(document: Mapping[str, Any]) -> list[Table]:
    """Each family's parameter and what it does; then of the steps taken; none of old runs."""
    found = rows_of(document)
    if not found:
        return []
    unit = UNITS[document["linear"]["normalize"]]
    shown = [_from_shares(found, target_of(document), unit, linear_error(document))]
    if any(is_taken(row) for row in found):
        shown.append(_taken(found, unit, document))
    return shown


def _from_shares(
    found: Sequence[Mapping[str, Any]], target: float, unit: str, error: float
) -> Table:
    rows = []
    for row in found:
        value, own = row.get("delta_h1_cross_fitted", row["delta_h1"]), row.get("se")
        rows.append(
            (
                text(FAMILIES[row["family"]]),
                _parameter(row["parameter"], row.get("parameter_se"), row["saturated"]),
                share(row.get("token_fraction")),
                change(value, own) if own else part(value, error),
            )
        )
    saturated = any(row["saturated"] for row in found)
    return Table(
        title=title(target, unit),
        columns=("change", "parameter", "tokens", "ΔH first order"),
        rows=rows,
        caption=(
            f"In {unit}, with the Adam denominator of the whole update. {PARAMETERS} "
            "Tokens: how many get another weight, by more than 1 %. ΔH: found with one half of "
            "E and evaluated on the other, swapped and averaged; of the projection, what was "
            f"asked for.{SATURATION * saturated}"
        ),
    )


def _taken(
    found: Sequence[Mapping[str, Any]], unit: str, document: Mapping[str, Any]
) -> Table:
    error, truth_found = linear_error(document), document["truth"]
    floor = truth_found.get("noise_floor") or 0.0
    stays = ""
    if is_missed(document, "linear"):
        shown = with_error(*missed(document, "linear"))
        stays = (
            f" What first order misses of the plain step, {shown}, stays in the truth."
        )
    rows = []
    for row in found:
        if not is_taken(row):
            continue
        truth, own = row["delta_h_true"], row["delta_h_true_se"]
        rows.append(
            (
                text(FAMILIES[row["family"]]),
                _parameter(*parameter(row)),
                share(row.get("gradient_change")),
                decimal(row.get("cosine"), 2),
                part(row["delta_h1_taken"], row.get("se", error)),
                change(truth, math.hypot(own, floor)) if own else part(truth, error),
            )
        )
    saturated = any(parameter(row)[2] for row in found)
    return Table(
        title="The same, corrected and taken",
        columns=("change", "parameter", "gradient", "cosine", "first order", "ΔH true"),
        rows=rows,
        caption=(
            f"In {unit}, with AdamW's denominator and clipping of the changed gradient. "
            "Gradient: by how much of its norm it is changed; cosine: of the step with the "
            "plain one. Found with one half of E and measured on the other, swapped and "
            f"averaged.{stays}{SATURATION * saturated}"
        ),
    )


def _parameter(value: float, error: float | None, saturated: bool) -> Cell:
    mark = SATURATED if saturated else ""
    if not error:
        return Cell(value=value, kind="number", digits=3, mark=mark)
    return Cell(value=value, kind="level", error=error, mark=mark)


# Along a run


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The parameter of a family at every checkpoint.

    Attributes:
        family: its name.
        labels: the checkpoints.
        values: parameter, error, and whether it is saturated, of each.
    """

    family: str
    labels: Sequence[str]
    values: Sequence[tuple[float, float | None, bool]]

    @property
    def held_from(self) -> int | None:
        """The first place from which on it is never saturated; None if there is none."""
        place = len(self.values)
        while place and not self.values[place - 1][2]:
            place -= 1
        return place if place < len(self.values) else None


def curves(
    labelled: Sequence[tuple[str, Mapping[str, Any]]],
) -> list[Curve]:
    """Of every family that all checkpoints have, for one target; else none.

    Args:
        labelled: label and results of every checkpoint with an attribution.
    """
    found = [{row["family"]: row for row in rows_of(d)} for _, d in labelled]
    if not found or not all(found):
        return []
    if len({target_of(document) for _, document in labelled}) > 1:
        return []
    labels = [label for label, _ in labelled]
    return [
        Curve(
            family=family,
            labels=labels,
            values=[parameter(rows[family]) for rows in found],
        )
        for family in FAMILIES
        if all(family in rows for rows in found)
    ]


def sentence(found: Sequence[Curve], target: float, unit: str) -> str:
    """From where on each setting would have held the entropy, and with which value."""
    said = []
    for curve in found:
        if curve.family not in SETTINGS:
            continue
        name, start = SETTINGS[curve.family], curve.held_from
        reached = [values for values in curve.values if not values[2]]
        if start is not None and len(curve.values) - start > 1:
            where = "at every one" if not start else f"from {curve.labels[start]} on"
            said.append(f"{name} {_about(curve.values[start:])} {where}")
        elif reached:
            of_all = f"{len(reached)} of {len(curve.values)}"
            said.append(f"{name} {_about(reached)} at {of_all}")
        else:
            said.append(f"{name} nowhere")
    what = "held the entropy"
    if target:
        what = f"left a change of {in_words(target, 3, signed=True)} {unit}"
    return (
        f"Would have {what}, step by step: {listed(said)}. Each step is corrected alone, "
        "on the path that was trained."
    )


def _about(parameters: Sequence[tuple[float, float | None, bool]]) -> str:
    """The median, from where to where they go, and the rms of their errors."""
    values = [value for value, *_ in parameters]
    squares = [error**2 for _, error, _ in parameters if error]
    middle = f"of about {in_words(statistics.median(values), 2)}"
    low, high = (in_words(end, 2) for end in (min(values), max(values)))
    more = [] if low == high else [f"{low} to {high}"]
    if squares:
        error = math.sqrt(statistics.fmean(squares))
        more.append(f"each ± {in_words(error, 2)}")
    return f"{middle} ({', '.join(more)})" if more else middle


def table_by_step(found: Sequence[Curve], target: float, unit: str) -> Table:
    """Every family's parameter at every checkpoint."""
    rows: list[Row] = []
    for curve in found:
        cells = [_parameter(*values) for values in curve.values]
        rows.append([text(FAMILIES[curve.family]), *cells])
    steps = count(len(found[0].labels), "checkpoint")
    saturated = any(values[2] for curve in found for values in curve.values)
    return Table(
        title=f"{title(target, unit)}, at each checkpoint",
        columns=["parameter of", *found[0].labels],
        rows=rows,
        caption=(
            f"Over {steps}; ± is one standard error. {PARAMETERS}{SATURATION * saturated}"
        ),
        folded=True,
    )
