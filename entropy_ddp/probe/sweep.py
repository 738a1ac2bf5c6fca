"""The sweep: truth and both predictions over a grid of step sizes, from one direction.

One forward pass over E for each size. Each is kept among what the unfinished run leaves:
a sweep that was interrupted goes on where it stopped, also with another grid.
"""

import torch
from torch import Tensor

from entropy_ddp.estimators.quantiles import two_sided
from entropy_ddp.estimators.standard_errors import Estimate
from entropy_ddp.estimators.step_sizes import choose_grid, summarise
from entropy_ddp.estimators.sweep_points import SweepPoint, SweepSummary
from entropy_ddp.model.parameters import shifted
from entropy_ddp.probe.estimates import adjusted_changes, changes_at
from entropy_ddp.probe.measurements import Measurements
from entropy_ddp.probe.passes import gather_sums
from entropy_ddp.probe.resume import PassResult
from entropy_ddp.probe.session import Session


def sweep_step_sizes(
    session: Session, measured: Measurements
) -> tuple[list[SweepPoint], SweepSummary]:
    """E scored at theta + eta v for every eta of the grid."""
    found = [_point(session, measured, eta) for eta in _grid(session, measured)]
    points = [point for point, _ in found]
    influences = {point.eta: influence for point, influence in found}
    quantile = two_sided(session.draws.num_units - 1)
    return points, summarise(points, measured.noise_floor, influences, quantile)


def _grid(session: Session, measured: Measurements) -> list[float]:
    """The learning rates to measure, the smallest first, mirrored if asked for."""
    sweep = session.config.sweep
    etas = sweep.etas
    if etas is None:
        (dlogp,) = gather_sums(session.world, session.shard("E"), measured.base.dlogp)
        etas = choose_grid(
            dlogp,
            measured.slope.value,
            measured.noise_floor,
            session.config.truth.ess_warn,
            sweep.num_points,
        )
    etas = sorted(etas)
    return [s * eta for eta in etas for s in ((1, -1) if sweep.symmetric else (1,))]


def _change_at(session: Session, measured: Measurements, eta: float) -> PassResult:
    """Delta H at theta + eta v."""
    passes, shard = session.passes, session.shard("E")
    direction = measured.step.direction(passes.parameters)
    with shifted(passes.parameters, direction, eta, session.snapshot_device):
        scores = passes.score(shard)
    estimates = measured.estimates
    mode, removed = session.config.truth_estimator
    changes = changes_at(session, measured.base, scores)
    if removed:
        changes = adjusted_changes(
            session, changes, estimates.slopes, estimates.original, eta
        )
    change = changes[mode]
    numbers = [change.value, change.ess_fraction]
    shared = {
        "values": torch.tensor(numbers, dtype=torch.float64),
        "influence": change.change.influence,
        "without": change.change.without,
    }
    if change.change.without_response is not None:
        shared["without_response"] = change.change.without_response
    return PassResult(shared=shared)


def _point(
    session: Session, measured: Measurements, eta: float
) -> tuple[SweepPoint, Tensor]:
    """The row of one step size, and each unit's influence on its truth, [n]."""
    slope, curvature = measured.slope.estimate, measured.curvature
    truth, ess_fraction = measured.change.change, measured.change.ess_fraction
    # At the step's own learning rate it is measured already.
    if eta != measured.step.learning_rate:
        found = session.pass_over(
            session.shard("E"),
            f"sweep: eta = {eta:.3g}",
            lambda: _change_at(session, measured, eta),
            # In full: two learning rates that are shown alike are two points.
            kept_as=f"sweep: eta = {eta!r}",
        ).shared
        value, ess_fraction = found["values"].tolist()
        truth = Estimate(
            value=value,
            influence=found["influence"],
            without=found["without"],
            without_response=found.get("without_response"),
            draws=session.draws,
        )
    first = slope.scaled(eta)
    difference = truth.minus(first)
    missed = difference.over(truth) if truth.value else None
    second = None if curvature is None else curvature.second_order(eta, slope)
    thresholds, noise = session.config.truth, measured.noise_floor
    point = SweepPoint(
        eta=eta,
        delta_h_true=truth.value,
        se=truth.se,
        se_jackknife=truth.se_jackknife,
        interval=truth.interval(noise),
        ess_fraction=ess_fraction,
        delta_h1=first.value,
        delta_h1_se=first.se,
        delta_h1_se_jackknife=first.se_jackknife,
        delta_h2=None if second is None else second.value,
        delta_h2_se=None if second is None else second.se,
        delta_h2_se_jackknife=None if second is None else second.se_jackknife,
        difference_se=difference.se,
        difference_se_jackknife=difference.se_jackknife,
        missed=None if missed is None else missed.value,
        missed_se=None if missed is None else missed.se_jackknife,
        trusted=ess_fraction >= max(thresholds.ess_warn, thresholds.ess_abort),
    )
    return point, truth.group_influence
