"""The sweep: truth and both predictions over a grid of step sizes, from one direction.

Each finished point is kept in `sweep.jsonl` in the run directory, with a fingerprint of
everything it depends on. A sweep that was interrupted and is started again with the same
folder continues where it stopped.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from entropy_ddp.config import Config
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.estimators.entropy import EntropyChange
from entropy_ddp.estimators.errors import delta_method_error
from entropy_ddp.estimators.sweep import (
    SweepPoint,
    choose_grid,
    summarise,
)
from entropy_ddp.policy.parameters import fingerprint, frozen_fingerprint, shifted
from entropy_ddp.probe.audits import Extras, audit_rows
from entropy_ddp.probe.diagnosis import SAMPLE_SEQUENCES
from entropy_ddp.probe.estimation import changes_at
from entropy_ddp.probe.measure import Measured, measure
from entropy_ddp.probe.outcome import make_results
from entropy_ddp.probe.phases import gather_sums, snapshot_device
from entropy_ddp.probe.session import Progress, Session, open_session
from entropy_ddp.results import Probed
from entropy_ddp.rollouts.batch import Batch
from entropy_ddp.rollouts.files import write_jsonl
from entropy_ddp.rollouts.jsonlines import read_rows

POINTS_FILE = "sweep.jsonl"


def run_sweep(config: Config, world: World, out: Path, progress: Progress) -> Probed:
    """A probe, then E scored at theta + eta v for every eta of the grid.

    Args:
        config: the run's configuration.
        world: the ranks.
        out: run directory, where finished points are kept.
        progress: told how far the current phase is.

    Raises:
        InputError: the configuration, the checkpoint or a batch is wrong, or the folder
            holds points of another sweep.
        RunError: a number is not finite.
    """
    session = open_session(config, world, out, progress)
    measured = measure(session, SAMPLE_SEQUENCES)
    identity = _identity(session, measured)
    known = {p.eta: p for p in _finished_points(session, out / POINTS_FILE, identity)}
    points: list[SweepPoint] = []
    for eta in _grid(session, measured):
        point = known.get(eta)
        if point is None:
            point = _point(measured, eta, _change_at(session, measured, eta))
        points.append(point)
        if world.is_main:
            kept = [{"identity": identity} | asdict(p) for p in points]
            write_jsonl(out / POINTS_FILE, kept)
    summary = summarise(points, measured.noise_floor, config.truth.ess_abort)
    rows = audit_rows(session, measured, Extras())
    return make_results(session, measured, rows, sweep=points, sweep_summary=summary)


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


def _point(measured: Measured, eta: float, change: EntropyChange) -> SweepPoint:
    """The row of one step size."""
    slope, curvature = measured.slope, measured.curvature
    return SweepPoint(
        eta=eta,
        delta_h_true=change.value,
        se=change.se,
        ess_fraction=change.ess_fraction,
        delta_h1=eta * slope.value,
        delta_h1_se=abs(eta) * slope.se,
        delta_h2=None
        if curvature is None
        else curvature.second_order(eta, slope.value),
        difference_se=delta_method_error(change.influence - eta * slope.influence),
    )


def _identity(session: Session, measured: Measured) -> str:
    """Fingerprint of everything a point depends on beside its eta."""
    document = session.config.model_dump(exclude={"out", "sweep", "compute"})
    parts = [
        json.dumps(document, sort_keys=True),
        measured.stepped.hashes[0],
        _change_fingerprint(session),
        frozen_fingerprint(session.policy.model),
    ]
    parts += [_batch_fingerprint(batch) for batch in session.batches.values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _change_fingerprint(session: Session) -> str:
    """Of the change that is given; a step follows from the rest."""
    return "" if session.change is None else fingerprint([("", session.change)])


def _batch_fingerprint(batch: Batch) -> str:
    digest = hashlib.sha256()
    for s in batch.sequences:
        logprobs = None if s.sampling_logprobs is None else s.sampling_logprobs.tolist()
        ids = (s.prompt_ids.tolist(), s.response_ids.tolist())
        digest.update(repr((s.group, *ids, s.advantage, logprobs)).encode())
    return digest.hexdigest()


def _finished_points(
    session: Session, path: Path, identity: str
) -> Iterable[SweepPoint]:
    """Points that an interrupted sweep left; rank 0's file, known to every rank."""
    rows: list[dict[str, Any]] = []
    if session.world.is_main and path.exists():
        rows = list(read_rows(path))
    rows = session.world.gather_objects(rows)[0]
    if any(row.pop("identity", None) != identity for row in rows):
        raise InputError(
            f"{path}: holds points of another configuration, checkpoint or batch; give "
            "another --out, or delete the file"
        )
    return [SweepPoint(**row) for row in rows]
