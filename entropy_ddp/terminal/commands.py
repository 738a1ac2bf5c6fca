"""What each command prints: the answer first, then what lies behind it."""

import io
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from entropy_ddp.answers import holding, ledger_tables, tables
from entropy_ddp.answers.cells import Row, Table, head, text
from entropy_ddp.answers.headline import (
    Document,
    complaints,
    described,
    headline,
    sweep_sentences,
    verdict_counts,
)
from entropy_ddp.answers.power import power
from entropy_ddp.ledger.accumulate import Ledger
from entropy_ddp.results import Results
from entropy_ddp.terminal.tables import VERDICT_STYLES, shown, written

WIDTH_OF_NOTEBOOK = 100
# Tokens and prompts of a ledger that are shown.
MOST = 10
# What `check` finds of memory, in bytes, by its names in JSON.
MEMORY = {
    "host_now": "of the machine, in use by a rank now",
    "host_more": "of the machine, needed beside that",
    "host_free": "of the machine, free for a rank",
    "device_more": "of the GPU, needed beside what is in use",
    "device_free": "of the GPU, free",
}


def print_results(console: Console, results: Results, out: str | None) -> None:
    """A probe: what is wrong first, the answer, then what lies behind it."""
    document = results.to_dict()
    _print_answer(console, document)
    _print(console, tables.estimators(document), tables.step(document))
    if "gradient_dot" in document:
        _print(console, tables.gradient_dot(document))
    _print(console, tables.central_audits(document))
    console.print(_verdict_line(document, out))


def print_diagnosis(console: Console, results: Results, out: str | None) -> None:
    """The audits: every complaint with its next step, then all of them."""
    document = results.to_dict()
    _print_answer(console, document)
    if not complaints(document["audit"]):
        console.print("No check complains.")
    _print(console, tables.audits(document))
    console.print(_verdict_line(document, out))


def print_sweep(console: Console, results: Results, out: str | None) -> None:
    """Truth and predictions by step size, and what the sweep says as a whole."""
    document = results.to_dict()
    _print_complaints(console, document)
    _print(console, tables.sweep(document))
    for sentence in sweep_sentences(document):
        console.print(Text(sentence))
    console.print(_verdict_line(document, out))


def print_attribution(console: Console, results: Results, out: str | None) -> None:
    """Parts of the step, tokens that matter most, cheap scores against exact shares."""
    document = results.to_dict()
    _print_answer(console, document)
    print_shares(console, results)
    console.print(_verdict_line(document, out))


def print_shares(console: Console, results: Results) -> None:
    """The attribution alone."""
    document = results.to_dict()
    for table in (
        tables.parts, tables.top_tokens, tables.kinds_of_tokens, tables.proxies,
        tables.what_if,
    ):  # fmt: skip
        _print(console, table(document))
    _print(console, *holding.tables(document))


def print_ledger(console: Console, ledger: Ledger, out: str) -> None:
    """Totals, the decomposition, the most influential tokens and prompts."""
    for note in ledger.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    _print(console, ledger_tables.totals(ledger))
    if ledger.parts:
        _print(
            console,
            ledger_tables.parts(ledger),
            ledger_tables.tokens(ledger, MOST),
            ledger_tables.prompts(ledger, MOST),
        )
    console.print(Text(f"written to {out}", style="dim"))


def print_samples(console: Console, summaries: list[dict[str, Any]], out: str) -> None:
    """What `sample` rolled out."""
    names = dict.fromkeys(name for summary in summaries for name in summary)
    rows = [
        (
            text(name.removeprefix("num_").replace("_", " ")),
            *(
                tables.found(summary[name]) if name in summary else text("–")
                for summary in summaries
            ),
        )
        for name in names
        if name != "split"
    ]
    columns = ("", *(summary["split"] for summary in summaries))
    title = f"Rollouts written to {out}"
    _print(console, Table(title=title, columns=columns, rows=rows))


def print_import(console: Console, summary: dict[str, Any], output: str) -> None:
    """What `import` read, then what may be wrong with it."""
    rows = [
        (text(name.replace("_", " ")), text(_one_line(value)))
        for name, value in summary.items()
        if name != "notes"
    ]
    title = f"Rollouts written to {output}"
    _print(console, Table(title=title, columns=("", "imported"), rows=rows))
    for note in summary["notes"]:
        console.print(Text(f"warning: {note}", style=VERDICT_STYLES["warn"]))


def print_inspection(console: Console, found: dict[str, Any]) -> None:
    """What `check` found, one table."""
    rows: list[Row] = []
    for subject, facts in found.items():
        rows += [(), head(subject)]
        for name, value in facts.items():
            if name in MEMORY:
                rows.append((text(MEMORY[name]), text(f"{value / 1e9:.2f} GB")))
                continue
            lines = value if isinstance(value, list) else [value]
            rows.append((text(name), text("\n".join(map(_one_line, lines)))))
    title = "Configuration, checkpoint and batches are valid"
    _print(console, Table(title=title, columns=("", "found"), rows=rows))


def as_html(results: Results) -> str:
    """For a notebook: the answer, what is wrong with it, and the verdict."""
    console = Console(record=True, file=io.StringIO(), width=WIDTH_OF_NOTEBOOK)
    document = results.to_dict()
    _print_answer(console, document)
    console.print(_verdict_line(document, None))
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def print_distrust(console: Console, results: Results) -> None:
    """That the results are not to be trusted, which checks say so, and what to do."""
    _print_distrust(console, results.to_dict())


def _print(console: Console, *several: Table) -> None:
    for table in several:
        console.print(written(table, console.width))


def _print_answer(console: Console, document: Document) -> None:
    """What was probed, what is wrong with it, and the answer."""
    _print_complaints(console, document)
    console.print(Text("".join(headline(document)), style="bold"))
    _print(console, tables.answer(document))
    if "power" in document:
        _print(console, power(document))


def _print_complaints(console: Console, document: Document) -> None:
    """What fails, before anything else; what was probed; what only warns."""
    _print_distrust(console, document)
    # The machine needs no name.
    lines = [
        f"{name}: {line}".removeprefix("computed by: ")
        for name, line in described(document).items()
    ]
    panel = Panel(Text("\n".join(lines)), title="entropy_ddp", expand=False)
    console.print(panel)
    for row in complaints(document["audit"]):
        if row["verdict"] == "warn":
            console.print(_complaint(row))


def _print_distrust(console: Console, document: Document) -> None:
    failed = [row for row in document["audit"] if row["verdict"] == "fail"]
    if not failed:
        return
    names = ", ".join(row["name"] for row in failed)
    several = "s" if len(failed) > 1 else ""
    line = f"NOT TO BE TRUSTED: failed the check{several} {names}; what to do:"
    console.print(Text(line, style=VERDICT_STYLES["fail"]))
    for row in failed:
        console.print(_complaint(row))


def _complaint(row: dict[str, Any]) -> Text:
    label = {"warn": "warning", "fail": "FAILED"}[row["verdict"]]
    value = _one_line(row["value"])
    return Text(f"{label}: ", style=VERDICT_STYLES[row["verdict"]]).append(
        f"{row['name']} is {value}, expected {row['expected']}; {row['hint']}"
    )


def _verdict_line(document: Document, out: str | None) -> Text:
    seconds = sum(document["run"]["seconds"].values())
    line = Text(
        document["status"], style="green" if document["status"] == "ok" else "bold red"
    )
    line.append(f" ({verdict_counts(document)}; {seconds:.1f} s)", style="default")
    if out is not None:
        line.append(f", written to {out}", style="default")
    return line


def _one_line(value: Any) -> str:
    """What was found, as the cell of a table shows it."""
    if isinstance(value, dict) and set(value) == {"min", "max"}:
        low, high = _one_line(value["min"]), _one_line(value["max"])
        return low if low == high else f"{low} to {high}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_one_line(item)}" for name, item in value.items())
    return "none" if value is None else shown(tables.found(value)).plain
