"""The page of one checkpoint: the answer, whether to trust it, and what it rests on."""

import math
from typing import Any

from entropy_ddp.answers import headline, shares, tables
from entropy_ddp.answers.headline import Document
from entropy_ddp.answers.words import (
    FIXED,
    RESOLVED,
    UNITS,
    around,
    count,
    is_resolved,
    linear_error,
    missed_error,
    number,
    percent,
    percent_with_error,
    shown_error,
    supported,
    supported_percent,
    typeset,
    visible,
    with_error,
)
from entropy_ddp.names import short_name
from entropy_ddp.report.figures import attribution, change
from entropy_ddp.report.page import Glance, Page, Section, shown
from entropy_ddp.report.subjects import Subject
from entropy_ddp.report.token_text import read_tokens, token_texts
from entropy_ddp.results.reading import Columns

# Characters on both sides of the strongest token.
CONTEXT = 24


def run_page(subject: Subject) -> Page:
    """The page of one or several runs about the same step.

    Raises:
        InputError: a file of a run directory is absent or damaged.
    """
    document = subject.document
    sections = [_prediction(document)]
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
        glances=glances(document),
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


def glances(document: Document) -> list[Glance]:
    """How sure, whether to trust it, and what did it."""
    answers = [_how_much(document), _how_sure(document), _trust(document)]
    if "attribution" in document:
        answers.append(_what_did_it(document))
    return answers


def _how_much(document: Document) -> Glance:
    truth = document["truth"]
    before, change = truth["H_orig"], truth["delta_h_true"]
    error = shown_error(truth)
    answer = supported(change, error, 3, signed=True)
    if before > 0:
        answer = supported(100 * change / before, 100 * error / before, 2, signed=True)
        answer += f"{FIXED}%"
    pair = with_error(change, error)
    detail = f"{pair} {UNITS[truth['normalize']]}"
    spread = truth.get("H_orig_se")
    if spread is not None:
        bits = with_error(before / math.log(2), spread / math.log(2), signed=False)
        detail += f"; H is {bits} bits before the step"
        if truth["normalize"] == "per_token" and 0 < before < 10:
            choices = supported(math.exp(before), math.exp(before) * spread, 2)
            detail += f". The policy chooses among about {choices} tokens at each step"
    return Glance(question="How much?", answer=answer, detail=detail + ".")


def _how_sure(document: Document) -> Glance:
    truth = document["truth"]
    change, error = truth["delta_h_true"], shown_error(truth)
    groups = count(document["E"]["num_groups"], "prompt draw")
    detail = f"± is one standard error over {groups} of E."
    if error == 0:
        return Glance(question="How sure?", answer="No error", detail=detail)
    errors = abs(change) / error
    answer, tone = f"{number(errors, 2)} standard errors", "good"
    if not headline.stands_out(truth):
        answer, tone = f"Only {number(errors, 2)} standard errors", "doubtful"
        detail += " More responses in E would tell a fall from a rise."
    if document["status"] != "ok":
        tone = ""
        detail += " In an untrusted run that error is not to be trusted either."
    if change and headline.stands_out(truth):
        detail += f" {_missed(document)}"
    return Glance(question="How sure?", answer=answer, detail=detail, tone=tone)


def _missed(document: Document) -> str:
    """What first order misses of the change, by the paired error of the two."""
    truth, linear = document["truth"], document["linear"]
    change = truth["delta_h_true"]
    missed = change - linear["delta_h1"]
    paired = missed_error(document, "linear")
    if missed and abs(missed) > RESOLVED * paired:
        pair = percent_with_error(
            abs(missed / change), paired / abs(change), signed=False
        )
        return f"First order misses {pair} of it: not noise."
    return f"First order agrees with it within {percent(2 * paired / abs(change))}."


def _trust(document: Document) -> Glance:
    rows, ess = document["audit"], document["truth"]["ess_fraction"]
    failed = sum(row["verdict"] == "fail" for row in rows)
    warned = sum(row["verdict"] == "warn" for row in rows)
    detail = f"Effective sample size {percent(ess, 3)} of E."
    checks = count(len(rows), "check")
    if failed or document["status"] != "ok":
        answer, tone = "No", "bad"
        detail = f"{failed} of {checks} failed. " + detail
    elif warned:
        answer, tone = "With reservations", "doubtful"
        detail = f"{warned} of {checks} {'warns' if warned == 1 else 'warn'}. " + detail
    else:
        answer, tone = "Yes", "good"
        detail = f"All {checks} passed. " + detail
    return Glance(question="To be trusted?", answer=answer, detail=detail, tone=tone)


def _what_did_it(document: Document) -> Glance:
    found = document["attribution"]
    named = {
        "Momentum of earlier batches": found["momentum"],
        "Weight decay": found["weight_decay"],
        "The gradient of U": found["gradient"],
    }
    total, error = found["total"], linear_error(document)
    name, value = max(named.items(), key=lambda item: abs(item[1]))
    if not value or not total:
        return Glance(
            question="What did it?", answer="Nothing", detail="Every part of it is 0."
        )
    told = is_resolved(total, error)
    same_sign = told and all(part * total >= 0 for part in named.values())
    answer = (
        f"{name}, {supported_percent(value / total, error / abs(total))}"
        if same_sign
        else name
    )
    gradient = found["gradient"]
    if not gradient:
        detail = "The gradient of U is zero."
        return Glance(question="What did it?", answer=answer, detail=detail)
    own = supported(gradient, error, 3, signed=True)
    if same_sign:
        own = supported_percent(gradient / total, error / abs(total))
    detail = f"U's own gradient makes {own}" if name != "The gradient of U" else ""
    half = f"half of all its movement is in {percent(found['concentration'])} of tokens"
    detail = f"{detail}; {half}" if detail else half[0].upper() + half[1:]
    return Glance(
        question="What did it?",
        answer=answer,
        detail=f"{detail}, on this E. {_strongest(found['top_tokens'])}".strip(),
    )


def _strongest(tokens: list[dict[str, Any]]) -> str:
    if not tokens or "context" not in tokens[0]:
        return ""
    before, token, after = tokens[0]["context"]
    before, after = around(before, after, CONTEXT)
    verb = "lowers" if tokens[0]["share"] < 0 else "raises"
    context = f"{before}[{visible(token)}]{after}"
    line = tokens[0]["index"] + 1
    return f"The strongest token {verb} it: {context}, line{FIXED}{line} of U."


def complaints(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The checks that are not ok in the page's signs, what fails first."""
    return [
        {
            "verdict": row["verdict"],
            "name": row["name"],
            "value": _found(row["value"]),
            "expected": typeset(row["expected"]),
            "hint": row["hint"][:1].upper() + row["hint"][1:],
        }
        for row in headline.complaints(rows)
    ]


def _found(value: Any) -> str:
    if isinstance(value, dict):
        parts = (f"{short_name(name)}: {_found(item)}" for name, item in value.items())
        return "; ".join(parts)
    return shown(tables.found(value))


def _prediction(document: Document) -> Section:
    return Section(
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


def _sweep(subject: Subject) -> Section:
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
    return Section(
        id="sweep",
        title="How far the first order reaches",
        lead=" ".join(headline.sweep_sentences(document)),
        figures=figures,
        tables=(tables.sweep(document),),
    )


def _responses(columns: Columns, document: Document) -> Section:
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
    return Section(id="responses", title="The responses of E", figures=figures)


def _is_varied(columns: Columns, key: str) -> bool:
    """Whether a column holds numbers, not all equal."""
    values = columns.get(key, [])
    return all(isinstance(v, (int, float)) for v in values) and len(set(values)) > 1


def _gradient_dot(document: Document) -> Section:
    dot = document["gradient_dot"]
    lead = ""
    if "frac_var" in dot:
        error = percent(dot["frac_var"] ** 0.5)
        lead = f"Its standard error is {error} of its value."
    return Section(
        id="gradient-dot",
        title="Gradient-dot form",
        lead=lead,
        figures=(change.gradient_dot(document),),
        tables=(tables.gradient_dot(document),),
    )


def _attribution(subject: Subject) -> Section:
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
        shown_tables = [
            shares.table(tokens.by_kind, unit, "the tokens of U", error),
            tables.top_tokens(document),
            tables.proxies(document),
        ]
    return Section(
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
        ),
        later_figures=later if moved else (),
    )


def _everything_else(subject: Subject) -> Section:
    document = subject.document
    folders = [str(run.folder) for run in subject.runs]
    return Section(
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
