"""The passes of a probe, in order, and the per-sequence numbers they leave.

1. gradient of the loss on U: one forward and backward over U;
2. one optimizer step; E scored at theta_after; the step undone (with `update.delta`, the
   change is given: there is no pass over U and no optimizer);
3. E scored at theta with derivatives along the step.

Between the passes only per-sequence sums travel between ranks: one collective for the
gradient, one for each table of sums.

Of every token of E six numbers are kept: log p and H at theta_after and at theta, and the
derivatives of the latter. What else a pass gives is made for one block of whole groups,
reduced, and dropped.
"""

import math
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_ddp.config import Compute
from entropy_ddp.data.batch import Shard
from entropy_ddp.distributed import World
from entropy_ddp.model.parameters import fingerprint
from entropy_ddp.model.response_tokens import DirectionalScores, TokenScores
from entropy_ddp.probe.features import FeatureSums
from entropy_ddp.probe.session import Session
from entropy_ddp.probe.unfinished import Costs, Record
from entropy_ddp.update.loss import loss_weights
from entropy_ddp.update.step import Step, given_change, one_step, optimizer_tensors


@dataclass(frozen=True, kw_only=True)
class SequenceSums:
    """Log-probability l_i and entropy H_i of every sequence of a batch, [N] each."""

    logp: Tensor
    entropy: Tensor


def gather_sums(world: World, shard: Shard, *token_arrays: Tensor) -> list[Tensor]:
    """Per-sequence sums [N] of flat token arrays [t], over all ranks in file order."""
    columns = [shard.ragged.sum(values) for values in token_arrays]
    return gather_columns(world, shard, columns)


def gather_columns(world: World, shard: Shard, columns: list[Tensor]) -> list[Tensor]:
    """Per-sequence values [N] of this rank's [n], over all ranks in file order."""
    rows = torch.stack(columns, dim=1)
    return list(world.gather_rows(rows, shard.positions, len(shard.batch)).unbind(1))


def loss_gradient(session: Session) -> tuple[Tensor, SequenceSums, TokenScores]:
    """Gradient of the loss on U, summed over ranks, flat, [P]; one collective.

    Returns:
        The gradient, the sums of U's sequences at theta, and this rank's tokens.
    """
    shard = session.shard(session.batches["U"])
    weights = loss_weights(shard, session.config.update, session.reference_logp)

    def pull_back() -> Record:
        with session.phase("gradient of U", shard.ragged.num_tokens):
            gradient, scores = session.passes.gradient(
                shard, weights, session.buffer_dtype, as_trained=True
            )
            session.world.sum(gradient, "parameter buffers")
        return Record(tokens=scores.arrays(), shared={"gradient": gradient})

    record = session.kept("gradient-of-U", shard, pull_back)
    scores = TokenScores(**record.tokens)
    logp, entropy = gather_sums(session.world, shard, scores.logp, scores.entropy)
    sums = SequenceSums(logp=logp, entropy=entropy)
    return record.shared["gradient"], sums, scores


@dataclass(frozen=True, kw_only=True)
class SteppedScores:
    """What was measured while the step was taken.

    Attributes:
        step: the step.
        scores: this rank's tokens of E at theta_after.
        hashes: fingerprints of parameters and optimizer state: before, after the step
            (parameters only), and after the restore.
    """

    step: Step
    scores: TokenScores
    hashes: tuple[str, str, str]


def snapshot_device(compute: Compute) -> torch.device | None:
    """Where copies of moved tensors are kept; None for each tensor's own device."""
    return torch.device("cpu") if compute.snapshot_device == "cpu" else None


def score_after_step(session: Session, gradient: Tensor | None) -> SteppedScores:
    """Take the step (or the given change), score E at theta_after, undo it.

    Args:
        session: the run.
        gradient: gradient of the loss, flat, [P]; None for a given change.
    """
    shard = session.shard(session.batches["E"])
    parameters = session.policy.parameters
    device = snapshot_device(session.config.compute)

    def state_hash() -> str:
        optimizer = session.optimizer
        state = [] if optimizer is None else optimizer_tensors(optimizer)
        return fingerprint([*parameters.items(), *state])

    with session.phase("fingerprints"):
        before = state_hash()
    with ExitStack() as undo:
        with session.phase("step"):
            step = undo.enter_context(_step_or_change(session, gradient, device))
        with session.phase("fingerprints"):
            stepped = fingerprint(parameters.items())
        scores = kept_scores(session, "truth", "truth: E after the step", shard)
    with session.phase("fingerprints"):
        restored = state_hash()
    return SteppedScores(step=step, scores=scores, hashes=(before, stepped, restored))


def kept_scores(session: Session, name: str, phase: str, shard: Shard) -> TokenScores:
    """This rank's tokens of a shard at the parameters of the moment.

    Args:
        session: the run.
        name: under which they are kept.
        phase: what is shown meanwhile.
        shard: this rank's sequences.
    """

    def score() -> Record:
        with session.phase(phase, shard.ragged.num_tokens):
            return Record(tokens=session.passes.score(shard).arrays())

    return TokenScores(**session.kept(name, shard, score).tokens)


def _step_or_change(
    session: Session, gradient: Tensor | None, device: torch.device | None
) -> AbstractContextManager[Step]:
    parameters, update = session.policy.parameters, session.config.update
    if gradient is None:
        assert session.change is not None
        return given_change(parameters, session.change, update, device)
    return one_step(session.optimizer, parameters, gradient, update, device)


# The part of the slope's record that is of the audits' sample.
_SAMPLE = "slope-sample"


@dataclass(frozen=True, kw_only=True)
class AlongStep:
    """What the pass along the step gave.

    Attributes:
        scores: this rank's tokens of E at theta, with derivatives along v.
        features: sums of what else it gave of every token.
        cut: number of ranks, and budget and filling of a microbatch, of the pass.
    """

    scores: DirectionalScores
    features: FeatureSums
    cut: tuple[int, int, int]


def first_sequences(session: Session, count: int) -> Shard:
    """This rank's share of the first sequences of E, the same at every world size.

    They are the first of its sequences, and their tokens the first in its token arrays.
    """
    batch = session.batches["E"]
    sample, whole = batch.first(count), session.shard(batch)
    if sample is batch:
        return whole
    return Shard(batch=sample, positions=whole.positions[whole.positions < len(sample)])


def score_along_step(session: Session, step: Step, sample_size: int = 0) -> AlongStep:
    """This rank's tokens of E at theta, with derivatives along v = delta / eta.

    Args:
        session: the run.
        step: the step.
        sample_size: of how many of E's first sequences the features are kept token by
            token, where the configured baseline is the ridge.
    """
    shard, integrand = (
        session.shard(session.batches["E"]),
        session.config.objective.integrand,
    )
    sample = first_sequences(session, sample_size)
    ridge = session.config.linear.baseline == "ridge"
    kept = sample.ragged.num_tokens if ridge else 0
    scores = DirectionalScores.empty(shard.ragged.num_tokens)
    features = FeatureSums.empty(shard, kept)

    def score() -> Record:
        with session.phase("slope: E along the step", shard.ragged.num_tokens):
            direction = step.direction(session.passes.parameters)
            for block in shard.blocks():
                piece = session.passes.score(block.shard, direction, with_features=True)
                scores.put(block.tokens, piece)
                features.add(block, piece, integrand)
        if kept and session.unfinished is not None:
            # Before the rest: the phase is finished only with this.
            part = Record(tokens=features.sample)
            session.unfinished.write(_SAMPLE, sample, part, Costs())
        counts = [scores.num_microbatches, scores.num_extra_microbatches]
        return Record(
            tokens=scores.arrays(),
            sequences=features.of_sequences(),
            sums=features.of_ranks() | {"microbatches": torch.tensor(counts)},
            shared={"cut": torch.tensor(_cut(session))},
        )

    record = session.kept("slope", shard, score)
    run, extra = record.sums.pop("microbatches").tolist()
    scores = DirectionalScores(
        **record.tokens, num_microbatches=run, num_extra_microbatches=extra
    )
    features = replace(features, **record.sequences, **record.sums)
    if kept and not features.sample:
        assert session.unfinished is not None
        features.sample = session.unfinished.read(_SAMPLE, sample)[0].tokens
    ranks, budget, fill = record.shared["cut"].tolist()
    return AlongStep(scores=scores, features=features, cut=(ranks, budget, fill))


def _cut(session: Session) -> tuple[int, int, int]:
    """How the work is cut: number of ranks, budget and filling of a microbatch."""
    budget = session.config.compute.tokens_per_microbatch
    return session.world.world_size, budget, session.passes.fill


@dataclass(frozen=True, kw_only=True)
class SecondDerivatives:
    """Second derivatives along v of every sequence's l_i and H_i, [N] each.

    Attributes:
        logp, entropy: of l_i and of H_i.
        step: eta between theta and either of the two slopes whose difference they are.
    """

    logp: Tensor
    entropy: Tensor
    step: float


def score_twice_along_step(
    session: Session, step: Step, base: DirectionalScores
) -> SecondDerivatives:
    """Second derivatives of l_i and H_i along v of every sequence of E."""
    shard, passes = session.shard(session.batches["E"]), session.passes
    device = snapshot_device(session.config.compute)
    sums = [float(base.dlogp.square().sum()), float(len(base.dlogp))]
    local = torch.tensor(sums, dtype=torch.float64)
    squares, count = session.world.sum(local, "scalars").tolist()
    typical = math.sqrt(squares / count)

    def score() -> Record:
        with session.phase("curvature: E along the step", 2 * shard.ragged.num_tokens):
            direction = step.direction(passes.parameters)
            distance = passes.difference_step(direction, typical)
            logp, entropy = passes.score_twice(shard, direction, distance, device)
        return Record(
            sequences={"logp": logp, "entropy": entropy},
            shared={"step": torch.tensor([distance], dtype=torch.float64)},
        )

    record = session.kept("curvature", shard, score)
    columns = [record.sequences[name] for name in ("logp", "entropy")]
    logp, entropy = gather_columns(session.world, shard, columns)
    return SecondDerivatives(
        logp=logp, entropy=entropy, step=float(record.shared["step"])
    )
