"""The page of a run's ledger."""

from entropy_ddp.answers import ledger_tables as tables
from entropy_ddp.answers.words import with_error
from entropy_ddp.ledger.accumulate import Ledger
from entropy_ddp.report.figures.ledger import (
    curve_and_sums,
    gradient_by_probability,
    parts_by_step,
)
from entropy_ddp.report.page import Page, PageSection


def ledger_page(ledger: Ledger, name: str) -> Page:
    """The page of the run of this name."""
    steps = ledger.steps
    run = PageSection(
        id="run",
        title="The run",
        figures=[curve_and_sums(ledger)],
        tables=[tables.totals(ledger)],
    )
    parts = PageSection(
        id="parts",
        title="What it is made of",
        figures=[parts_by_step(ledger), gradient_by_probability(ledger)],
        tables=[tables.parts(ledger)],
    )
    influence = PageSection(
        id="influence",
        title="Who moved it most",
        tables=[
            tables.tokens(ledger),
            tables.prompts(ledger),
            tables.single_tokens(ledger),
        ],
    )
    checks = PageSection(id="checks", title="Checks", tables=[tables.checks(ledger)])
    return Page(
        title=f"{name}: entropy ledger",
        kicker=f"Entropy ledger of {name}, steps {steps['first']:,} to {steps['last']:,}",
        alarm="" if ledger.trusted else "A truth of this run is not to be trusted.",
        headline=tables.headline(ledger),
        sign=tables.sign(ledger),
        lead=" ".join([_measured_curve(ledger), *map(_sentence, ledger.notes)]),
        checked=f"{steps['probed']:,} of {steps['total']:,} steps were probed.",
        sections=[run, *([parts, influence] if ledger.parts else []), checks],
    )


def _measured_curve(ledger: Ledger) -> str:
    begin, end = (
        with_error(point["value"], point["se"], signed=False)
        for point in (ledger.curve[0], ledger.curve[-1])
    )
    return f"On fresh responses it went from {begin} to {end}."


def _sentence(note: str) -> str:
    return f"{note[0].upper()}{note[1:]}."
