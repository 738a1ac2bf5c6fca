"""How large E must be for a wanted precision, told by a run that was made before.

A pilot run says what E's error was, how large the change is, and how much of the error
comes from which prompts were drawn (`estimators/power`). A change of which the 95 %
interval is to be no wider than a share of it to either side needs an E of a size that
follows.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_ddp.answers.words import independent_units
from entropy_ddp.config import Config, Sample
from entropy_ddp.errors import InputError
from entropy_ddp.estimators.power import Precision
from entropy_ddp.results.reading import StoredRun, read_run
from entropy_ddp.sampling.prompts import describe_source, iterate_rows

FEWEST = 2


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What E is planned for.

    Attributes:
        share: half width of the 95 % interval over the change, in (0, 1).
        pilot: folder of the run that tells the errors.
        resolve: plan for a change of this share of the entropy, in place of the one that
            the pilot measured; None for that one.
    """

    share: float
    pilot: Path
    resolve: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The size of E that was asked for.

    Attributes:
        groups: number of prompt draws.
        groups_error: standard error of that number, which the pilot's errors tell.
        responses: responses of each.
        change: what is to be resolved, in nats.
        half_width: half of its 95 % interval, in nats.
        sequences_ratio: responses over those of the pilot's E.
        seconds: what the pilot's passes over E took, sampling too if it sampled E.
    """

    groups: int
    groups_error: float
    responses: float
    change: float
    half_width: float
    sequences_ratio: float
    seconds: float


def plan_evaluation(config: Config, wanted: Wanted) -> Plan:
    """The size that E must have.

    Args:
        config: where E is to be sampled, its prompts are a known set if they are drawn
            without replacement and with several responses to each; an E that is a file
            is planned for as many responses to each prompt as the pilot's.

    Raises:
        InputError: the pilot is no run of this version, measured another entropy, has
            not resolved the change that E is planned for, or does not tell of the
            responses to a prompt; or the prompts do not suffice.
    """
    pilot = read_run(wanted.pilot)
    _require_same_entropy(config, pilot)
    known = _precision(pilot)
    change, change_error = _change(pilot, known, wanted)
    half_width = wanted.share * change
    sample = config.batches.E.sample
    responses = known.responses
    set_size = available = None
    if sample is not None:
        responses = float(sample.responses_per_prompt)
        _require_told(known, responses, wanted.pilot)
        if not sample.with_replacement:
            available = sum(1 for _ in iterate_rows(sample.prompts))
            has_spread = responses >= FEWEST and known.between is not None
            set_size = available if has_spread else None
    groups = known.units_needed(half_width, responses=responses, set_size=set_size)
    if sample is not None and (
        groups is None or (available is not None and groups > available)
    ):
        raise _too_few(sample, wanted, known, groups, available, half_width)
    assert groups is not None
    other = known.of(groups, responses=responses, set_size=set_size)
    return Plan(
        groups=groups,
        groups_error=other.error_of_units_needed(
            groups, change_error, _degrees(pilot, known), set_size
        ),
        responses=responses,
        change=change,
        half_width=half_width,
        sequences_ratio=groups * responses / pilot.document["E"]["num_sequences"],
        seconds=_seconds_on_evaluation(pilot),
    )


def with_planned_evaluation(config: Config, wanted: Wanted | None) -> Config:
    """The configuration with as many prompt draws for E as its plan says.

    Raises:
        InputError: as of `plan_evaluation`, or E is not to be sampled.
    """
    if wanted is None:
        return config
    if config.batches.E.sample is None:
        raise InputError(
            "--for: expected a `sample` section in batches.E, whose size is planned, "
            "found a file; `check` says how many groups it would need"
        )
    groups = plan_evaluation(config, wanted).groups
    sample = config.batches.E.sample.model_copy(update={"num_prompts": groups})
    source = config.batches.E.model_copy(update={"sample": sample})
    batches = config.batches.model_copy(update={"E": source})
    return config.model_copy(update={"batches": batches})


def _require_same_entropy(config: Config, pilot: StoredRun) -> None:
    for name in ("normalize", "integrand", "temperature"):
        ours, theirs = (getattr(c.objective, name) for c in (config, pilot.config))
        if ours != theirs:
            raise InputError(
                f"--pilot {pilot.folder}: expected a run with objective.{name} {ours}, "
                f"as the configuration has, found {theirs}; give one with the same entropy"
            )


def _precision(pilot: StoredRun) -> Precision:
    """The error of the pilot's measured change."""
    document = pilot.document
    facts, truth, power = document["E"], document["truth"], document.get("power")
    if power is None or "se_jackknife" not in truth:
        raise InputError(
            f"--pilot {pilot.folder}: expected results with `power`, which this version "
            "writes, found none; run the probe again"
        )
    total, between = facts.get("num_prompts_total"), power.get("between_prompts")
    units = independent_units(facts)
    is_drawn_once = facts.get("with_replacement") is False
    return Precision(
        se=math.hypot(truth["se_jackknife"], truth.get("noise_floor") or 0.0),
        num_units=units,
        responses=facts["num_sequences"] / units,
        between=between,
        set_size=total if is_drawn_once and between is not None else None,
    )


def _degrees(pilot: StoredRun, known: Precision) -> float:
    told = pilot.document["truth"].get("effective_degrees_of_freedom")
    return float(told or known.num_units - 1)


def _change(pilot: StoredRun, known: Precision, wanted: Wanted) -> tuple[float, float]:
    """The size of the change that E is planned for, and its relative error."""
    truth = pilot.document["truth"]
    if wanted.resolve is not None:
        change = wanted.resolve * abs(truth["H_orig"])
        if not change:
            raise InputError(
                f"--pilot {pilot.folder}: expected an entropy of which --resolve is a "
                "share, found 0; leave --resolve out"
            )
        return change, 0.0
    change = abs(truth["delta_h_true"])
    if not pilot.document["power"]["resolved"]:
        low, high = truth["interval"]
        raise InputError(
            f"--pilot {pilot.folder}: expected a measured change to plan for, found one "
            f"that is not resolved (95 % interval {low:.2g} to {high:.2g}); name a change "
            "by --resolve 0.01, as a share of the entropy"
        )
    return change, known.se / change


def _require_told(known: Precision, responses: float, pilot: Path) -> None:
    if known.between is None and responses != known.responses:
        raise InputError(
            f"--pilot {pilot}: expected a pilot with two responses or more to each prompt, "
            f"as batches.E.sample.responses_per_prompt is {responses:g}, found "
            f"{known.responses:g}, which tells nothing of others; set it to that, or make "
            "such a pilot"
        )


def _too_few(
    sample: Sample,
    wanted: Wanted,
    known: Precision,
    groups: int | None,
    available: int | None,
    half_width: float,
) -> InputError:
    source = describe_source(sample.prompts)
    need = "more" if groups is None else f"about {groups:,}"
    advice = "set with_replacement: true, or give more prompts"
    if available is not None and known.between is not None:
        responses = known.responses_needed(half_width, available)
        advice = f"set responses_per_prompt: {responses} with all of them, or {advice}"
    elif available is not None:
        advice += (
            "; a pilot with responses_per_prompt: 2 takes the error between prompts out"
        )
    found = "no number that suffices" if available is None else f"{available:,}"
    return InputError(
        f"--for {100 * wanted.share:g}%: expected {need} prompts in {source}, found "
        f"{found}; {advice}"
    )


def _seconds_on_evaluation(pilot: StoredRun) -> float:
    seconds = pilot.document["run"]["seconds"]
    return sum(took for name, took in seconds.items() if re.search(r"\bE\b", name))


def described_plan(plan: Plan) -> dict[str, Any]:
    """The plan, by what a reader calls it; estimates with two digits."""

    def rounded(value: float) -> float:
        return float(f"{value:.2g}")

    return {
        "prompt draws": plan.groups,
        "standard error of that number": rounded(plan.groups_error),
        "responses of each": rounded(plan.responses),
        "for a change of, nats": rounded(plan.change),
        "within, to either side": rounded(plan.half_width),
        "responses, in those of the pilot": rounded(plan.sequences_ratio),
        "seconds on E, as on the pilot's": rounded(plan.seconds * plan.sequences_ratio),
    }
