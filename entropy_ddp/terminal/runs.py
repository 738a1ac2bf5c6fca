"""A run's results in the terminal, by command: read, never recomputed."""

import math

from rich.console import Console
from rich.text import Text

from entropy_ddp.report.answer import is_trusted, sweep_sentences
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
    document = results.to_dict()
    floor = results.sweep_summary.noise_floor
    for point, row in zip(results.sweep, document["sweep"], strict=True):
        second = "-"
        if point.delta_h2 is not None and point.delta_h2_se is not None:
            second = plus_minus(point.delta_h2, point.delta_h2_se)
        mark = "" if is_trusted(row) else " ×"
        table.add_row(
            number(point.eta, 4),
            plus_minus(point.delta_h_true, math.hypot(point.se, floor)),
            plus_minus(point.delta_h1, point.delta_h1_se),
            second,
            f"{point.ess_fraction:.4g}{mark}",
        )
    table.columns[0].no_wrap = True
    let_pairs_break(table, 1, 2, 3)
    console.print(table)
    for sentence in sweep_sentences(document):
        console.print(Text(sentence))
    console.print(verdict_line(results, out))
