"""A run's results in the terminal, by command: read, never recomputed."""

from rich.console import Console

from entropy_ddp.results import Results
from entropy_ddp.terminal.details import (
    audit_table,
    central_audits,
    estimators_table,
    gradient_dot_table,
    step_table,
)
from entropy_ddp.terminal.heading import print_complaints, print_heading, verdict_line
from entropy_ddp.terminal.tables import (
    UNITS,
    let_pairs_break,
    new_table,
    number,
    plus_minus,
)


def print_results(console: Console, results: Results, out: str | None) -> None:
    """A probe: what is wrong first, the answer, then what lies behind it."""
    print_heading(console, results)
    console.print(estimators_table(results))
    console.print(step_table(results, console.width))
    if results.gradient_dot is not None:
        console.print(gradient_dot_table(results.gradient_dot))
    console.print(central_audits(results.audit))
    console.print(verdict_line(results, out))


def print_diagnosis(console: Console, results: Results, out: str | None) -> None:
    """The audits: every complaint with its next step, then all of them."""
    print_heading(console, results)
    if all(row.verdict == "ok" for row in results.audit):
        console.print("No check complains.")
    console.print(audit_table(results.audit))
    console.print(verdict_line(results, out))


def print_sweep(console: Console, results: Results, out: str | None) -> None:
    """Truth and predictions by step size, and what the sweep says as a whole."""
    assert results.sweep is not None and results.sweep_summary is not None
    print_complaints(console, results)
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
    table.columns[0].no_wrap = True
    let_pairs_break(table, 1, 2)
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
