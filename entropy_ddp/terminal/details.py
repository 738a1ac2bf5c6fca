"""What lies behind the answer, as tables in the terminal: estimators, step, audits."""

import math
from itertools import zip_longest
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from entropy_ddp.names import short_name
from entropy_ddp.results import AuditRow, GradientDotResult, Results
from entropy_ddp.terminal.tables import (
    VERDICT_STYLES,
    as_text,
    let_pairs_break,
    new_table,
    plus_minus,
    supported,
)

# Columns in which both halves of a table stand beside each other.
WIDTH_OF_TWO_HALVES = 100
# What a probe shows of its audits: the sums, counts and gaps by which it can be wrong.
CENTRAL_AUDITS = (
    "gradient coverage: entropy (X)",
    "gradient coverage: loss (Y)",
    "delta_h1, ten decimals",
    "delta_h1, ten digits",
    "optimizer steps",
    "sum_deriv_scales",
    "total_tokens_used",
    "duality gap",
    "attribution gap",
    "noise floor of delta_h_true",
    "restored bits: parameters and optimizer state",
    "equal on all ranks: parameters after the step",
    "collectives: parameter buffers",
)


def estimators_table(results: Results) -> Table:
    """Every estimator of the same two numbers, with its error."""
    table = new_table(
        "All estimators of this run",
        "estimator",
        "ΔH",
        "needed",
        "ΔH with less noise",
        "needed",
        caption=(
            "* the configured one, shown above. Less noise: control variates removed, of "
            "the truth what the best slope shows. Needed: sequences for the error of the "
            "first row of each kind."
        ),
    )
    let_pairs_break(table, 1, 3)
    first = results.truth_all[0]["se"]
    for row in results.truth_all:
        mark = "* " if row["is_mode"] == results.truth.is_mode else ""
        cells = _estimate(row["delta_h_true"], row["se"], first, mark)
        if "se_adjusted" in row:
            adjusted = row["delta_h_true_adjusted"]
            cells += _estimate(adjusted, row["se_adjusted"], first)
        table.add_row(f"true, {row['is_mode']}", *cells)
    table.add_section()
    kinds = dict.fromkeys((r["score"], r["baseline"]) for r in results.linear_all)
    first = results.linear_all[0]["se"]
    for kind in kinds:
        rows = {
            r["control_variates"]: r
            for r in results.linear_all
            if (r["score"], r["baseline"]) == kind
        }
        score, baseline = kind
        name = "first order, " + (score if score == "full" else f"{score}, {baseline}")
        table.add_row(name, *_plain_and_adjusted(results, rows, first))
    return table


def _plain_and_adjusted(
    results: Results, rows: dict[bool, dict[str, Any]], first: float
) -> tuple[str, ...]:
    """Four cells: a slope times eta, without and with control variates removed."""
    eta = results.update.learning_rate_used
    cells: tuple[str, ...] = ()
    for with_variates in (False, True):
        row = rows.get(with_variates)
        if row is None:
            cells += ("", "")
            continue
        mark = "* " if _is_configured(results, row) else ""
        cells += _estimate(eta * row["slope"], eta * row["se"], eta * first, mark)
    return cells


def _is_configured(results: Results, row: dict[str, Any]) -> bool:
    names = ("score", "baseline", "control_variates")
    return all(row[name] == getattr(results.linear, name) for name in names)


def _estimate(
    value: float, error: float, first: float, mark: str = ""
) -> tuple[str, ...]:
    share = f"{100 * (error / first) ** 2:.3g} %" if first else "-"
    return mark + plus_minus(value, error), share


def step_table(results: Results, width: int) -> Table:
    """The step, and the three terms of the slope.

    Args:
        results: what is shown.
        width: columns of the terminal; both halves stand side by side if they fit.
    """
    halves = [_step_rows(results), _slope_rows(results)]
    moved = results.update.top_parameters[0]
    caption = f"moved most: {short_name(moved['name'])}, by {moved['l2']:.4g}"
    if not _resolves_curvature(results):
        caption += (
            "\nthe error of H'' is above H'': --set curvature.enabled=false leaves it "
            "out, and half of the work on E"
        )
    columns = ("quantity", "value") * (2 if width >= WIDTH_OF_TWO_HALVES else 1)
    table = new_table(
        "The step and the terms of ΔH first order",
        *columns,
        caption=caption,
    )
    rows: list[tuple[str, ...]]
    if len(columns) == 2:
        rows = [pair for half in halves for pair in half]
    else:
        table.columns[2].justify = "left"
        empty = ("", "")
        rows = [(*a, *b) for a, b in zip_longest(*halves, fillvalue=empty)]
    for row in rows:
        table.add_row(*row)
    return table


def _resolves_curvature(results: Results) -> bool:
    """Whether H'' is known to more than its error, or was not asked for."""
    curvature = results.curvature
    return curvature is None or curvature.se <= abs(curvature.second_derivative)


def _step_rows(results: Results) -> list[tuple[str, str]]:
    """What is exact, and the terms with the digits that the error of their sum leaves."""
    update, linear = results.update, results.linear
    eta = update.learning_rate_used
    exact: dict[str, float | None] = {
        "learning rate" if update.delta is None else "eta of the change": eta,
        "norm of the change": update.param_update_l2,
        "gradient norm": update.grad_norm,
        "clip coefficient": update.clip_coef,
    }
    rows = [(name, f"{v:.7g}") for name, v in exact.items() if v is not None]
    return rows + [
        (f"term: {name}", supported(eta * term, abs(eta) * linear.se))
        for name, term in linear.terms.items()
    ]


def _slope_rows(results: Results) -> list[tuple[str, str]]:
    linear, curvature = results.linear, results.curvature
    rows = [
        ("slope, nats / eta", plus_minus(linear.slope, linear.se)),
        ("its error by jackknife", f"{linear.se_jackknife:.1e}"),
    ]
    if curvature is None:
        return rows
    pairs = {
        "second derivative H''": (curvature.second_derivative, curvature.se),
        "ΔH second order": (curvature.delta_h2, curvature.delta_h2_se),
        "eta*, edge of linearity": (curvature.eta_star, curvature.eta_star_se),
    }
    return rows + [
        (name, plus_minus(value, error))
        for name, (value, error) in pairs.items()
        if value is not None and error is not None
    ]


def gradient_dot_table(dot: GradientDotResult) -> Table:
    """The gradient-dot form, its variance, and the terms it comes from."""
    table = new_table(
        f"Gradient-dot form, direction {dot.direction}, weighting {dot.weighting}",
        "quantity",
        "value",
        caption=(
            "same rollouts in E and U: the diagonal was removed"
            if dot.u_statistic
            else None
        ),
    )
    table.add_row("deltaH1", plus_minus(dot.deltaH1, dot.se_deltaH1))
    error = math.sqrt(dot.V_X + dot.V_Y)
    table.add_row("<X, Y>", plus_minus(dot.bars_dot, error))
    # Variances, known to a few percent at best, and norms of noisy vectors.
    rows = {
        "V_X, variance due to E": dot.V_X,
        "V_Y, variance due to U": dot.V_Y,
        "frac_var": dot.frac_var,
        "norm of X": dot.x_norm,
        "norm of Y": dot.y_norm,
        "SE with the covariance of X and Y": dot.se_paired,
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, f"{value:.1e}")
    return table


def central_audits(rows: list[AuditRow]) -> RenderableType:
    """The audits that every result stands on; `audit_table` has all of them."""
    chosen = [row for name in CENTRAL_AUDITS for row in rows if row.name == name]
    note = (
        f"{len(chosen)} of {len(rows)} audits; all are in results.json, and the command "
        "audit prints them"
    )
    return audit_table(chosen, title="Central audits", caption=note)


def audit_table(
    rows: list[AuditRow], title: str = "Audits", caption: str | None = None
) -> RenderableType:
    """One row a check: what was found, what it should be, the verdict."""
    table = new_table(title, "check", "value", "expected", "", caption=caption)
    for column, width in zip(table.columns, (47, 21, 17)):
        column.max_width = width
    table.columns[2].no_wrap = False
    for row in rows:
        if isinstance(row.value, dict):
            # A line for each entry: names are too long for a column of values.
            table.add_row(row.name)
            for name, item in row.value.items():
                table.add_row(f"  {short_name(name)}", as_text(item))
            continue
        table.add_row(
            row.name,
            as_text(row.value),
            row.expected,
            Text(row.verdict, style=VERDICT_STYLES[row.verdict]),
        )
    return table
