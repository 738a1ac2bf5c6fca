"""The page of one checkpoint: the answer, whether to trust it, and what it rests on."""

from entropy_ddp.answers import headline, holding, shares, tables
from entropy_ddp.answers.headline import Document
from entropy_ddp.answers.power import power
from entropy_ddp.answers.words import (
    UNITS,
    linear_error,
    number,
    percent,
)
from entropy_ddp.report.figures import attribution, change
from entropy_ddp.report.page import Page, PageSection, complaints
from entropy_ddp.report.subjects import Subject
from entropy_ddp.report.token_text import read_tokens, token_texts
from entropy_ddp.results.reading import Columns


def run_page(subject: Subject) -> Page:
    """The page of one or several runs about the same step.

    Raises:
        InputError: a file of a run directory is absent or damaged.
    """
    document = subject.document
    sections = [_prediction(document)]
    if "power" in document:
        sections.append(_power(document))
    if "sweep" in document:
        sections.append(_sweep(subject))
    columns = subject.main.columns("E")
    if columns:
        sections.append(_responses(columns, document))
    if "gradient_dot" in document:
        sections.append(_gradient_dot(document))
    if "attribution" in document:
        sections.append(_attribution(subject))
    sections.append(_everything_else(subject))
    name = subject.main.folder.resolve().name
    return Page(
        title=f"Entropy change: {name}",
        kicker=_kicker(subject),
        alarm=headline.alarm(document),
        headline=headline.headline(document),
        sign=headline.sign(document),
        lead=headline.lead(document),
        glances=headline.glances(document),
        complaints=complaints(document["audit"]),
        checked=headline.checked(document["audit"]),
        audits_id=tables.AUDITS_ID,
        sections=sections,
    )


def _kicker(subject: Subject) -> str:
    config, started = subject.main.config, subject.document["run"]["started"]
    place = (
        config.checkpoint.path or config.checkpoint.adapter or config.checkpoint.base
    )
    commands = " + ".join(run.command for run in subject.runs)
    return f"{place} · {commands} · {started[:10]}"


def _prediction(document: Document) -> PageSection:
    return PageSection(
        id="prediction",
        title="Prediction against truth",
        figures=(
            change.prediction_against_truth(document),
            change.all_estimators(document),
        ),
        tables=(
            tables.measured(document),
            tables.estimators(document),
            tables.step(document),
        ),
    )


def _power(document: Document) -> PageSection:
    return PageSection(
        id="power", title="Is this E large enough?", tables=(power(document),)
    )


def _sweep(subject: Subject) -> PageSection:
    document = subject.document
    run = subject.run_with("sweep")
    assert run is not None
    truth = run.config.truth
    figures = [change.sweep_change(document)]
    if any(
        point["delta_h1"] for point in document["sweep"] if headline.is_trusted(point)
    ):
        figures.append(change.sweep_missed(document))
    figures.append(change.sweep_weights(document, truth.ess_warn, truth.ess_abort))
    return PageSection(
        id="sweep",
        title="How far the first order reaches",
        lead=" ".join(headline.sweep_sentences(document)),
        figures=figures,
        tables=(tables.sweep(document),),
    )


def _responses(columns: Columns, document: Document) -> PageSection:
    normalize = document["truth"]["normalize"]
    keys = [
        key
        for key in ("num_tokens", "reward", "log_weight")
        if _is_varied(columns, key)
    ]
    figures = [
        change.contributions(columns, normalize),
        *(change.against(columns, normalize, key) for key in keys),
        change.weights(columns, document["truth"]),
    ]
    return PageSection(id="responses", title="The responses of E", figures=figures)


def _is_varied(columns: Columns, key: str) -> bool:
    """Whether a column holds numbers, not all equal."""
    values = columns.get(key, [])
    return all(isinstance(v, (int, float)) for v in values) and len(set(values)) > 1


def _gradient_dot(document: Document) -> PageSection:
    dot = document["gradient_dot"]
    lead = ""
    if "frac_var" in dot:
        error = percent(dot["frac_var"] ** 0.5)
        lead = f"Its standard error is {error} of its value."
    return PageSection(
        id="gradient-dot",
        title="Gradient-dot form",
        lead=lead,
        figures=(change.gradient_dot(document),),
        tables=(tables.gradient_dot(document),),
    )


def _attribution(subject: Subject) -> PageSection:
    document, run = subject.document, subject.run_with("attribution")
    assert run is not None
    normalize = document["linear"]["normalize"]
    found, tokens, update = document["attribution"], read_tokens(run), run.columns("U")
    later = [
        attribution.shares_against(tokens.values, "logp", normalize),
        attribution.shares_against(tokens.values, "covariance", normalize),
    ]
    if _is_varied(update, "reward"):
        later.append(attribution.shares_by_reward(update, normalize))
    later.append(attribution.kinds(document))
    if found["what_if"]:
        later.append(attribution.what_if(document))
    gap = number(found["attribution_gap"], 2)
    moved = any(tokens.moved.values())
    lead = (
        f"Half of all movement by U's gradient is in {percent(found['concentration'])} "
        f"of its tokens. Shares are exact: they add up to first order with a gap of {gap} "
        "of its largest term."
        if moved
        else "No token of U has a share: its gradient is zero."
    )
    shown_tables = []
    if moved:
        unit, error = UNITS[normalize], linear_error(document)
        lead = f"{lead} {shares.sentence(tokens.by_kind, unit, error)}"
        reliability = shares.reliability_sentence(document)
        lead += f" {reliability}" if reliability else ""
        shown_tables = [
            shares.table(
                tokens.by_kind,
                unit,
                "the tokens of U",
                error,
                shares.errors_of_kinds(document),
            ),
            tables.top_tokens(document),
            tables.proxies(document),
        ]
    return PageSection(
        id="attribution",
        title="Who moved the entropy",
        lead=lead,
        figures=(attribution.parts(document),),
        token_texts=token_texts(run, tokens, update) if moved else None,
        tables=(
            *shown_tables,
            tables.parts(document),
            tables.kinds_of_tokens(document),
            tables.what_if(document),
            *holding.tables(document),
        ),
        later_figures=later if moved else (),
    )


def _everything_else(subject: Subject) -> PageSection:
    document = subject.document
    folders = [str(run.folder) for run in subject.runs]
    return PageSection(
        id="run",
        title="This run",
        tables=(
            tables.facts(document, folders),
            tables.audits(document),
            tables.parameters(document),
            tables.costs(document),
        ),
        listings=[
            (f"Configuration of {run.folder.name}", run.config_text)
            for run in subject.runs
        ],
    )
