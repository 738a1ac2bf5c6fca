"""The ledger of a run that trained without the callback, from the checkpoints it left.

Between two checkpoints, saved after steps s and s + n, the change of all n steps together
is probed as a given change of the parameters: entropy, truth, first and second order on
responses sampled from the first of the two. Step s + 1 can moreover be taken again from
the saved optimizer state on its batch, as it was recorded or else from the trainer's
dump of its texts, and split into its parts: with a checkpoint of every step the whole
run is, otherwise one step in n.

In the trainer's output folder:

    checkpoint-{s}/                                  weights, optimizer state after step s
    rollouts/U-{s + 1:06d}.jsonl.gz                  batch of step s + 1 (RolloutRecorder)
    completions/completions_{s + 1:05d}.parquet      the same, texts only (TRL)
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from entropy_ddp import __version__
from entropy_ddp.checkpoint.find import optimizer_file
from entropy_ddp.checkpoint.trainer_files import numbered_checkpoints
from entropy_ddp.config import Config, load_config, require_job
from entropy_ddp.data.files import sequence_to_row
from entropy_ddp.data.jsonlines import write_jsonl
from entropy_ddp.distributed import World
from entropy_ddp.errors import InputError
from entropy_ddp.importers.records import Source
from entropy_ddp.importers.run import import_rollouts
from entropy_ddp.ledger.lines import append_line, require_new
from entropy_ddp.probe.attribution import score_shares
from entropy_ddp.probe.estimates import estimate, slope_elsewhere
from entropy_ddp.probe.opening import open_session
from entropy_ddp.probe.passes import (
    score_after_step,
    score_along_step,
    score_in_the_middle,
)
from entropy_ddp.probe.pipeline import Plan, measure
from entropy_ddp.probe.session import Progress, Session
from entropy_ddp.training.live_session import seeded
from entropy_ddp.training.recorder import batch_file
from entropy_ddp.training.step_line import (
    attribution_entry,
    change_entry,
    entropy_entry,
)
from entropy_ddp.training.step_probe import (
    measured_entropy,
    split_by_part,
)
from entropy_ddp.update.loss import loss_weights
from entropy_ddp.update.step import given_change

# The estimators of a ledger; those of the callback too.
ESTIMATORS = (
    "objective.integrand=rb",
    "objective.normalize=per_token",
    "truth.is_mode=per_decision",
    "linear={score: to_go, baseline: hk}",
    "update.lr_override=null",
)


@dataclass(frozen=True, kw_only=True)
class CheckpointRun:
    """A run that left checkpoints.

    Attributes:
        folder: the trainer's output folder.
        out: where the ledger is written, with what was sampled.
        config: YAML file of how E is sampled; None for assignments alone.
        assignments: `key.sub=value`, winning over the file.
        top: number of tokens and prompts listed by name.
    """

    folder: Path
    out: Path
    config: Path | None
    assignments: tuple[str, ...]
    top: int = 20

    def configured(self, **values: Any) -> Config:
        """The configuration of a probe at a checkpoint.

        Raises:
            InputError: it is not valid, or E is not sampled.
        """
        given = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        assignments = (*self.assignments, *ESTIMATORS, *given)
        return load_config(self.config, assignments)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Two checkpoints that follow each other.

    Attributes:
        first, last: steps after which they were saved.
        before, after: their folders.
        kept: folder of what is sampled and imported.
    """

    first: int
    last: int
    before: Path
    after: Path
    kept: Path

    @property
    def evaluation(self) -> Path:
        """The file of E, sampled from the first of the two."""
        return self.kept / "E.jsonl"


def probe_checkpoints(run: CheckpointRun, world: World, progress: Progress) -> None:
    """Write the ledger of a run from its checkpoints.

    Raises:
        InputError: there are no two checkpoints, one cannot be read, the configuration
            is wrong, or the ledger exists.
        RunError: a number is not finite.
    """
    intervals = _intervals(run)
    configs = [_change_config(run, interval) for interval in intervals]
    require_new(run.out)
    # On every rank before the first of them writes.
    world.gather_objects(None)
    first, last = intervals[0].first, intervals[-1].last
    begin = {"kind": "run", "version": __version__, "first_step": first + 1}
    _write(run, world, begin | {"steps": last, "checkpoints": str(run.folder)})
    for interval, config in zip(intervals, configs):
        if world.is_main:
            interval.kept.mkdir(parents=True, exist_ok=True)
        # The streams of the callback at that step.
        config_of_step = seeded(config, interval.first + 1)
        session = open_session(config_of_step, world, None, progress)
        if world.is_main:
            tokenizer = session.policy.tokenizer
            rows = [
                sequence_to_row(s, tokenizer) for s in session.batches["E"].sequences
            ]
            write_jsonl(interval.evaluation, rows)
        entry = {
            "kind": "step",
            "step": interval.last,
            "num_steps": interval.last - interval.first,
            **_change(session),
        }
        batch = _first_batch(run, interval)
        if batch is not None:
            entry |= _split(run, interval, batch, world, progress)
        _write(run, world, entry)
        if interval is intervals[-1]:
            session.config = config
            _write(run, world, _end(session, last))


def _intervals(run: CheckpointRun) -> list[Interval]:
    """All of a run's checkpoints, by step."""
    found = numbered_checkpoints(run.folder)
    if len(found) < 2:
        raise InputError(
            f"{run.folder}: expected at least 2 folders checkpoint-N, found {len(found)}; "
            "name the trainer's output folder, and save more often (save_steps)"
        )
    return [
        Interval(
            first=first,
            last=last,
            before=found[first],
            after=found[last],
            kept=run.out / "checkpoints" / str(first),
        )
        for first, last in pairwise(found)
    ]


def _change_config(run: CheckpointRun, interval: Interval) -> Config:
    values = {
        "checkpoint.path": str(interval.before),
        "update.delta": str(interval.after),
        "batches.U": None,
    }
    config = run.configured(**values)
    require_job(config, "ledger")
    return config


def _change(session: Session) -> dict[str, Any]:
    """Truth and predictions of the whole change between two checkpoints."""
    step, stepped, _ = score_after_step(session, None)
    along = score_along_step(session, step)
    estimates, _ = estimate(session, step.learning_rate, along, stepped)
    there = score_in_the_middle(session, step)
    midpoint = slope_elsewhere(session, along.scores, there, estimates.original.value)
    return change_entry(session, estimates, midpoint, truth=True)


def _first_batch(run: CheckpointRun, interval: Interval) -> Path | None:
    """The batch of the first step after a checkpoint, if that step can be taken again.

    As it was recorded, or else the dump of its texts.
    """
    if optimizer_file(interval.before) is None:
        return None
    step = interval.first + 1
    files = (
        batch_file(run.folder / "rollouts", step),
        run.folder / "completions" / f"completions_{step:05d}.parquet",
    )
    return next((file for file in files if file.exists()), None)


def _imported(
    interval: Interval, completions: Path, world: World, base: str | None
) -> Path:
    """Rollouts made of a dump of texts."""
    update = interval.kept / "U.jsonl"
    if world.is_main:
        import_rollouts(
            "trl",
            [completions],
            interval.before,
            update,
            Source(),
            overwrite=True,
            base=base,
        )
    # Not read before it is there.
    world.gather_objects(None)
    return update


def _split(
    run: CheckpointRun,
    interval: Interval,
    batch: Path,
    world: World,
    progress: Progress,
) -> dict[str, Any]:
    """The parts of the first step after a checkpoint, on the same E."""
    if batch.suffix == ".parquet":
        base = _change_config(run, interval).checkpoint.base
        batch = _imported(interval, batch, world, base)
    values = {
        "checkpoint.path": str(interval.before),
        "batches.E": {"file": str(interval.evaluation)},
        "batches.U": {"file": str(batch)},
        "update.from_checkpoint": True,
    }
    config = run.configured(**values)
    session = open_session(config, world, None, progress)
    measured = measure(session, Plan(audited="gradient", curvature=False))
    gradient = measured.gradient
    assert gradient is not None
    slope = measured.duality.gradient / measured.estimates.original.denominator
    parts, direction = split_by_part(session, gradient, measured.step, slope)
    shard = session.shard("U")
    weights = loss_weights(shard, session.config.update, session.reference_logp)
    table = score_shares(session, weights, direction)
    step = {
        "learning_rate": measured.step.learning_rate,
        "grad_norm": measured.step.grad_norm,
        "clip_coefficient": measured.step.clip_coef,
    }
    return step | attribution_entry(session, table, parts, run.top)


def _end(session: Session, step: int) -> dict[str, Any]:
    """The entropy at the last checkpoint."""
    assert session.change is not None
    parameters, update = session.policy.parameters, session.config.update
    with given_change(parameters, session.change, update):
        entropy = measured_entropy(session, step + 1)
    entry = entropy_entry(entropy, session.draws)
    return {"kind": "end", "step": step, "entropy": entry}


def _write(run: CheckpointRun, world: World, line: dict[str, Any]) -> None:
    if world.is_main:
        append_line(run.out, line)
