"""The main job: what one optimizer step does to the entropy, predicted and true."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from torch import Tensor

from entropy_ddp import __version__
from entropy_ddp.audit import worst_verdict
from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.estimators.control_variates import adjusted_change
from entropy_ddp.estimators.curvature import Curvature
from entropy_ddp.estimators.errors import delta_method_error
from entropy_ddp.estimators.linear import Baseline, Score, Slope
from entropy_ddp.policy.parameters import global_norm
from entropy_ddp.probe.diagnosis import (
    Duality,
    audit_rows,
    check_duality,
    measure_noise_floor,
)
from entropy_ddp.probe.estimation import (
    EntropyEstimates,
    estimate,
    estimate_curvature,
)
from entropy_ddp.probe.phases import (
    SequenceSums,
    loss_gradient,
    score_after_step,
    score_along_step,
    score_twice_along_step,
)
from entropy_ddp.probe.session import Progress, Session, open_session
from entropy_ddp.results import (
    BatchFacts,
    CurvatureResult,
    LinearResult,
    Probed,
    Results,
    RunFacts,
    TruthResult,
    UpdateResult,
)
from entropy_ddp.rollouts.batch import Batch, Sequence
from entropy_ddp.update.step import Step

NUM_TOP_PARAMETERS = 10
LIBRARIES = ("torch", "transformers", "peft", "accelerate")


def run_probe(
    config: Config, world: World, out: Path | None, progress: Progress
) -> Probed:
    """Open everything, run the passes, estimate, audit.

    Every rank computes the same results.

    Args:
        config: the run's configuration.
        world: the ranks.
        out: run directory, where sampled rollouts are kept; None keeps none.
        progress: told how far the current phase is.

    Raises:
        InputError: the configuration, the checkpoint or a batch is wrong.
        RunError: a number is not finite.
    """
    session = open_session(config, world, out, progress)
    gradient, update_sums, update_scores = loss_gradient(session)
    stepped = score_after_step(session, gradient)
    base = score_along_step(session, stepped.step)
    estimates = estimate(session, base, stepped.scores)
    curvature = None
    if config.curvature.enabled:
        second = score_twice_along_step(session, stepped.step)
        curvature = estimate_curvature(session, estimates, base, second)
    duality = check_duality(
        session, base, estimates.original.value, stepped.step.direction
    )
    noise_floor = measure_noise_floor(session, base)
    rows = audit_rows(
        session,
        gradient,
        stepped,
        estimates,
        (duality, noise_floor, base, update_scores),
    )
    results = Results(
        status="untrusted" if worst_verdict(rows) == "fail" else "ok",
        run=_run_facts(session),
        E=_batch_facts(session.batches["E"]),
        U=_batch_facts(session.batches["U"]),
        update=_update_result(session, stepped.step),
        truth=_truth_result(session, estimates),
        truth_all=_truth_all(estimates, stepped.step),
        linear=_linear_result(session, estimates, stepped.step, duality),
        linear_all=_linear_all(estimates),
        curvature=_curvature_result(session, estimates, stepped.step, curvature),
        audit=rows,
    )
    layout, delta = session.passes.layout, stepped.step.delta
    return Probed(
        results=results,
        sequences=[
            *_evaluation_rows(session, estimates, stepped.step),
            *_update_rows(session.batches["U"], update_sums),
        ],
        delta=layout.views(delta) if config.update.save_delta else None,
    )


def _run_facts(session: Session) -> RunFacts:
    versions = {"entropy_ddp": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    counts = session.world.gather_objects(session.passes.performed)
    return RunFacts(
        versions=versions,
        world_size=session.world.world_size,
        seed=session.config.seed,
        device=session.policy.device.type,
        dtype=session.config.precision.model,
        started=session.started.isoformat(timespec="seconds"),
        seconds=session.seconds,
        microbatches={
            kind: sum(count.get(kind, 0) for count in counts) for kind in counts[0]
        },
    )


def _batch_facts(batch: Batch) -> BatchFacts:
    return BatchFacts(
        num_groups=batch.num_groups,
        num_sequences=len(batch),
        num_tokens=batch.num_tokens,
    )


def _update_result(session: Session, step: Step) -> UpdateResult:
    top = step.top_parameters(session.passes.layout, NUM_TOP_PARAMETERS)
    return UpdateResult(
        loss=session.config.update.loss,
        learning_rate_used=step.learning_rate,
        param_update_l2=global_norm(step.delta),
        grad_norm=step.grad_norm,
        clip_coef=step.clip_coef,
        num_optimizer_steps=step.num_optimizer_steps,
        top_parameters=[{"name": name, "l2": norm} for name, norm in top],
    )


def _truth_result(session: Session, estimates: EntropyEstimates) -> TruthResult:
    config = session.config
    change = estimates.changes[config.truth.is_mode]
    log_weights = estimates.log_weights
    return TruthResult(
        normalize=config.objective.normalize,
        is_mode=config.truth.is_mode,
        H_orig=change.before,
        H_upd=change.after,
        delta_h_true=change.value,
        se=change.se,
        ess=change.ess,
        ess_fraction=change.ess_fraction,
        log_weight={
            "min": float(log_weights.min()),
            "median": float(log_weights.quantile(0.5)),
            "max": float(log_weights.max()),
        },
        clip_fraction=float((log_weights.exp() > config.truth.clip_c).double().mean()),
    )


def _truth_all(estimates: EntropyEstimates, step: Step) -> list[dict[str, Any]]:
    """Delta H by every mode, also with the noise removed that the slopes share."""
    rows = []
    for mode, change in estimates.changes.items():
        row = {
            "is_mode": mode,
            "delta_h_true": change.value,
            "se": change.se,
            "ess_fraction": change.ess_fraction,
        }
        partner = _PARTNERS.get(mode)
        best = estimates.slopes.get(("to_go", "ridge", True))
        if partner is not None and best is not None:
            row["delta_h_true_adjusted"], row["se_adjusted"] = adjusted_change(
                change, estimates.slopes[partner], best, step.learning_rate
            )
        rows.append(row)
    return rows


# The slope that is exactly the derivative of each mode's value.
_PARTNERS: dict[str, tuple[Score, Baseline, bool]] = {
    "snis": ("full", "none", False),
    "per_decision": ("to_go", "hk", False),
}


def _headline_slope(session: Session, estimates: EntropyEstimates) -> Slope:
    linear = session.config.linear
    return estimates.slopes[linear.score, linear.baseline, linear.control_variates]


def _linear_result(
    session: Session, estimates: EntropyEstimates, step: Step, duality: Duality
) -> LinearResult:
    slope = _headline_slope(session, estimates)
    change = estimates.changes[session.config.truth.is_mode]
    paired = change.influence - step.learning_rate * slope.influence
    return LinearResult(
        normalize=session.config.objective.normalize,
        score=slope.score,
        baseline=slope.baseline,
        slope=slope.value,
        delta_h1=step.learning_rate * slope.value,
        se=slope.se,
        se_jackknife=slope.se_jackknife,
        terms=slope.terms,
        duality_gap=duality.gap,
        difference_se=delta_method_error(paired),
    )


def _curvature_result(
    session: Session,
    estimates: EntropyEstimates,
    step: Step,
    curvature: Curvature | None,
) -> CurvatureResult | None:
    if curvature is None:
        return None
    slope, eta = _headline_slope(session, estimates).value, step.learning_rate
    return CurvatureResult(
        second_derivative=curvature.value,
        se=curvature.se,
        delta_h2=eta * slope + eta**2 * curvature.value / 2,
        eta_star=abs(2 * slope / curvature.value) if curvature.value else None,
    )


def _linear_all(estimates: EntropyEstimates) -> list[dict[str, Any]]:
    return [
        {
            "score": score,
            "baseline": baseline,
            "control_variates": adjusted,
            "slope": slope.value,
            "se": slope.se,
        }
        for (score, baseline, adjusted), slope in estimates.slopes.items()
    ]


def _columns(sequences: tuple[Sequence, ...], **columns: Tensor) -> list[Any]:
    """Each sequence with its values of per-sequence arrays [N]."""
    lists = [column.tolist() for column in columns.values()]
    rows = [dict(zip(columns, values)) for values in zip(*lists)]
    return list(zip(sequences, rows, strict=True))


def _evaluation_rows(
    session: Session, estimates: EntropyEstimates, step: Step
) -> list[dict[str, Any]]:
    slope = _headline_slope(session, estimates)
    change = estimates.changes[session.config.truth.is_mode]
    pairs = _columns(
        session.batches["E"].sequences,
        logp=estimates.before.logp,
        entropy=estimates.before.entropy,
        logp_upd=estimates.after.logp,
        entropy_upd=estimates.after.entropy,
        log_weight=estimates.log_weights,
        contribution_true=change.contributions,
        contribution_linear=step.learning_rate * slope.contributions,
    )
    return [_row("E", sequence, values) for sequence, values in pairs]


def _update_rows(batch: Batch, sums: SequenceSums) -> list[dict[str, Any]]:
    pairs = _columns(batch.sequences, logp=sums.logp, entropy=sums.entropy)
    rows = []
    for sequence, values in pairs:
        known = {"reward": sequence.reward, "advantage": sequence.advantage}
        given = {name: value for name, value in known.items() if value is not None}
        rows.append(_row("U", sequence, values | given))
    return rows


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
    carried = sequence.extra.items()
    return row | {f"input_{k}" if k in row else k: value for k, value in carried}
