"""What this E can tell, and what would make it tell more: one table with its words."""

import math
from collections.abc import Mapping
from typing import Any

from entropy_ddp.answers.cells import Row, Table, share, text
from entropy_ddp.answers.words import (
    FIXED,
    UNITS,
    independent_units,
    interval,
    number,
    percent,
    supported,
    supported_percent,
)

Document = Mapping[str, Any]
# The share between prompts is told where its standard error is below this.
KNOWN = 0.15
# A gain in the error that is worth a word.
LITTLE = 0.85


def power(document: Document) -> Table:
    """The interval, the smallest change seen, the size for 20 %, and what would help."""
    truth, found = document["truth"], document["power"]
    low, high = truth["interval"]
    rows: list[Row] = [
        (text("95 % interval of ΔH"), text(interval(low, high))),
        (text("smallest change seen 4 times in 5"), text(_smallest(document))),
        (text(f"prompts for ±20 % of {_name(document)}"), text(_size(document))),
    ]
    if "between_prompts" in found:
        error = found["between_prompts_se"]
        rows.append(
            (
                text("variance between prompts, share"),
                share(found["between_prompts"], error=error),
            )
        )
    return Table(
        title=f"What this E can tell, {UNITS[truth['normalize']]}",
        columns=("quantity", "value"),
        rows=rows,
        caption="\n".join(filter(None, (verdict(document), advice(document)))),
    )


def verdict(document: Document) -> str:
    """Whether the change is told from none."""
    if document["power"]["resolved"]:
        return "Resolved: 0 is outside the interval."
    return "Not resolved: 0 is inside the interval."


def _name(document: Document) -> str:
    """What the size of E is told for."""
    found, before = document["power"], abs(document["truth"]["H_orig"])
    if found["resolved"]:
        return "this change"
    if not before:
        return "a change"
    return f"a change of {percent(found['change'] / before)} of H"


def _smallest(document: Document) -> str:
    """The smallest change, with the digits that the error of an error leaves."""
    truth, change = document["truth"], document["power"]["smallest_change"]
    degrees = truth["effective_degrees_of_freedom"]
    relative, before = 1 / math.sqrt(2 * degrees), abs(truth["H_orig"])
    shown = supported(change, relative * change, 2)
    if not before:
        return shown
    part = change / before
    return f"{shown} ({supported_percent(part, relative * part)} of H)"


def _size(document: Document) -> str:
    """How many prompts, with no more digits than are known of it."""
    found, facts = document["power"], document["E"]
    total = facts.get("num_prompts_total")
    if "responses_for_20_percent" in found:
        responses = f"about {number(found['responses_for_20_percent'], 2)} responses"
        return f"more than all {total:,}, or {responses} to each of them"
    if "groups_for_20_percent" not in found:
        return "no number is enough"
    groups, error = found["groups_for_20_percent"], found["groups_for_20_percent_se"]
    about = f"about {supported(float(groups), error, 2)} (E has {independent_units(facts):,})"
    if total is not None and facts["with_replacement"] is False and groups > total:
        about += f", of {total:,} that there are"
    return about


def advice(document: Document) -> str:
    """Whether more prompts or more responses to each would help."""
    facts, found = document["E"], document["power"]
    total = facts.get("num_prompts_total")
    is_set = facts.get("with_replacement") is False
    between = found.get("between_prompts")
    if between is None:
        if is_set and facts.get("responses_per_prompt") == 1:
            return (
                f"E has one response to each prompt, so its {total:,} prompts count as "
                "drawn from many more: responses_per_prompt: 2 takes the error between "
                "prompts that are in E out."
            )
        return (
            "Two responses or more to every prompt would tell whether more prompts or "
            "more responses help."
        )
    told = []
    if is_set:
        told.append(_of_set(facts))
    if found["between_prompts_se"] > KNOWN:
        told.append("How much lies between prompts is hardly known with this E.")
    elif not is_set or independent_units(facts) < total:
        left = between**0.5
        if left > LITTLE:
            told.append("More prompts help; more responses to each hardly do.")
        else:
            told.append(
                "More prompts help, and more responses to each: to "
                f"{percent(left, 1)} of the error at best."
            )
        best = found.get("best_responses_per_prompt")
        if best is not None:
            verb = (
                "response to each prompt is"
                if best == 1
                else ("responses to each prompt are")
            )
            told.append(
                f"For a number of tokens, about {number(best, 1)}{FIXED}{verb} best."
            )
    return " ".join(told)


def _of_set(facts: Mapping[str, Any]) -> str:
    total, prompts = facts["num_prompts_total"], independent_units(facts)
    if prompts >= total:
        return (
            f"E has all {total:,} prompts: only their responses are left to chance, and "
            "more of them to each prompt make the error smaller."
        )
    return (
        f"E has {prompts:,} of a known set of {total:,} prompts: the others, and the "
        "responses, are left to chance."
    )
