"""The answer in words, chosen by the sign and the size of the numbers.

Every function takes what results.json holds.
"""

import math
from dataclasses import dataclass
from typing import Any

from entropy_ddp.answers.shares import (
    is_reliable,
    not_reliable,
    part_error,
    part_is_resolved,
)
from entropy_ddp.answers.words import (
    FIXED,
    LOSSES,
    UNITS,
    around,
    count,
    entropy_error,
    error_of,
    excludes_zero,
    independent_units,
    interval,
    is_missed,
    is_resolved,
    linear_error,
    listed,
    missed,
    number,
    percent,
    percent_with_error,
    quantile_of,
    shown_error,
    supported,
    supported_percent,
    visible,
    with_error,
)
from entropy_ddp.results.schema import FEW_DEGREES, LARGE_SHARE

Document = dict[str, Any]
# `truth.ess_warn` where nothing else is set.
DEFAULT_ESS_WARN = 0.5
# Below so many groups no interval for the entropy itself holds where tails are heavy.
FEW_GROUPS = 256
# Characters on both sides of the strongest token.
CONTEXT = 24
VERDICTS = ("ok", "warn", "fail")


def subject_of(update: dict[str, Any]) -> str:
    """What the change is of."""
    if update.get("delta") is not None:
        return "The given change of the parameters"
    return f"One {LOSSES.get(update['loss'], update['loss'])} step"


def stands_out(truth: dict[str, Any]) -> bool:
    """Whether the measured change stands out of its error."""
    if "interval" in truth:
        return excludes_zero(truth["interval"])
    return is_resolved(truth["delta_h_true"], shown_error(truth))


def is_made_by_few(truth: dict[str, Any]) -> bool:
    """Whether so few responses make the error of the change that it is hardly known."""
    return bool(
        truth.get("effective_degrees_of_freedom", FEW_DEGREES) < FEW_DEGREES
        or truth.get("largest_share", 0.0) > LARGE_SHARE
    )


def doubt_of_entropy(document: Document) -> str:
    """Why the error of the entropy itself is not to be relied on; empty if it is."""
    groups = document["E"]["num_groups"]
    if groups >= FEW_GROUPS or not is_made_by_few(document["truth"]):
        return ""
    return (
        f"The error of H itself is likely too small: E has {groups} groups, and few "
        f"responses make its errors. Below {FEW_GROUPS} groups no interval for H holds then."
    )


def interval_of_change(document: Document) -> str:
    """The 95 % interval of the measured change; empty if the run did not record one."""
    truth = document["truth"]
    if "interval" not in truth:
        return ""
    unit = UNITS[truth["normalize"]]
    return f"95{FIXED}% interval: {interval(*truth['interval'])} {unit}."


def sign(document: Document) -> str:
    """`cold` for a fall, `warm` for a rise, empty for what may be neither."""
    truth = document["truth"]
    if not stands_out(truth) or document["status"] != "ok":
        return ""
    return "cold" if truth["delta_h_true"] < 0 else "warm"


def headline(document: Document) -> tuple[str, str, str]:
    """The answer in one sentence: before the value, the value, after it."""
    truth, subject = document["truth"], subject_of(document["update"])
    change, error = truth["delta_h_true"], shown_error(truth)
    unit = UNITS[truth["normalize"]]
    if change == 0 and truth["se"] == 0:
        return f"{subject} leaves the entropy ", "as it is", "."
    if not stands_out(truth):
        value = with_error(change, error)
        after = f" {unit}: too little to tell from zero."
        return f"{subject} changes the entropy by ", value, after
    verb = "lowers" if change < 0 else "raises"
    value = with_error(abs(change), error, signed=False)
    return f"{subject} {verb} the entropy by ", value, f" {unit}."


def answer(document: Document) -> str:
    """The answer in one sentence, and its interval in another."""
    return f"{''.join(headline(document))} {interval_of_change(document)}".rstrip()


def lead(document: Document) -> str:
    """The same in percent of the entropy, and what was predicted."""
    truth, linear = document["truth"], document["linear"]
    before, change = truth["H_orig"], truth["delta_h_true"]
    predicted = with_error(linear["delta_h1"], linear_error(document))
    sentences = []
    if before > 0:
        share, error = change / before, shown_error(truth) / before
        error = math.hypot(error, share * (entropy_error(truth) or 0.0) / before)
        if stands_out(truth):
            verb = "falls" if change < 0 else "rises"
            pair = percent_with_error(abs(share), error, signed=False)
            sentences.append(f"It {verb} by {pair} of itself{_entropy(truth)}.")
        else:
            pair = percent_with_error(share, error)
            sentences.append(f"That is {pair} of it{_entropy(truth)}.")
    sentences += [
        interval_of_change(document),
        f"First order predicts {predicted}.",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _entropy(truth: dict[str, Any]) -> str:
    """H with its error; of a run that did not record one, nothing."""
    error = entropy_error(truth)
    if error is None:
        return ""
    return f", {with_error(truth['H_orig'], error, signed=False)} before"


def second_order(document: Document) -> str:
    """What the curvature adds, and whether it leaves something to explain."""
    curvature = document.get("curvature", {})
    if "difference_se" not in curvature:
        return ""
    second = with_error(curvature["delta_h2"], error_of(curvature, "delta_h2_se"))
    missed_by, error = missed(document, "curvature")
    begin = f"With the curvature of the step the prediction is {second}, and it misses"
    if is_missed(document, "curvature"):
        return f"{begin} the truth by {with_error(missed_by, error)}."
    return f"{begin} nothing beyond the error of the difference, {number(error, 2)}."


def is_trusted(point: dict[str, Any]) -> bool:
    """Whether a step of a sweep has enough effective responses to speak of."""
    # What a version did not write that had no such key is judged by the default.
    return bool(point.get("trusted", point["ess_fraction"] >= DEFAULT_ESS_WARN))


def reach(document: Document) -> tuple[str, str]:
    """Up to which step size first order is seen to hold, or why that is not known.

    Returns:
        The sentence, and what of it stands above a figure.
    """
    summary = document["sweep_summary"]
    points = [p for p in document["sweep"] if p["eta"] > 0 and is_trusted(p)]
    floor = summary["noise_floor"]
    quantile = quantile_of(document)
    told = [
        p
        for p in points
        if is_resolved(p["delta_h_true"], math.hypot(error_of(p), floor), quantile)
    ]
    agreement = summary.get("agreement")
    # What another version let reach into points that are not trusted ends before them.
    inside = [p for p in told if agreement and p["eta"] <= agreement[1]]
    if inside:
        last = max(inside, key=lambda p: p["eta"])
        error = quantile * math.hypot(error_of(last), floor)
        low, high = min(p["eta"] for p in inside), last["eta"]
        return (
            f"First order is within the truth's own 95{FIXED}% interval from "
            f"{number(low, 3)} to {number(high, 3)}, where that is "
            f"±{percent(error / abs(last['delta_h_true']), 1)} of it"
        ), f"First order is within the truth's own error up to {number(high, 2)}"
    why = "First order and truth agree at no step size of the sweep"
    if not points:
        why = "No step size of the sweep has enough effective responses to be trusted"
    elif not told:
        why = "No measured change of the sweep stands out of its error"
    return why, why


def sweep_sentences(document: Document) -> list[str]:
    """What a sweep says, of the points that are trusted."""
    summary, curvature = document["sweep_summary"], document.get("curvature", {})
    told = [f"{reach(document)[0]}.", *off_by_sentences(document)]
    left = [p["eta"] for p in document["sweep"] if not is_trusted(p)]
    if left:
        told.append(
            f"{count(len(left), 'step size')} (from {number(min(map(abs, left)), 3)} on) "
            "with too few effective responses: marked, and outside every statement."
        )
    if "exponent_se" in summary:
        power = with_error(summary["exponent"], summary["exponent_se"], signed=False)
        told.append(
            f"The measured change grows as the learning rate to the power {power}; 1 is "
            "what first order says."
        )
    if "eta_star_se" in curvature or "eta_star_interval" in curvature:
        told.append(edge(curvature))
    told.append(
        f"Changes below {number(summary['noise_floor'], 2)} are rounding noise."
    )
    for pair in summary.get("odd", [])[-1:]:
        if "se" in pair:
            half = with_error(pair["delta_h"], error_of(pair))
            told.append(
                "Steps to both sides were measured; half their difference at "
                f"{number(pair['eta'], 3)} is {half}."
            )
    return told


def off_by_sentences(document: Document) -> list[str]:
    """Up to which step size first order is off by less than some shares of the truth."""
    known, unknown = [], []
    for row in document["sweep_summary"].get("reach", []):
        share = f"{number(100 * row['off_by'])}{FIXED}%"
        if row["interval"] == [None, None]:
            unknown.append(share)
        else:
            known.append(f"by less than {share} {_up_to(row)}")
    told = []
    if known:
        told.append(
            f"First order is off {'; '.join(known)}. Brackets: 95{FIXED}% intervals."
        )
    if unknown:
        told.append(
            f"Where first order is off by less than {listed(unknown)} is not resolved "
            "with this E."
        )
    return told


def _up_to(row: dict[str, Any]) -> str:
    """A step size with its interval, or the bound that is known."""
    low, high = row["interval"]
    if high is None:
        return f"up to at least η{FIXED}={FIXED}{number(low, 2)}"
    if low is None:
        return f"below η{FIXED}={FIXED}{number(high, 2)} at most"
    eta = row["eta"] if row["eta"] is not None else (low + high) / 2
    ends = interval(low, high, signed=False)
    return f"up to η{FIXED}={FIXED}{number(eta, 2)} ({ends})"


def edge(curvature: dict[str, Any]) -> str:
    """eta*, where the curvature is known well enough to tell it, or what is known."""
    unresolved = (
        "The edge of the linear regime, η*, is not resolved: the curvature is not."
    )
    if "eta_star_interval" in curvature:
        low, high = curvature["eta_star_interval"]
        if high is not None:
            eta = number(curvature["eta_star"], 2)
            ends = interval(low, high, signed=False)
            return (
                f"The second order equals the first at η*{FIXED}={FIXED}{eta}, the edge of the linear "
                f"regime (95{FIXED}% interval {ends})."
            )
        if not low:
            return unresolved
        return (
            "The edge of the linear regime, η*, where the second order equals the first, "
            f"is at least {number(low, 2)}: the curvature is not resolved."
        )
    second, error = curvature["second_derivative"], curvature["se"]
    if not is_resolved(second, error):
        return unresolved
    eta = with_error(curvature["eta_star"], curvature["eta_star_se"], signed=False)
    return f"The second order equals the first at η*{FIXED}={FIXED}{eta}, the edge of the linear regime."


@dataclass(frozen=True, kw_only=True)
class Glance:
    """One of the questions that the top of the page answers.

    Attributes:
        answer: in a few words.
        detail: what the answer rests on.
        tone: good, bad, doubtful or empty.
    """

    question: str
    answer: str
    detail: str
    tone: str = ""


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
    spread = entropy_error(truth)
    if spread is not None:
        bits = with_error(before / math.log(2), spread / math.log(2), signed=False)
        detail += f"; H is {bits} bits before the step"
        if truth["normalize"] == "per_token" and 0 < before < 10:
            choices = supported(math.exp(before), math.exp(before) * spread, 2)
            detail += f". The policy chooses among about {choices} tokens at each step"
    doubt = doubt_of_entropy(document)
    return Glance(
        question="How much?", answer=answer, detail=f"{detail}. {doubt}".strip()
    )


def _how_sure(document: Document) -> Glance:
    truth = document["truth"]
    change, error = truth["delta_h_true"], shown_error(truth)
    groups = count(independent_units(document["E"]), "prompt draw")
    detail = f"± is one standard error over {groups} of E."
    if "interval" in truth:
        detail += f" 95{FIXED}% interval: {interval(*truth['interval'])}."
    if error == 0:
        return Glance(question="How sure?", answer="No error", detail=detail)
    errors = abs(change) / error
    answer, tone = f"{number(errors, 2)} standard errors", "good"
    if not stands_out(truth):
        answer, tone = f"Only {number(errors, 2)} standard errors", "doubtful"
        detail += " More responses in E would tell a fall from a rise."
    if document["status"] != "ok":
        tone = ""
        detail += " In an untrusted run that error is not to be trusted either."
    if change and stands_out(truth):
        detail += f" {_missed(document)}"
    return Glance(question="How sure?", answer=answer, detail=detail, tone=tone)


def _missed(document: Document) -> str:
    """What first order misses of the change, by the paired error of the two."""
    change = document["truth"]["delta_h_true"]
    missed_by, paired = missed(document, "linear")
    if missed_by and is_missed(document, "linear"):
        pair = percent_with_error(
            abs(missed_by / change), paired / abs(change), signed=False
        )
        return f"First order misses {pair} of it: not noise."
    within = quantile_of(document) * paired / abs(change)
    return f"First order agrees with it within {percent(within)}."


def _trust(document: Document) -> Glance:
    rows, truth = document["audit"], document["truth"]
    failed = sum(row["verdict"] == "fail" for row in rows)
    warned = sum(row["verdict"] == "warn" for row in rows)
    detail = (
        f"Effective sample size {percent(truth['ess_fraction'], 3)} of E: "
        f"{truth['ess']:,.0f} responses."
    )
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
    keys = {
        "Momentum of earlier batches": "momentum",
        "Weight decay": "weight_decay",
        "The gradient of U": "gradient",
    }
    named = {name: found[key] for name, key in keys.items()}
    total, error = found["total"], linear_error(document)
    name, value = max(named.items(), key=lambda item: abs(item[1]))
    if not value or not total:
        return Glance(
            question="What did it?", answer="Nothing", detail="Every part of it is 0."
        )
    own_error = part_error(document, keys[name])
    if own_error is not None and not part_is_resolved(document, keys[name]):
        largest = name[0].lower() + name[1:]
        return Glance(
            question="What did it?",
            answer="Too few responses in E to tell",
            detail=f"The largest part, {largest}, is {with_error(value, own_error)}.",
            tone="doubtful",
        )
    told = is_resolved(total, error, quantile_of(document))
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
    spread = part_error(document, "gradient")
    if spread is not None and not part_is_resolved(document, "gradient"):
        own = f"{with_error(gradient, spread)}, too little to tell from zero"
    detail = f"U's own gradient makes {own}" if name != "The gradient of U" else ""
    half = f"half of all its movement is in {percent(found['concentration'])} of tokens"
    detail = f"{detail}; {half}" if detail else half[0].upper() + half[1:]
    strongest = _strongest(found["top_tokens"])
    if not is_reliable(document):
        strongest = f"Which tokens did most is {not_reliable(document)}."
    return Glance(
        question="What did it?",
        answer=answer,
        detail=f"{detail}, on this E. {strongest}".strip(),
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


def complaints(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The checks that are not ok: what fails before what only warns."""
    found = [row for row in rows if row["verdict"] != "ok"]
    return sorted(found, key=lambda row: row["verdict"])


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


def verdict_counts(document: Document) -> str:
    """How many checks have each verdict."""
    verdicts = [row["verdict"] for row in document["audit"]]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS)


def described(document: Document) -> dict[str, str]:
    """What was probed, and on which machine, by name."""
    run = document["run"]
    lines: dict[str, str] = {}
    for split in ("E", "U"):
        if split in document:
            batch = document[split]
            lines[split] = (
                f"{batch['num_sequences']:,} sequences in {batch['num_groups']:,} "
                f"groups, {batch['num_tokens']:,} response tokens"
            )
    if "delta" in document["update"]:
        lines["in place of a step"] = document["update"]["delta"]
    ranks = count(run["world_size"], "rank")
    machine = f"{ranks} on {run['device']}, {run['dtype']}, seed {run['seed']}"
    lines["computed by"] = machine
    if "memory" in run:
        used, estimate = (
            f"{run['memory'][name] / 1e9:.2f} GB"
            for name in ("peak_bytes", "estimated_bytes")
        )
        lines["memory"] = f"{used} a rank at the peak ({estimate} estimated)"
    if run.get("out_of_memory_retries"):
        fitted = f"{run['tokens_per_microbatch']:,} tokens"
        lines["memory ran out"] = f"at most {fitted} in a microbatch"
    if run.get("resumed"):
        lines["resumed, from before"] = ", ".join(run["resumed"])
    return lines
