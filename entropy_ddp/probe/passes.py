"""The passes over the model that a probe makes, each a plain function of its inputs.

Between the passes only per-sequence sums travel between ranks: one collective for a
gradient, one for each table of sums.

Of every token of E six numbers are kept: log p and H at theta_after and at theta, and the
derivatives of the latter. What else a pass gives is made for one block of whole groups,
reduced, and dropped.

Shape legend: n sequences and t tokens of this rank, N sequences of the whole batch, P
trainable elements.
"""

import hashlib
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_ddp.checkpoint.policy import adapter_disabled
from entropy_ddp.data.batch import Block, Shard
from entropy_ddp.distributed import World
from entropy_ddp.estimators.entropy import Reweighting
from entropy_ddp.model.parameters import fingerprint, shifted
from entropy_ddp.model.response_tokens import (
    DirectionalScores,
    TokenScores,
    TokenWeights,
)
from entropy_ddp.model.scoring import Passes
from entropy_ddp.probe.features import SAMPLE_FEATURES, FeatureSums
from entropy_ddp.probe.resume import PassResult
from entropy_ddp.probe.session import Session
from entropy_ddp.update.loss import loss_weights
from entropy_ddp.update.step import Step, given_change, one_step, optimizer_tensors


def gather_sums(world: World, shard: Shard, *token_arrays: Tensor) -> list[Tensor]:
    """Per-sequence sums [N] of flat token arrays [t], over all ranks in file order."""
    columns = [shard.ragged.sum(values) for values in token_arrays]
    return gather_columns(world, shard, columns)


def gather_columns(world: World, shard: Shard, columns: list[Tensor]) -> list[Tensor]:
    """Per-sequence values [N] of this rank's [n], over all ranks in file order."""
    rows = torch.stack(columns, dim=1)
    return list(world.gather_rows(rows, shard.positions, len(shard.batch)).unbind(1))


def reweighting(session: Session, block: Block, logp: Tensor) -> Reweighting | None:
    """The weights of a block's tokens where another policy sampled E; or None.

    Args:
        block: of this rank's share of E.
        logp: log p of its tokens at theta, [t].
    """
    if not session.reweights:
        return None
    sampled = session.shard("E").sampling_logprobs[block.tokens]
    return Reweighting.of(block.ragged, logp - sampled)


def update_weights(session: Session) -> TokenWeights:
    """dL / d log p and dL / dH of this rank's tokens of U."""
    config = session.config.update
    return loss_weights(session.shard("U"), config, session.reference_logp)


def policy_weights(session: Session) -> TokenWeights:
    """The same of the loss without its KL term."""
    plain = session.config.update.model_copy(update={"kl_coefficient": 0.0})
    return loss_weights(session.shard("U"), plain)


def summed_gradient(
    session: Session,
    passes: Passes,
    shard: Shard,
    weights: TokenWeights,
    *,
    as_trained: bool = False,
) -> tuple[Tensor, TokenScores]:
    """Gradient of sum(a log p + b H) over all ranks, flat, [P]; one collective.

    Args:
        passes: the session's, or the same with other settings.
        weights: gives a and b of this rank's tokens of the shard.
        as_trained: see `Passes.differentiated`.

    Returns:
        The gradient, and this rank's tokens as the pass scored them on its way.
    """
    flat, scores = passes.gradient(
        shard, weights, session.buffer_dtype, as_trained=as_trained
    )
    if not passes.layers.has_parts:
        flat = session.world.sum(flat, "parameter buffers")
    return flat, scores


def loss_gradient(session: Session) -> tuple[Tensor, TokenScores]:
    """Gradient of the loss on U, summed over ranks, flat, [P]; and this rank's tokens.

    One forward and backward over U, one collective.
    """
    shard, weights = session.shard("U"), update_weights(session)

    def pull_back() -> PassResult:
        gradient, scores = summed_gradient(
            session, session.passes, shard, weights, as_trained=True
        )
        return PassResult(tokens=scores.arrays(), vectors={"gradient": gradient})

    found = session.pass_over(shard, "gradient of U", pull_back)
    return found.vectors["gradient"], TokenScores(**found.tokens)


def step_taken(
    session: Session, gradient: Tensor | None
) -> AbstractContextManager[Step]:
    """Within, the parameters are at theta_after; parameters and state are put back.

    Args:
        gradient: of the loss, flat, [P]; None for the given change in place of a step.
    """
    parameters, update = session.policy.parameters, session.config.update
    device, totals = session.snapshot_device, session.passes.layers.totals
    if gradient is None:
        assert session.change is not None
        return given_change(parameters, session.change, update, device, totals)
    return one_step(
        session.optimizer, parameters, gradient, update, device, totals=totals
    )


def score(session: Session, shard: Shard, name: str) -> TokenScores:
    """This rank's tokens of a shard at the parameters of the moment; one forward pass."""

    def score_shard() -> PassResult:
        return PassResult(tokens=session.passes.score(shard).arrays())

    return TokenScores(**session.pass_over(shard, name, score_shard).tokens)


def score_after_step(
    session: Session, gradient: Tensor | None
) -> tuple[Step, TokenScores, tuple[str, str, str]]:
    """Take the step (or the given change), score E at theta_after, undo it bit for bit.

    Returns:
        The step, this rank's tokens of E, and fingerprints of parameters and optimizer
        state: before, after the step (parameters only), and after the restore.
    """
    before = _state_hash(session)
    with ExitStack() as undo:
        with session.phase("step"):
            step = undo.enter_context(step_taken(session, gradient))
        with session.phase("fingerprints"):
            after = _of_all_parts(session, session.policy.parameters.items())
        scores = score(session, session.shard("E"), "truth: E after the step")
    return step, scores, (before, after, _state_hash(session))


def _state_hash(session: Session) -> str:
    optimizer = session.optimizer
    state = [] if optimizer is None else optimizer_tensors(optimizer)
    with session.phase("fingerprints"):
        return _of_all_parts(session, [*session.policy.parameters.items(), *state])


def _of_all_parts(session: Session, named: Iterable[tuple[str, Tensor]]) -> str:
    """Fingerprint of tensors; where ranks have parts of them, of those of all ranks."""
    own = fingerprint(named)
    if not session.passes.layers.has_parts:
        return own
    found = "".join(session.world.gather_objects(own))
    return hashlib.sha256(found.encode()).hexdigest()


def score_reference(session: Session) -> Tensor:
    """Log p of this rank's tokens of U under the reference policy, [t]."""
    with adapter_disabled(session.policy.model):
        name = "reference: U without the adapter"
        return score(session, session.shard("U"), name).logp


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


def score_along_step(session: Session, step: Step, sample_size: int = 0) -> AlongStep:
    """This rank's tokens of E at theta, with derivatives along v = delta / eta.

    One forward-mode pass.

    Args:
        sample_size: of how many of E's first sequences the features are kept token by
            token, where the configured baseline is a fitted one.
    """
    shard, passes = session.shard("E"), session.passes
    integrand = session.config.objective.integrand
    fitted = session.config.slope_estimator[1] in ("ridge", "action_value")
    kept = session.first_sequences(sample_size).ragged.num_tokens if fitted else 0
    scores = DirectionalScores.empty(shard.ragged.num_tokens)
    features = FeatureSums.empty(shard, kept)

    def score_blocks() -> PassResult:
        direction = step.direction(passes.parameters)
        for block in passes.blocks(shard):
            piece = passes.score(block.shard, direction, with_features=True)
            scores.put(block.tokens, piece)
            weighting = reweighting(session, block, piece.logp)
            features.add(block, piece, integrand, weighting)
        counts = [scores.num_microbatches, scores.num_extra_microbatches]
        budget = session.config.compute.tokens_per_microbatch
        cut = [session.world.world_size, budget, passes.fill]
        return PassResult(
            tokens=scores.arrays() | features.sample,
            sequences=features.of_sequences(),
            sums=features.of_ranks() | {"microbatches": torch.tensor(counts)},
            shared={"cut": torch.tensor(cut)},
        )

    found = session.pass_over(shard, "slope: E along the step", score_blocks)
    arrays = dict(found.tokens)
    sample = {name: arrays.pop(name) for name in SAMPLE_FEATURES if name in arrays}
    sums = dict(found.sums)
    run, extra = sums.pop("microbatches").tolist()
    ranks, budget, fill = found.shared["cut"].tolist()
    return AlongStep(
        scores=DirectionalScores(
            **arrays, num_microbatches=run, num_extra_microbatches=extra
        ),
        features=replace(features, sample=sample, **found.sequences, **sums),
        cut=(ranks, budget, fill),
    )


def score_along(
    session: Session,
    shard: Shard,
    name: str,
    direction: dict[str, Tensor],
    *,
    kept_as: str | None = None,
) -> DirectionalScores:
    """This rank's tokens of a shard, with derivatives along a direction.

    One forward-mode pass; over U with the derivative that the trainer takes.

    Args:
        name: of the phase.
        kept_as: see `Session.pass_over`.
    """
    as_trained = shard.batch.split == "U"

    def score_shard() -> PassResult:
        scores = session.passes.score(shard, direction, as_trained=as_trained)
        return PassResult(tokens=scores.arrays())

    found = session.pass_over(shard, name, score_shard, kept_as=kept_as)
    return DirectionalScores(**found.tokens)


def score_in_the_middle(
    session: Session, step: Step, place: float = 0.0
) -> DirectionalScores:
    """This rank's tokens of E at theta + delta / 2, with derivatives along v.

    One forward-mode pass.

    Args:
        place: where the parameters are: 0 at theta, 1 at theta'.
    """
    shard, passes = session.shard("E"), session.passes

    def score_shifted() -> PassResult:
        direction = step.direction(passes.parameters)
        distance = (0.5 - place) * step.learning_rate
        with shifted(passes.parameters, direction, distance, session.snapshot_device):
            return PassResult(tokens=passes.score(shard, direction).arrays())

    found = session.pass_over(shard, "second order: E at the middle", score_shifted)
    return DirectionalScores(**found.tokens)


def score_twice_along_step(
    session: Session, step: Step, base: DirectionalScores
) -> tuple[Tensor, Tensor, float]:
    """Second derivatives of l_i and H_i along v of every sequence of E, [N] each.

    Two forward-mode passes, at either side of theta.

    Args:
        step: the step along v.
        base: this rank's tokens of E at theta, with derivatives along v.

    Returns:
        Those of l_i, those of H_i, and eta between theta and either of the passes.
    """
    shard, passes = session.shard("E"), session.passes
    sums = [float(base.dlogp.square().sum()), float(len(base.dlogp))]
    local = torch.tensor(sums, dtype=torch.float64)
    squares, count = session.world.sum(local, "scalars").tolist()
    typical = math.sqrt(squares / count)

    def score_twice() -> PassResult:
        direction = step.direction(passes.parameters)
        distance = passes.difference_step(direction, typical)
        logp, entropy = passes.score_twice(
            shard, direction, distance, session.snapshot_device
        )
        return PassResult(
            sequences={"logp": logp, "entropy": entropy},
            shared={"distance": torch.tensor([distance], dtype=torch.float64)},
        )

    found = session.pass_over(
        shard,
        "curvature: E along the step",
        score_twice,
        tokens=2 * shard.ragged.num_tokens,
    )
    columns = [found.sequences[name] for name in ("logp", "entropy")]
    logp, entropy = gather_columns(session.world, shard, columns)
    return logp, entropy, float(found.shared["distance"])
