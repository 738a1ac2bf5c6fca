"""The sweep: truth and both predictions over a grid of step sizes, from one direction.

Each finished point is kept among what the unfinished run leaves: a sweep that was
interrupted goes on where it stopped, also with another grid.
"""

from pathlib import Path

import torch
from torch import Tensor

from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.estimators.entropy import EntropyChange
from entropy_ddp.estimators.standard_errors import delta_method_error
from entropy_ddp.estimators.step_sizes import choose_grid, summarise
from entropy_ddp.estimators.sweep_points import SweepPoint
from entropy_ddp.model.parameters import shifted
from entropy_ddp.probe.audits import Extras, audit_rows
from entropy_ddp.probe.estimation import changes_at
from entropy_ddp.probe.measure import Measured, measure
from entropy_ddp.probe.outcome import make_results
from entropy_ddp.probe.phases import gather_sums, snapshot_device
from entropy_ddp.probe.session import Progress, Session, open_session
from entropy_ddp.probe.unfinished import Record
from entropy_ddp.results import Probed


def run_sweep(
    config: Config, world: World, out: Path | None, progress: Progress
) -> Probed:
    """A probe, then E scored at theta + eta v for every eta of the grid.

    Args:
        config: the run's configuration.
        world: the ranks.
        out: run directory, where finished phases and points are kept; None keeps none.
        progress: told how far the current phase is.

    Raises:
        InputError: the configuration, the checkpoint or a batch is wrong, or the
            unfinished run in the folder is another one.
        RunError: a number is not finite.
    """
    return sweep_session(open_session(config, world, out, progress, "sweep"))


def sweep_session(session: Session) -> Probed:
    """A sweep of what is open already; errors as of `run_sweep`."""
    measured = measure(session)
    found = [_point(session, measured, eta) for eta in _grid(session, measured)]
    points = [point for point, _ in found]
    influences = {point.eta: influence for point, influence in found}
    summary = summarise(points, measured.noise_floor, influences)
    rows = audit_rows(session, measured, Extras())
    return make_results(
        session, measured, rows, "sweep", sweep=points, sweep_summary=summary
    )


def _grid(session: Session, measured: Measured) -> list[float]:
    """The learning rates to measure, the smallest first, mirrored if asked for."""
    sweep = session.config.sweep
    etas = sweep.etas
    if etas is None:
        shard = session.shard(session.batches["E"])
        (dlogp,) = gather_sums(session.world, shard, measured.base.dlogp)
        etas = choose_grid(
            dlogp,
            measured.slope.value,
            measured.noise_floor,
            session.config.truth.ess_warn,
            sweep.num_points,
        )
    etas = sorted(etas)
    return [s * eta for eta in etas for s in ((1, -1) if sweep.symmetric else (1,))]


def _change_at(session: Session, measured: Measured, eta: float) -> EntropyChange:
    """Delta H at theta + eta v; at the step's own learning rate it is measured already."""
    if eta == measured.step.learning_rate:
        return measured.change
    shard = session.shard(session.batches["E"])
    passes = session.passes
    device = snapshot_device(session.config.compute)
    direction = measured.step.direction(passes.parameters)
    with (
        session.phase(f"sweep: eta = {eta:.3g}", shard.ragged.num_tokens),
        shifted(passes.parameters, direction, eta, device),
    ):
        scores = passes.score(shard)
    changes = changes_at(session, measured.base, scores)
    return changes[session.config.truth.is_mode]


def _point(
    session: Session, measured: Measured, eta: float
) -> tuple[SweepPoint, Tensor]:
    """The row of one step size, and each group's influence on its truth, [n].

    What a pass measured is kept.
    """
    slope, curvature = measured.slope, measured.curvature

    def measured_values() -> Record:
        change = _change_at(session, measured, eta)
        difference = delta_method_error(change.influence - eta * slope.influence)
        values = [change.value, change.se, change.ess_fraction, difference]
        kept = {"values": torch.tensor(values, dtype=torch.float64)}
        return Record(shared=kept | {"influence": change.influence})

    # The number in full: two learning rates that are printed alike are two points.
    shard = session.shard(session.batches["E"])
    record = session.kept(f"eta={eta.hex()}", shard, measured_values)
    value, error, ess_fraction, difference = record.shared["values"].tolist()
    truth = session.config.truth
    second = second_error = None
    if curvature is not None:
        second = curvature.second_order(eta, slope.value)
        influence = curvature.second_order_influence(eta, slope.influence)
        second_error = delta_method_error(influence)
    point = SweepPoint(
        eta=eta,
        delta_h_true=value,
        se=error,
        ess_fraction=ess_fraction,
        delta_h1=eta * slope.value,
        delta_h1_se=abs(eta) * slope.se,
        delta_h2=second,
        delta_h2_se=second_error,
        difference_se=difference,
        trusted=ess_fraction >= max(truth.ess_warn, truth.ess_abort),
    )
    return point, record.shared["influence"]
