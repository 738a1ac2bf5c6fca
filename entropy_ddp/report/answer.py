"""The answer in words, chosen by the sign and the size of the numbers."""

import math
from typing import Any

from entropy_ddp.names import short_name
from entropy_ddp.report import words
from entropy_ddp.report.subjects import Subject
from entropy_ddp.report.view import Complaint, Glance
from entropy_ddp.report.words import (
    FIXED,
    LOSSES,
    RESOLVED,
    UNITS,
    around,
    count,
    exact,
    number,
    percent,
    percent_with_error,
    true_minus,
    typeset,
    visible,
    with_error,
)

Document = dict[str, Any]
# Characters on both sides of the strongest token.
CONTEXT = 24


def subject_of(update: dict[str, Any]) -> str:
    """What the change is of."""
    if update.get("delta") is not None:
        return "The given change of the parameters"
    return f"One {LOSSES.get(update['loss'], update['loss'])} step"


def is_resolved(truth: dict[str, Any]) -> bool:
    """Whether the measured change stands out of its error."""
    return words.is_resolved(truth["delta_h_true"], truth["se"])


def sign(document: Document) -> str:
    """`cold` for a fall, `warm` for a rise, empty for what may be neither."""
    truth = document["truth"]
    if not is_resolved(truth) or document["status"] != "ok":
        return ""
    return "cold" if truth["delta_h_true"] < 0 else "warm"


def headline(document: Document) -> tuple[str, str, str]:
    """The answer in one sentence: before the value, the value, after it."""
    truth, subject = document["truth"], subject_of(document["update"])
    change, error, unit = truth["delta_h_true"], truth["se"], UNITS[truth["normalize"]]
    if change == 0 and error == 0:
        return f"{subject} leaves the entropy ", "as it is", "."
    if not is_resolved(truth):
        value = with_error(change, error)
        after = f" {unit}: too little to tell from zero."
        return f"{subject} changes the entropy by ", value, after
    verb = "lowers" if change < 0 else "raises"
    value = with_error(abs(change), error, signed=False)
    return f"{subject} {verb} the entropy by ", value, f" {unit}."


def lead(document: Document) -> str:
    """The same in percent of the entropy, and what was predicted."""
    truth, linear = document["truth"], document["linear"]
    before, after, change = truth["H_orig"], truth["H_upd"], truth["delta_h_true"]
    eta = document["update"]["learning_rate_used"]
    predicted = with_error(linear["delta_h1"], abs(eta) * linear["se"])
    sentences = []
    if before > 0:
        one_in = f"{number(before)} to {number(after)}"
        share, error = change / before, truth["se"] / before
        if is_resolved(truth):
            verb = "falls" if change < 0 else "rises"
            pair = percent_with_error(abs(share), error, signed=False)
            sentences.append(f"It {verb} by {pair} of itself, from {one_in}.")
        else:
            pair = percent_with_error(share, error)
            sentences.append(f"That is {pair} of it ({one_in}).")
    sentences.append(f"First order predicts {predicted}.")
    return " ".join(sentences)


def glances(subject: Subject) -> list[Glance]:
    """How sure, whether to trust it, and what did it."""
    document = subject.document
    answers = [_how_much(document), _how_sure(document), _trust(document)]
    if "attribution" in document:
        answers.append(_what_did_it(document))
    return answers


def _how_much(document: Document) -> Glance:
    truth = document["truth"]
    before, after, change = truth["H_orig"], truth["H_upd"], truth["delta_h_true"]
    answer = number(change, 3, signed=True)
    if before > 0:
        answer = percent(change / before, signed=True)
    detail = f"{number(change, 3, signed=True)} {UNITS[truth['normalize']]}"
    bits = before / math.log(2), after / math.log(2)
    detail += f"; in bits, from {number(bits[0])} to {number(bits[1])}"
    if truth["normalize"] == "per_token" and 0 < before < 10:
        choices = number(math.exp(before), 2)
        detail += f". The policy chooses among about {choices} tokens at each step"
    return Glance(question="How much?", answer=answer, detail=detail + ".")


def _how_sure(document: Document) -> Glance:
    truth, linear = document["truth"], document["linear"]
    change, error = truth["delta_h_true"], truth["se"]
    groups = count(document["E"]["num_groups"], "prompt draw")
    detail = f"± is one standard error over {groups} of E."
    if error == 0:
        return Glance(question="How sure?", answer="No error", detail=detail)
    errors = abs(change) / error
    answer, tone = f"{number(errors, 2)} standard errors", "good"
    if not is_resolved(truth):
        answer, tone = f"Only {number(errors, 2)} standard errors", "doubtful"
        detail += " More responses in E would tell a fall from a rise."
    if document["status"] != "ok":
        tone = ""
        detail += " In an untrusted run that error is not to be trusted either."
    missed = change - linear["delta_h1"]
    if change and is_resolved(truth):
        detail += f" First order misses {percent(abs(missed / change))} of it"
        paired = linear["difference_se"]
        if paired and abs(missed) > RESOLVED * paired:
            errors_missed = number(abs(missed) / paired, 2)
            detail += f", {errors_missed} standard errors of the difference: not noise"
        detail += "."
    return Glance(question="How sure?", answer=answer, detail=detail, tone=tone)


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
    total = found["total"]
    name, value = max(named.items(), key=lambda item: abs(item[1]))
    if not value or not total:
        return Glance(
            question="What did it?", answer="Nothing", detail="Every part of it is 0."
        )
    same_sign = all(part * total >= 0 for part in named.values())
    answer = f"{name}, {percent(value / total)}" if same_sign else name
    gradient = found["gradient"]
    if not gradient:
        detail = "The gradient of U is zero."
        return Glance(question="What did it?", answer=answer, detail=detail)
    own = percent(gradient / total) if same_sign else number(gradient, 3, signed=True)
    detail = f"U's own gradient makes {own}" if name != "The gradient of U" else ""
    half = f"half of all its movement is in {percent(found['concentration'])} of tokens"
    detail = f"{detail}; {half}" if detail else half[0].upper() + half[1:]
    return Glance(
        question="What did it?",
        answer=answer,
        detail=f"{detail}. {_strongest(found['top_tokens'])}".strip(),
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


def complaints(rows: list[dict[str, Any]]) -> list[Complaint]:
    """The checks that are not ok: what fails before what only warns."""
    found = [row for row in rows if row["verdict"] != "ok"]
    return [
        Complaint(
            verdict=row["verdict"],
            name=row["name"],
            value=as_text(row["value"]),
            expected=typeset(row["expected"]),
            hint=row["hint"][:1].upper() + row["hint"][1:],
        )
        for row in sorted(found, key=lambda row: row["verdict"])
    ]


def as_text(value: Any) -> str:
    """What a check found, in few words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, dict):
        parts = (f"{short_name(name)}: {as_text(item)}" for name, item in value.items())
        return "; ".join(parts)
    return true_minus(exact(value)) if _is_number(value) else str(value)


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return True


def alarm(document: Document) -> str:
    """Why nothing may be trusted; empty if it may."""
    if document["status"] == "ok":
        return ""
    failed = [row["name"] for row in document["audit"] if row["verdict"] == "fail"]
    reason = f" Failed: {', '.join(failed)}." if failed else ""
    return f"This run is {document['status']}: do not use its numbers.{reason}"


def checked(rows: list[dict[str, Any]]) -> str:
    """One line about all checks."""
    verdicts = [row["verdict"] for row in rows]
    bad = [(verdicts.count(v), w) for v, w in (("fail", "failed"), ("warn", "warned"))]
    told = [f"{found} {word}" for found, word in bad if found]
    if not told:
        return f"All {count(len(rows), 'check')} passed."
    return f"{' and '.join(told)} of {count(len(rows), 'check')}."
