"""The line of one probed step of a training, and the values that are logged of it.

Every key of the line is listed in `ledger.lines`.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from entropy_ddp.data.batch import Batch
from entropy_ddp.data.files import decode_prompt
from entropy_ddp.estimators.entropy import Ratio
from entropy_ddp.estimators.linear import Slope
from entropy_ddp.estimators.shares import (
    NUM_DECILES,
    TokenTable,
    covariance_score,
    probability_deciles,
)
from entropy_ddp.estimators.standard_errors import Draws, Estimate
from entropy_ddp.probe.attribution import top_tokens
from entropy_ddp.probe.estimates import EntropyEstimates
from entropy_ddp.probe.session import Session
from entropy_ddp.training.floor import FloorStep
from entropy_ddp.training.step_probe import StepProbe

PREFIX = "entropy_ddp/"


def step_entry(
    session: Session, probe: StepProbe, *, truth: bool, top: int
) -> dict[str, Any]:
    """The line of a probed step.

    Args:
        probe: the step, both halves.
        truth: whether E was scored after the step.
        top: number of tokens and prompts listed by name.
    """
    assert probe.estimates is not None
    share = probe.clip_coefficient * probe.table.share
    entry = {
        "kind": "step",
        "step": probe.number,
        "learning_rate": probe.learning_rate,
        "grad_norm": probe.step.grad_norm,
        "clip_coefficient": probe.clip_coefficient,
        **change_entry(session, probe.estimates, probe.midpoint, truth=truth),
        **attribution_entry(
            session, replace(probe.table, share=share), probe.parts, top
        ),
    }
    entry["checks"] |= {
        "step_gap": probe.step_gap,
        "duality_gap": probe.duality_gap,
        "logp_gap": probe.logp_gap,
    }
    return entry


def floor_entry(held: FloorStep, probe: StepProbe) -> dict[str, Any]:
    """What a floor did at a probed step."""
    entry = {
        name: getattr(held, name)
        for name in (
            "floor",
            "measured",
            "wanted",
            "predicted_plain",
            "predicted",
            "parameter",
            "saturated",
        )
    }
    changed = probe.floor_change
    clipped = None if changed is None else probe.clip_coefficient * changed
    found = entry | {"change": clipped}
    return {name: value for name, value in found.items() if value is not None}


def change_entry(
    session: Session,
    estimates: EntropyEstimates,
    midpoint: Slope | None,
    *,
    truth: bool,
) -> dict[str, Any]:
    """Entropy, predictions and truth.

    Args:
        midpoint: prediction from the middle; None if not asked for.
        truth: whether E was scored after the change.
    """
    first = estimates.slopes["to_go", "hk", False].estimate
    change, batch = estimates.changes["per_decision"], session.batches["E"]
    entry: dict[str, Any] = {
        "E": sizes_of(batch),
        "entropy": entropy_entry(estimates.original, session.draws),
        "first_order": _entry(first),
    }
    # Differences are of the same responses: most of their noise is the same.
    if midpoint is not None:
        entry["second_order"] = _entry(midpoint.estimate)
        entry["second_minus_first"] = _entry(midpoint.estimate.minus(first))
    if truth:
        entry["truth"] = _entry(change.change) | {"ess_fraction": change.ess_fraction}
        entry["truth_minus_first"] = _entry(change.change.minus(first))
        if midpoint is not None:
            missed = change.change.minus(midpoint.estimate)
            entry["truth_minus_second"] = _entry(missed)
    return entry


def sizes_of(batch: Batch) -> dict[str, int]:
    """Numbers of groups, sequences and tokens of a batch."""
    return {
        "num_groups": batch.num_groups,
        "num_sequences": len(batch),
        "num_tokens": batch.num_tokens,
    }


def entropy_entry(entropy: Ratio, draws: Draws) -> dict[str, Any]:
    """An entropy with its standard errors."""
    return _entry(entropy.estimate(draws))


def _entry(estimate: Estimate) -> dict[str, Any]:
    """A value with its standard errors, by the delta method and by the jackknife.

    With its 95 % interval, which is made of the latter.
    """
    return {
        "value": estimate.value,
        "se": estimate.se,
        "se_jackknife": estimate.se_jackknife,
        "interval": estimate.interval(),
    }


def attribution_entry(
    session: Session, table: TokenTable, parts: dict[str, float], top: int
) -> dict[str, Any]:
    """The parts of a first-order change, and who made the gradient's.

    Args:
        table: every token of U with its share in the gradient part.
        parts: {momentum, decay, gradient}, nats.
        top: number of tokens and prompts listed by name.
    """
    batch = session.batches["U"]
    share, total = table.share, float(table.share.sum())
    scores = covariance_score(table.logp, table.advantage)
    deciles = share.new_zeros(NUM_DECILES)
    deciles.index_add_(0, probability_deciles(table.logp), share)
    unattributed = parts["gradient"] - total
    checks = {}
    if total:
        checks["identity"] = parts["gradient"] / total
        checks["identity_gap"] = abs(unattributed) / float(share.abs().sum())
    return {
        "U": sizes_of(batch),
        "parts": parts,
        "tokens": {
            "positive": float(share[table.advantage > 0].sum()),
            "negative": float(share[table.advantage < 0].sum()),
            "zero": float(share[table.advantage == 0].sum()),
            "unattributed": unattributed,
        },
        "deciles": deciles.tolist(),
        "covariance": float(scores.mean()) if len(scores) else 0.0,
        "top_tokens": top_tokens(session, table)[:top],
        "by_token": _by_token(session, batch, share, top),
        "by_prompt": _by_prompt(session, batch, table, top),
        "checks": checks,
    }


def _by_token(
    session: Session, batch: Batch, share: Tensor, top: int
) -> list[dict[str, Any]]:
    """Sums of shares by token id, the largest by absolute value."""
    if not len(share):
        return []
    ids = torch.cat([sequence.response_ids for sequence in batch.sequences])
    kinds, place = ids.unique(return_inverse=True)
    tokenizer = session.policy.tokenizer
    return [
        {
            "token_id": int(kinds[kind]),
            "text": tokenizer.decode([int(kinds[kind])]),
            "share": total,
            "num_tokens": count,
        }
        for kind, total, count in _largest_sums(share, place, len(kinds), top)
    ]


def _by_prompt(
    session: Session, batch: Batch, table: TokenTable, top: int
) -> list[dict[str, Any]]:
    """Sums of shares by prompt, the largest by absolute value."""
    # Not by group: a prompt may have been drawn twice.
    numbers: dict[tuple[int, ...], int] = {}
    prompt_of = [
        numbers.setdefault(tuple(s.prompt_ids.tolist()), len(numbers))
        for s in batch.sequences
    ]
    place = torch.tensor(prompt_of, dtype=torch.int64)[table.sequence]
    prompts, tokenizer = list(numbers), session.policy.tokenizer
    return [
        {
            "prompt": decode_prompt(list(prompts[number]), tokenizer),
            "share": total,
            "num_tokens": count,
        }
        for number, total, count in _largest_sums(table.share, place, len(prompts), top)
    ]


def _largest_sums(
    share: Tensor, place: Tensor, count: int, top: int
) -> list[tuple[int, float, int]]:
    """The places with the largest |sum of shares|: (place, sum, number of tokens)."""
    totals = share.new_zeros(count).index_add_(0, place, share)
    counts = torch.bincount(place, minlength=count)
    largest = totals.abs().topk(min(top, count)).indices
    return list(
        zip(largest.tolist(), totals[largest].tolist(), counts[largest].tolist())
    )


def logged_values(entry: dict[str, Any]) -> dict[str, float]:
    """The scalars of a line under the names that reporters see."""
    values: dict[str, float] = {"step": entry["step"]}
    for key in ("entropy", "first_order", "second_order", "truth"):
        if key in entry:
            values[key] = entry[key]["value"]
            values[f"{key}_se"] = entry[key]["se"]
            if "interval" in entry[key]:
                low, high = entry[key]["interval"]
                values |= {f"{key}_low": low, f"{key}_high": high}
    if "truth" in entry:
        values["ess_fraction"] = entry["truth"]["ess_fraction"]
    values |= entry["parts"]
    values |= {f"tokens_{name}": share for name, share in entry["tokens"].items()}
    values |= {f"decile_{d}": share for d, share in enumerate(entry["deciles"])}
    values["covariance"] = entry["covariance"]
    values |= entry["checks"]
    values["seconds"] = entry["seconds"]
    return {PREFIX + name: value for name, value in values.items()}
