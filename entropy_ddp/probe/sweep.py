"""The sweep: truth and both predictions over a grid of step sizes, from one direction.

One forward pass over E for each size. Each is kept among what the unfinished run leaves:
a sweep that was interrupted goes on where it stopped, also with another grid.
"""

import torch
from torch import Tensor

from entropy_ddp.estimators.standard_errors import delta_method_error
from entropy_ddp.estimators.step_sizes import choose_grid, summarise
from entropy_ddp.estimators.sweep_points import SweepPoint, SweepSummary
from entropy_ddp.model.parameters import shifted
from entropy_ddp.probe.estimates import changes_at
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
    return points, summarise(points, measured.noise_floor, influences)


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
    change = changes_at(session, measured.base, scores)[session.config.truth.is_mode]
    numbers = [change.value, change.se, change.ess_fraction]
    values = torch.tensor(numbers, dtype=torch.float64)
    return PassResult(shared={"values": values, "influence": change.influence})


def _point(
    session: Session, measured: Measurements, eta: float
) -> tuple[SweepPoint, Tensor]:
    """The row of one step size, and each group's influence on its truth, [n]."""
    slope, curvature, change = measured.slope, measured.curvature, measured.change
    value, error, ess_fraction = change.value, change.se, change.ess_fraction
    influence = change.influence
    # At the step's own learning rate it is measured already.
    if eta != measured.step.learning_rate:
        found = session.pass_over(
            session.shard("E"),
            f"sweep: eta = {eta:.3g}",
            lambda: _change_at(session, measured, eta),
            # In full: two learning rates that are shown alike are two points.
            kept_as=f"sweep: eta = {eta!r}",
        )
        value, error, ess_fraction = found.shared["values"].tolist()
        influence = found.shared["influence"]
    truth = session.config.truth
    second = second_error = None
    if curvature is not None:
        second = curvature.second_order(eta, slope.value)
        second_error = delta_method_error(
            curvature.second_order_influence(eta, slope.influence)
        )
    point = SweepPoint(
        eta=eta,
        delta_h_true=value,
        se=error,
        ess_fraction=ess_fraction,
        delta_h1=eta * slope.value,
        delta_h1_se=abs(eta) * slope.se,
        delta_h2=second,
        delta_h2_se=second_error,
        difference_se=delta_method_error(influence - eta * slope.influence),
        trusted=ess_fraction >= max(truth.ess_warn, truth.ess_abort),
    )
    return point, influence
