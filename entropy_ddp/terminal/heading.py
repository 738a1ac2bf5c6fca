"""What a person reads first: what was probed, what is wrong with it, the answer."""

import math

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from entropy_ddp.report.answer import headline, second_order
from entropy_ddp.report.words import with_error
from entropy_ddp.results import AuditRow, Results, UpdateResult
from entropy_ddp.terminal.tables import (
    UNITS,
    VERDICT_STYLES,
    as_text,
    let_pairs_break,
    new_table,
    plus_minus,
)


def print_heading(console: Console, results: Results) -> None:
    """What was probed, what is wrong with it, and the answer."""
    print_complaints(console, results)
    document = results.to_dict()
    sentence = "".join(headline(document))
    console.print(Text(sentence, style="bold"))
    console.print(_answer(results, second_order(document)))


def print_complaints(console: Console, results: Results) -> None:
    """What fails, before anything else; what was probed; what only warns."""
    print_distrust(console, results)
    console.print(_header(results))
    for row in results.audit:
        if row.verdict == "warn":
            console.print(_complaint(row))


def print_distrust(console: Console, results: Results) -> None:
    """That the results are not to be trusted, which checks say so, and what to do."""
    failed = [row for row in results.audit if row.verdict == "fail"]
    if not failed:
        return
    names = ", ".join(row.name for row in failed)
    several = "s" if len(failed) > 1 else ""
    line = f"NOT TO BE TRUSTED: failed the check{several} {names}; what to do:"
    console.print(Text(line, style=VERDICT_STYLES["fail"]))
    for row in failed:
        console.print(_complaint(row))


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
    if run.memory is not None:
        gigabytes = {name: f"{size / 1e9:.2f} GB" for name, size in run.memory.items()}
        lines.append(
            f"memory: {gigabytes['peak_bytes']} a rank at the peak "
            f"({gigabytes['estimated_bytes']} estimated)"
        )
    if run.out_of_memory_retries:
        fitted = f"{run.tokens_per_microbatch:,} tokens"
        lines.append(f"memory ran out: at most {fitted} in a microbatch")
    if run.resumed:
        lines.append(f"resumed, from before: {', '.join(run.resumed)}")
    return Panel(Text("\n".join(lines)), title="entropy_ddp", expand=False)


def _complaint(row: AuditRow) -> Text:
    label = {"warn": "warning", "fail": "FAILED"}[row.verdict]
    text = Text(f"{label}: ", style=VERDICT_STYLES[row.verdict])
    text.append(f"{row.name} is {as_text(row.value)}, expected {row.expected}; ")
    text.append(row.hint)
    return text


def _answer(results: Results, curved: str) -> Table:
    """Truth, prediction and their difference in standard errors, on one row.

    Args:
        results: what is shown.
        curved: a sentence on the second order; may be empty.
    """
    truth, linear = results.truth, results.linear
    eta = results.update.learning_rate_used
    difference = truth.delta_h_true - linear.delta_h1
    in_errors = "-"
    paired = math.hypot(linear.difference_se, truth.noise_floor or 0.0)
    if paired:
        in_errors = f"{difference / paired:+.2g}"
    unit = UNITS[truth.normalize]
    before, spread = truth.H_orig, truth.H_orig_se
    bits = [x / math.log(2) for x in (before, spread or 0.0)]
    entropy = f"{before:.3g} {unit}"
    if spread is not None:
        entropy = f"{with_error(before, spread, signed=False)} {unit}"
        entropy += f" = {with_error(*bits, signed=False)} bits"
    notes = [
        f"{entropy}; ± is one standard error.",
        "The difference has a (paired) error of its own: it is what first order misses.",
        *([curved] if curved else []),
    ]
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
        f"{before:.3g}" if spread is None else with_error(before, spread, signed=False),
        plus_minus(truth.delta_h_true, truth.error),
        plus_minus(linear.delta_h1, abs(eta) * linear.se),
        plus_minus(difference, paired),
        in_errors,
    )
    table.columns[0].no_wrap = True
    let_pairs_break(table, 1, 2, 3)
    return table


def _subject(update: UpdateResult) -> str:
    """What the entropy change is of."""
    given = update.delta is not None
    return "the given change" if given else f"one {update.loss} step"


def verdict_counts(results: Results) -> str:
    """How many audits have each verdict."""
    verdicts: list[str] = [row.verdict for row in results.audit]
    return ", ".join(f"{verdicts.count(v)} {v}" for v in VERDICT_STYLES)


def verdict_line(results: Results, out: str | None) -> Text:
    style = "green" if results.status == "ok" else "bold red"
    seconds = sum(results.run.seconds.values())
    text = Text(f"{results.status}", style=style)
    text.append(f" ({verdict_counts(results)}; {seconds:.1f} s)", style="default")
    if out is not None:
        text.append(f", written to {out}", style="default")
    return text
