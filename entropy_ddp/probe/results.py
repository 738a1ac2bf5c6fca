"""From what was measured to results.json and the rows beside it: no passes, no formulas."""

import importlib.metadata
import math
import platform
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import asdict
from itertools import chain
from typing import Any

from torch import Tensor

from entropy_ddp import __version__
from entropy_ddp.data.batch import Batch, Sequence
from entropy_ddp.data.draws import responses_per_prompt
from entropy_ddp.data.files import decode_prompt, decode_response
from entropy_ddp.estimators.curvature import CurvatureEstimate
from entropy_ddp.estimators.power import Precision, best_responses, between_prompts
from entropy_ddp.memory import peak_host_bytes
from entropy_ddp.model.counting import PassCount
from entropy_ddp.probe.attribution import sequence_shares, token_rows
from entropy_ddp.probe.audits.primitives import worst_verdict
from entropy_ddp.probe.audits.step import memory_rows
from entropy_ddp.probe.estimates import BEST, SequenceSums
from entropy_ddp.probe.measurements import Measurements
from entropy_ddp.probe.session import Session
from entropy_ddp.results import (
    AuditRow,
    BatchFacts,
    CurvatureResult,
    LinearResult,
    PowerResult,
    Probed,
    Results,
    Rows,
    RunFacts,
    TruthResult,
    UpdateResult,
)

NUM_TOP_PARAMETERS = 10
LIBRARIES = ("torch", "transformers", "peft", "accelerate")


def make_results(
    session: Session, measured: Measurements, rows: list[AuditRow], command: str
) -> Probed:
    """The results of a job; the same on every rank."""
    facts = _run_facts(session, command)
    rows = [*rows, *memory_rows(facts, session.config.compute.tokens_per_microbatch)]
    results = Results(
        status="untrusted" if worst_verdict(rows) == "fail" else "ok",
        run=facts,
        E=_batch_facts(session.batches["E"]),
        U=_batch_facts(session.batches["U"]) if "U" in session.batches else None,
        update=_update_result(session, measured),
        truth=_truth_result(session, measured),
        truth_all=_truth_all(measured),
        power=_power_result(session, measured),
        linear=_linear_result(session, measured),
        linear_all=_linear_all(measured),
        curvature=_curvature_result(session, measured),
        gradient_dot=measured.gradient_dot,
        sweep=measured.points,
        sweep_summary=measured.sweep_summary,
        attribution=measured.attribution,
        audit=rows,
    )
    table = measured.token_table
    return Probed(
        results=results,
        sequences=Rows(lambda: _sequence_rows(session, measured)),
        tokens=None if table is None else Rows(lambda: token_rows(session, table)),
        delta=_whole_delta(session, measured)
        if session.config.update.save_delta
        else None,
        sampled=frozenset(session.num_redraws),
    )


def _whole_delta(session: Session, measured: Measurements) -> dict[str, Tensor]:
    """The change of every parameter by name; where ranks have parts, on rank 0 only."""
    layers, views = session.passes.layers, session.passes.layout.views
    found = {}
    for name, view in views(measured.step.delta).items():
        whole = layers.whole(name, view)
        if session.world.is_main or not layers.has_parts:
            found[name] = whole.cpu()
    return found


def _run_facts(session: Session, command: str) -> RunFacts:
    versions = {"entropy_ddp": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    allowance = session.passes.allowance
    ranks = session.world.gather_objects(
        {
            "performed": session.passes.performed,
            "budget": allowance.of(session.config.compute.tokens_per_microbatch),
            "retries": allowance.num_retries + session.responses.num_retries,
            "peak": peak_host_bytes(),
        }
    )
    return RunFacts(
        command=command,
        versions=versions,
        world_size=session.world.world_size,
        seed=session.config.seed,
        device=session.policy.device.type,
        dtype=session.config.precision.model,
        started=session.started.isoformat(timespec="seconds"),
        seconds=session.seconds,
        passes=_passes(session, (rank["performed"] for rank in ranks)),
        tokens_per_microbatch=min(rank["budget"] for rank in ranks),
        out_of_memory_retries=sum(rank["retries"] for rank in ranks),
        memory=None
        if session.memory is None
        else {
            "estimated_bytes": session.memory.host_now + session.memory.host_more,
            "peak_bytes": max(rank["peak"] for rank in ranks),
            "free_bytes": session.memory.host_free,
        },
        resumed=(session.unfinished and session.unfinished.used) or None,
    )


def _passes(
    session: Session, ranks: Iterable[dict[tuple[str, str], PassCount]]
) -> list[dict[str, Any]]:
    """What every kind of pass over each batch cost all ranks."""
    totals: dict[tuple[str, str], PassCount] = {}
    for performed in ranks:
        for key, count in performed.items():
            totals.setdefault(key, PassCount()).add(count)
    rows = []
    for (kind, split), count in totals.items():
        row = {"pass": kind, "batch": split} | asdict(count)
        if count.operations is None:
            del row["operations"]
        rows.append(row)
    return rows


def _batch_facts(batch: Batch) -> BatchFacts:
    return BatchFacts(
        num_groups=batch.num_groups,
        num_sequences=len(batch),
        num_tokens=batch.num_tokens,
        num_prompts_total=batch.num_prompts_total,
        with_replacement=batch.with_replacement,
        responses_per_prompt=responses_per_prompt(batch),
    )


def _update_result(session: Session, measured: Measurements) -> UpdateResult:
    step = measured.step
    top = step.top_parameters(session.passes.layout, NUM_TOP_PARAMETERS)
    return UpdateResult(
        loss=None if session.change is not None else session.config.update.loss,
        delta=session.config.update.delta,
        learning_rate_used=step.learning_rate,
        param_update_l2=step.norm,
        grad_norm=step.grad_norm,
        clip_coef=step.clip_coef,
        num_optimizer_steps=step.num_optimizer_steps,
        top_parameters=[{"name": name, "l2": norm} for name, norm in top],
    )


def _truth_result(session: Session, measured: Measurements) -> TruthResult:
    config, change = session.config, measured.change
    estimates = measured.estimates
    log_weights, noise = estimates.log_weights, measured.noise_floor
    share, place = change.change.largest_share
    sampler = None
    if estimates.sampler_ess is not None:
        count = len(session.batches["E"])
        sampler = {
            "ess": estimates.sampler_ess,
            "ess_fraction": estimates.sampler_ess / count,
        }
    return TruthResult(
        normalize=config.objective.normalize,
        is_mode=change.is_mode,
        control_variates=change.control_weight is not None,
        control_weight=change.control_weight,
        H_orig=change.before.value,
        H_upd=change.after.value,
        H_orig_se=change.before.se,
        H_upd_se=change.after.se,
        H_orig_se_jackknife=change.before.se_jackknife,
        H_upd_se_jackknife=change.after.se_jackknife,
        noise_floor=noise,
        delta_h_true=change.value,
        se=change.se,
        se_jackknife=change.change.se_jackknife,
        interval=change.change.interval(noise),
        effective_degrees_of_freedom=change.change.effective_degrees_of_freedom,
        largest_share=share,
        largest_sequence=session.batches["E"].sequences[place].index,
        ess=change.ess,
        ess_fraction=change.ess_fraction,
        sampler=sampler,
        log_weight={
            "min": float(log_weights.min()),
            "median": float(log_weights.quantile(0.5)),
            "max": float(log_weights.max()),
        },
        clip_fraction=float((log_weights.exp() > config.truth.clip_c).double().mean()),
    )


def _power_result(session: Session, measured: Measurements) -> PowerResult:
    """What E can tell of the measured change, rounding included."""
    change, batch = measured.change.change, session.batches["E"]
    draws, shares = change.draws, between_prompts(change)
    precision = Precision(
        se=math.hypot(change.se_jackknife, measured.noise_floor),
        num_units=draws.num_units,
        responses=len(batch) / draws.num_units,
        between=None if shares is None else shares.share,
        set_size=draws.num_prompts_total,
    )
    resolved = precision.resolves(change.value)
    aim, aim_error = abs(change.value), 0.0
    if resolved:
        aim_error = precision.se / aim
    else:
        aim = session.config.truth.resolve * abs(measured.change.before.value)
    size = precision.units_needed(0.2 * aim, set_size=precision.set_size)
    more = None
    if size is None and precision.set_size is not None:
        more = precision.responses_needed(0.2 * aim, precision.set_size)
    prompt_cost = float(batch.prompt_lengths.sum()) / batch.num_tokens
    return PowerResult(
        resolved=resolved,
        smallest_change=precision.smallest_change,
        change=aim,
        groups_for_20_percent=size,
        groups_for_20_percent_se=None
        if size is None
        else precision.error_of_units_needed(
            size, aim_error, change.effective_degrees_of_freedom, precision.set_size
        ),
        responses_for_20_percent=more,
        between_prompts=precision.between,
        between_prompts_se=None if shares is None else shares.error,
        best_responses_per_prompt=best_responses(precision, prompt_cost),
    )


def _truth_all(measured: Measurements) -> list[dict[str, Any]]:
    """Delta H by every mode, also with the noise removed that the slopes share."""
    rows = []
    for mode, change in measured.estimates.changes.items():
        row: dict[str, Any] = {
            "is_mode": mode,
            "delta_h_true": change.value,
            "se": change.se,
            "se_jackknife": change.change.se_jackknife,
            "ess_fraction": change.ess_fraction,
        }
        adjusted = measured.estimates.adjusted.get(mode)
        if adjusted is not None:
            row |= {
                "delta_h_true_adjusted": adjusted.value,
                "se_adjusted": adjusted.se,
                "se_jackknife_adjusted": adjusted.change.se_jackknife,
                "control_weight": adjusted.control_weight,
            }
        rows.append(row)
    return rows


def _linear_result(session: Session, measured: Measurements) -> LinearResult:
    slope, eta = measured.slope, measured.step.learning_rate
    predicted = slope.estimate.scaled(eta)
    difference = measured.change.change.minus(predicted)
    return LinearResult(
        normalize=session.config.objective.normalize,
        score=slope.score,
        baseline=slope.baseline,
        control_variates=slope.control_variates,
        slope=slope.value,
        delta_h1=eta * slope.value,
        se=slope.se,
        se_jackknife=slope.estimate.se_jackknife,
        interval=predicted.interval(),
        terms=slope.terms,
        duality_gap=measured.duality.gap,
        difference_se=difference.se,
        difference_se_jackknife=difference.se_jackknife,
        difference_interval=difference.interval(measured.noise_floor),
        matched_difference=_matched_difference(session, measured, None),
    )


def _matched_difference(
    session: Session, measured: Measurements, curvature: CurvatureEstimate | None
) -> dict[str, Any] | None:
    """What a prediction misses, where the numbers shown do not share all their noise."""
    config, weight = session.config, measured.change.control_weight
    if weight is None or (weight == 1 and config.slope_estimator == BEST):
        return None
    mode, _ = config.truth_estimator
    change, slope = measured.estimates.matched_pair(mode)
    eta = measured.step.learning_rate
    predicted = slope.scaled(eta)
    if curvature is not None:
        predicted = curvature.second_order(eta, slope)
    difference = change.minus(predicted)
    return {
        "value": difference.value,
        "se": difference.se,
        "se_jackknife": difference.se_jackknife,
        "interval": difference.interval(measured.noise_floor),
    }


def _curvature_result(
    session: Session, measured: Measurements
) -> CurvatureResult | None:
    curvature = measured.curvature
    if curvature is None:
        return None
    slope, eta = measured.slope.estimate, measured.step.learning_rate
    second = curvature.second_order(eta, slope)
    difference = measured.change.change.minus(second)
    return CurvatureResult(
        method=curvature.method,
        second_derivative=curvature.value,
        se=curvature.estimate.se_jackknife,
        se_jackknife=curvature.estimate.se_jackknife,
        delta_h2=second.value,
        step=measured.curvature_step,
        eta_star=curvature.eta_star(slope),
        delta_h2_se=second.se,
        delta_h2_se_jackknife=second.se_jackknife,
        interval=second.interval(),
        difference_se=difference.se,
        difference_se_jackknife=difference.se_jackknife,
        difference_interval=difference.interval(measured.noise_floor),
        matched_difference=_matched_difference(session, measured, curvature),
        eta_star_se=curvature.eta_star_error(slope),
        eta_star_interval=list(curvature.eta_star_interval(slope)),
    )


def _linear_all(measured: Measurements) -> list[dict[str, Any]]:
    return [
        {
            "score": score,
            "baseline": baseline,
            "control_variates": adjusted,
            "slope": slope.value,
            "se": slope.se,
            "se_jackknife": slope.estimate.se_jackknife,
        }
        for (score, baseline, adjusted), slope in measured.estimates.slopes.items()
    ]


# Sequences whose numbers are Python objects at the same time.
_ROWS_AT_ONCE = 1024


def _sequence_rows(
    session: Session, measured: Measurements
) -> Iterator[dict[str, Any]]:
    """The rows of per_sequence.jsonl one by one: E, then U."""
    evaluation = _evaluation_rows(session, measured)
    if measured.update_sums is None:
        return iter(evaluation)
    return chain(evaluation, _update_rows(session, measured, measured.update_sums))


def _columns(
    sequences: AbstractSequence[Sequence], **columns: Tensor
) -> Iterator[tuple[Sequence, dict[str, float]]]:
    """Each sequence with its values of per-sequence arrays [N]."""
    for first in range(0, len(sequences), _ROWS_AT_ONCE):
        here = slice(first, first + _ROWS_AT_ONCE)
        values = zip(*(column[here].tolist() for column in columns.values()))
        for sequence, row in zip(sequences[here], values, strict=True):
            yield sequence, dict(zip(columns, row))


def _evaluation_rows(
    session: Session, measured: Measurements
) -> Iterable[dict[str, Any]]:
    estimates, eta = measured.estimates, measured.step.learning_rate
    pairs = _columns(
        session.batches["E"].sequences,
        logp=estimates.before.logp,
        entropy=estimates.before.entropy,
        logp_upd=estimates.after.logp,
        entropy_upd=estimates.after.entropy,
        log_weight=estimates.log_weights,
        contribution_true=measured.change.contributions,
        contribution_linear=eta * measured.slope.contributions,
    )
    return (_row("E", sequence, values) for sequence, values in pairs)


def _update_rows(
    session: Session, measured: Measurements, sums: SequenceSums
) -> Iterator[dict[str, Any]]:
    """The rows of U; with shares also those, and the decoded text at the end."""
    batch, tokenizer = session.batches["U"], session.policy.tokenizer
    table = measured.token_table
    shares = None if table is None else sequence_shares(session, table)
    columns = {"logp": sums.logp, "entropy": sums.entropy}
    pairs = _columns(batch.sequences, **columns)
    for place, (sequence, values) in enumerate(pairs):
        known = {"reward": sequence.reward, "advantage": sequence.advantage}
        given = {name: value for name, value in known.items() if value is not None}
        if shares is not None:
            given["share"] = float(shares[place])
        row = _row("U", sequence, values | given)
        if shares is not None and tokenizer is not None:
            row["prompt"] = decode_prompt(sequence.prompt_ids.tolist(), tokenizer)
            ids = sequence.response_ids.tolist()
            row["response"] = decode_response(ids, tokenizer)
        yield row


def _row(split: str, sequence: Sequence, values: dict[str, Any]) -> dict[str, Any]:
    """A row of per_sequence.jsonl: computed keys, then the input row's unknown ones.

    An unknown key with the name of a computed one is carried as `input_NAME`.
    """
    row = {
        "split": split,
        "index": sequence.index,
        "group": sequence.group_key,
        "num_tokens": sequence.num_tokens,
    } | values
    if sequence.ids_from_text is not None:
        row["ids_from_text"] = list(sequence.ids_from_text)
    carried = sequence.extra.items()
    return row | {f"input_{k}" if k in row else k: value for k, value in carried}
