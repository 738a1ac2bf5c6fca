"""A run's results as tables in the terminal: read, never recomputed."""

import math
from typing import Any

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from entropy_ddp.results import AuditRow, GradientDotResult, Results, UpdateResult

VERDICT_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
UNITS = {
    "per_token": "nats/token",
    "per_sequence": "nats/sequence",
    "per_sequence_token_mean": "nats/token, mean over sequences",
    "sum": "nats",
}


def print_results(console: Console, results: Results, out: str | None) -> None:
    """All tables of a probe: what is wrong first, the answer, then the details."""
    print_heading(console, results)
    console.print(_estimators(results))
    console.print(_step(results))
    if results.gradient_dot is not None:
        console.print(_gradient_dot(results.gradient_dot))
    console.print(_audit_table(results.audit))
    console.print(verdict_line(results, out))


def print_heading(console: Console, results: Results) -> None:
    """What was probed, what is wrong with it, and the answer."""
    _print_complaints(console, results)
    console.print(_answer(results))


def _print_complaints(console: Console, results: Results) -> None:
    """What was probed, then what is wrong: what fails before what only warns."""
    console.print(_header(results))
    complaints = [row for row in results.audit if row.verdict != "ok"]
    for row in sorted(complaints, key=lambda row: row.verdict):
        console.print(_complaint(row))


def print_diagnosis(console: Console, results: Results, out: str | None) -> None:
    """The audits: every complaint with its next step, then all of them."""
    print_heading(console, results)
    if all(row.verdict == "ok" for row in results.audit):
        console.print("No check complains.")
    console.print(_audit_table(results.audit))
    console.print(verdict_line(results, out))


def print_sweep(console: Console, results: Results, out: str | None) -> None:
    """Truth and predictions by step size, and what the sweep says as a whole."""
    assert results.sweep is not None and results.sweep_summary is not None
    _print_complaints(console, results)
    table = new_table(
        f"Entropy change by step size, {UNITS[results.truth.normalize]}",
        "learning rate",
        "ΔH true",
        "ΔH first order",
        "ΔH second order",
        "ESS / N",
    )
    for point in results.sweep:
        second = "-" if point.delta_h2 is None else f"{point.delta_h2:+.4e}"
        table.add_row(
            number(point.eta, 4),
            plus_minus(point.delta_h_true, point.se),
            plus_minus(point.delta_h1, point.delta_h1_se),
            second,
            f"{point.ess_fraction:.4g}",
        )
    _let_pairs_break(table, 1, 2)
    console.print(table)
    summary = results.sweep_summary
    lines = [f"noise floor of ΔH true: {number(summary.noise_floor, 3)}"]
    if summary.exponent is not None:
        lines.append(f"|ΔH true| grows as eta to the power {summary.exponent:.3f}")
    if summary.agreement is None:
        lines.append("first order and truth agree within two standard errors nowhere")
    else:
        low, high = (number(eta, 3) for eta in summary.agreement)
        lines.append(
            f"first order and truth agree within two standard errors from {low} to {high}"
        )
    if results.curvature is not None and results.curvature.eta_star is not None:
        edge = number(results.curvature.eta_star, 3)
        lines.append(f"edge of the linear regime, eta*: {edge}")
    for pair in summary.odd or []:
        odd = f"{pair['delta_h']:+.6e}"
        lines.append(f"odd part at eta = {number(pair['eta'], 4)}: {odd}")
    console.print("\n".join(lines))
    console.print(verdict_line(results, out))


def number(value: float, digits: int = 6) -> str:
    """A number in scientific notation that never rounds to 0."""
    return f"{value:.{digits - 1}e}"


def plus_minus(value: float, error: float) -> str:
    return f"{value:+.4e} ± {error:.1e}"


def _header(results: Results) -> Panel:
    lines = [
        f"{name}: {batch.num_sequences:,} sequences in {batch.num_groups:,} groups, "
        f"{batch.num_tokens:,} response tokens"
        for name, batch in (("E", results.E), ("U", results.U))
        if batch is not None
    ]
    if results.update.delta is not None:
        lines.append(f"in place of a step: {results.update.delta}")
    run = results.run
    ranks = f"{run.world_size} rank{'s' if run.world_size > 1 else ''}"
    lines.append(f"{ranks} on {run.device}, {run.dtype}, seed {run.seed}")
    if run.out_of_memory_retries:
        lines.append(f"{run.tokens_per_microbatch:,} tokens a microbatch fitted")
    return Panel("\n".join(lines), title="entropy_ddp", expand=False)


def _complaint(row: AuditRow) -> Text:
    label = {"warn": "warning", "fail": "FAILED"}[row.verdict]
    text = Text(f"{label}: ", style=VERDICT_STYLES[row.verdict])
    text.append(f"{row.name} is {as_text(row.value)}, expected {row.expected}; ")
    text.append(row.hint)
    return text


def _gradient_dot(dot: GradientDotResult) -> Table:
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
    rows = {
        "<X, Y>": dot.bars_dot,
        "U_cross": dot.u_cross,
        "V_X, variance due to E": dot.V_X,
        "V_Y, variance due to U": dot.V_Y,
        "frac_var": dot.frac_var,
        "norm of X": dot.x_norm,
        "norm of Y": dot.y_norm,
        "SE with the covariance of X and Y": dot.se_paired,
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, number(value, 11))
    return table


def new_table(title: str, *columns: str, caption: str | None = None) -> Table:
    table = Table(
        title=title, title_justify="left", caption=caption, caption_justify="left"
    )
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        # Names may break over lines; numbers may not.
        table.add_column(column, justify="right", no_wrap=True, overflow="fold")
    return table


def _answer(results: Results) -> Table:
    """Truth, prediction and their difference in standard errors, on one row."""
    truth, linear = results.truth, results.linear
    eta = results.update.learning_rate_used
    difference = truth.delta_h_true - linear.delta_h1
    in_errors = "-"
    if linear.difference_se:
        in_errors = f"{difference / linear.difference_se:+.2g}"
    unit = UNITS[truth.normalize]
    bits = truth.H_orig / math.log(2)
    notes = [
        f"{truth.H_orig:.6g} {unit} = {bits:.6g} bits; ± is one standard error.",
        "The difference has a (paired) error of its own: it is what first order misses.",
    ]
    if results.curvature is not None:
        second = results.curvature.delta_h2
        notes.append(
            f"With the curvature of the step the prediction is {second:+.4e}, and the "
            f"difference {truth.delta_h_true - second:+.1e}."
        )
    table = new_table(
        f"Entropy change of {_subject(results.update)}, {unit}",
        "H before",
        "ΔH true",
        "ΔH first order",
        "true - first order",
        "in SE",
        caption="\n".join(notes),
    )
    table.add_row(
        f"{truth.H_orig:.6g}",
        plus_minus(truth.delta_h_true, truth.se),
        plus_minus(linear.delta_h1, abs(eta) * linear.se),
        plus_minus(difference, linear.difference_se),
        in_errors,
    )
    _let_pairs_break(table, 1, 2, 3)
    return table


def _subject(update: UpdateResult) -> str:
    """What the entropy change is of."""
    given = update.delta is not None
    return "the given change" if given else f"one {update.loss} step"


def _let_pairs_break(table: Table, *columns: int) -> None:
    """In a narrow terminal, let a value and its error stand on two lines."""
    for number_of_column in columns:
        table.columns[number_of_column].no_wrap = False


def _estimators(results: Results) -> Table:
    """Every estimator of the same two numbers, with its error."""
    eta = results.update.learning_rate_used
    table = new_table(
        "All estimators of this run",
        "estimator",
        "ΔH",
        "SE",
        "sequences needed",
        "ESS / N",
        caption=(
            "* the configured one, shown above; cv: control variates removed; sequences "
            "needed for the\nerror of the first row of each kind: SE ratio squared"
        ),
    )
    for row in results.truth_all:
        mark = " *" if row["is_mode"] == results.truth.is_mode else ""
        ess = f"{row['ess_fraction']:.4g}"
        first = results.truth_all[0]["se"]
        name = f"true, {row['is_mode']}"
        _estimator_row(table, name + mark, (row["delta_h_true"], row["se"], first), ess)
        if "se_adjusted" in row:
            values = (row["delta_h_true_adjusted"], row["se_adjusted"], first)
            _estimator_row(table, f"{name}, adjusted", values, ess)
    table.add_section()
    linear = results.linear
    configured = (linear.score, linear.baseline, linear.control_variates)
    for row in results.linear_all:
        name = f"first order, {row['score']}"
        if row["score"] == "to_go":
            name += f", {row['baseline']}"
        name += ", cv" if row["control_variates"] else ""
        kind = (row["score"], row["baseline"], row["control_variates"])
        mark = " *" if kind == configured else ""
        first = results.linear_all[0]["se"]
        values = (eta * row["slope"], eta * row["se"], eta * first)
        _estimator_row(table, name + mark, values, "")
    return table


def _estimator_row(
    table: Table, name: str, values: tuple[float, float, float], ess: str
) -> None:
    estimate, error, first = values
    share = f"{100 * (error / first) ** 2:.3g} %" if first else "-"
    table.add_row(name, number(estimate, 11), number(error, 3), share, ess)


def _step(results: Results) -> Table:
    """The step, and the three terms of the slope."""
    update, linear = results.update, results.linear
    eta = update.learning_rate_used
    table = new_table("The step and the terms of ΔH first order", "quantity", "value")
    unit = "learning rate" if update.delta is None else "eta of the given change"
    rows = {
        unit: update.learning_rate_used,
        "norm of the parameter change": update.param_update_l2,
        "gradient norm before clipping": update.grad_norm,
        "clip coefficient": update.clip_coef,
        f"slope, nats per unit {unit}": linear.slope,
        **{f"term: {name}": eta * term for name, term in linear.terms.items()},
        "SE of the slope, delta method": linear.se,
        "SE of the slope, jackknife": linear.se_jackknife,
    }
    if results.curvature is not None:
        rows |= {
            "second derivative H''": results.curvature.second_derivative,
            "SE of H'', jackknife": results.curvature.se,
            "ΔH second order": results.curvature.delta_h2,
        }
        if results.curvature.eta_star is not None:
            rows["eta*, edge of the linear regime"] = results.curvature.eta_star
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, number(value, 11))
    largest = update.top_parameters[0]
    table.add_row(
        f"moved most: {short_name(largest['name'])}", number(largest["l2"], 11)
    )
    return table


def short_name(parameter: str) -> str:
    """A parameter's name without what PEFT wraps around every one of them."""
    for wrapping in ("base_model.model.", "model.", "transformer."):
        parameter = parameter.removeprefix(wrapping)
    return parameter.removesuffix(".weight").removesuffix(".default")


def as_text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float, dict)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.11g}"
    return "\n".join(f"{short_name(k)}: {as_text(item)}" for k, item in value.items())


def _audit_table(rows: list[AuditRow]) -> RenderableType:
    table = new_table("Audits", "check", "value", "expected", "")
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


def verdict_line(results: Results, out: str | None) -> Text:
    verdicts: list[str] = [row.verdict for row in results.audit]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in VERDICT_STYLES)
    style = "green" if results.status == "ok" else "bold red"
    seconds = sum(results.run.seconds.values())
    text = Text(f"{results.status}", style=style)
    text.append(f" ({counts}; {seconds:.1f} s)", style="default")
    if out is not None:
        text.append(f", written to {out}", style="default")
    return text
