"""Groups as units with a gradient each: their mean, their own, their derivatives.

Unit u of B has the gradient G_u = B sum_{t in u} a_t grad log p_t, a sum over its tokens,
so that one backward pass with the weights a gives the mean over all units. What the units
of E and U stand for:

    entropy_units   G_u = X_u, whose direction raises the entropy
    reward_units    G_u = grad J_u, J_u = mean_g (A_{u,g} / L_u) S_{u,g}
    loss_units      G_u = -B times the gradient of the unit's share of the loss

Shape legend: n sequences and t tokens of this rank, B units of the batch, P trainable
elements.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_ddp.data.batch import Block, Shard
from entropy_ddp.estimators.gradient_dot import (
    Weighting,
    entropy_coefficients,
    reward_coefficients,
)
from entropy_ddp.estimators.standard_errors import group_totals
from entropy_ddp.model.parameters import global_norm
from entropy_ddp.model.response_tokens import (
    DirectionalScores,
    TokenScores,
    TokenWeights,
)
from entropy_ddp.probe.session import Session
from entropy_ddp.probe.unfinished import Record
from entropy_ddp.update.loss import loss_weights


@dataclass(frozen=True, kw_only=True)
class Units:
    """The groups of one batch that this rank holds, each with its gradient.

    Attributes:
        shard: this rank's groups; may be empty.
        weights: gives a_t of this rank's tokens, as `pull_back` wants them.
        as_trained: whether the gradients are those that the trainer takes.
    """

    shard: Shard
    weights: TokenWeights
    as_trained: bool = False

    @property
    def group(self) -> Tensor:
        """Group number of each of this rank's sequences, [n]."""
        return self.shard.groups

    @property
    def count(self) -> int:
        """Number of units B of the whole batch."""
        return self.shard.batch.num_groups

    def one_by_one(self) -> Iterator[tuple[int, "Units"]]:
        """Each of this rank's units alone, ascending, with its share of the same mean."""
        for unit, block in self.shard.by_group():
            weights = self._weights_of(block)
            yield unit, replace(self, shard=block.shard, weights=weights)

    def _weights_of(self, block: Block) -> TokenWeights:
        return lambda token, *rest: self.weights(block.tokens[token.cpu()], *rest)


def entropy_units(session: Session, base: TokenScores, weighting: Weighting) -> Units:
    """The groups of E with X_u.

    Args:
        session: the run.
        base: this rank's tokens of E at theta.
        weighting: what the log-probability of a response is divided by.
    """
    shard = session.shard(session.batches["E"])
    group, ragged = shard.batch.groups[shard.positions], shard.ragged
    logp = ragged.sum(base.logp)
    coefficients = entropy_coefficients(logp, ragged.lengths, group, weighting)
    return _sequence_units(shard, coefficients / shard.batch.num_groups)


def reward_units(session: Session) -> Units:
    """The groups of U with grad J_u; for the loss `nll` every advantage is 1."""
    shard = session.shard(session.batches["U"])
    advantages = torch.ones(len(shard.positions), dtype=torch.float64)
    if session.config.update.loss != "nll":
        advantages = shard.batch.advantages[shard.positions]
    group, lengths = shard.batch.groups[shard.positions], shard.ragged.lengths
    coefficients = reward_coefficients(advantages, lengths, group)
    units = _sequence_units(shard, coefficients / shard.batch.num_groups)
    return replace(units, as_trained=True)


def loss_units(session: Session) -> Units:
    """The groups of U with their share of the configured loss, descending.

    The loss's own normalisation (the number of tokens of U, for `dapo`) is held fixed.

    Raises:
        InputError: `ratio: clipped` and a sequence has no sampling log-probs.
    """
    shard = session.shard(session.batches["U"])
    descent = loss_weights(shard, session.config.update, session.reference_logp)

    def ascent(token: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        on_logp, on_entropy = descent(token, logp, entropy)
        return -on_logp, on_entropy

    return Units(shard=shard, weights=ascent, as_trained=True)


def _sequence_units(shard: Shard, coefficients: Tensor) -> Units:
    """Units whose tokens have their sequence's coefficient as weight, [n]."""

    def weights(token: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        on_logp = coefficients[shard.ragged.sequence_at(token.cpu())]
        return on_logp, torch.zeros_like(on_logp)

    return Units(shard=shard, weights=weights)


def mean_gradient(session: Session, units: Units) -> Tensor:
    """Mean of the gradients of all units of all ranks, flat, [P]; one collective."""
    flat, _ = session.passes.gradient(
        units.shard, units.weights, session.buffer_dtype, as_trained=units.as_trained
    )
    return session.world.sum(flat, "parameter buffers")


def unit_gradients(session: Session, units: Units) -> Iterator[tuple[int, Tensor]]:
    """The gradient of each of this rank's units, one backward pass for each.

    Yields:
        Number of the unit, ascending, and its gradient, flat, [P].
    """
    for unit, alone in units.one_by_one():
        flat, _ = session.passes.gradient(
            alone.shard,
            alone.weights,
            session.buffer_dtype,
            as_trained=units.as_trained,
        )
        yield unit, flat.mul_(units.count)


def directional_derivatives(
    session: Session, units: Units, scores: DirectionalScores
) -> Tensor:
    """<G_u, d> of all units, [B], d the direction of the scores; one collective.

    Args:
        session: the run.
        units: the units.
        scores: this rank's tokens at theta with derivatives along d.
    """
    sums = torch.zeros(len(units.shard.positions), dtype=torch.float64)
    for block in units.shard.blocks():
        here = block.tokens
        weights, _ = units.weights(here, scores.logp[here], scores.entropy[here])
        sums[block.sequences] = block.ragged.sum(weights * scores.dlogp[here])
    totals = group_totals(units.count * sums, units.group, units.count)
    return session.world.sum(totals, "scalars")


def proxy_gradient_norm(session: Session, split: str = "U", limit: int = 64) -> float:
    """Norm of the gradient of mean S over the batch's first `limit` sequences.

    0 exactly when no gradient flows from log-probabilities to trainable parameters: X
    and Y then vanish whatever the rewards. The sample is the same at every world size.

    Args:
        session: the run.
        split: the batch, "E" or "U".
        limit: size of the sample.

    Raises:
        RunError: a value is not finite.
    """
    batch = session.batches[split]
    shard, sample = session.shard(batch), batch.first(limit)
    positions = shard.positions[shard.positions < len(sample)]
    units = _sequence_units(
        Shard(batch=sample, positions=positions),
        torch.full((len(positions),), 1 / len(sample), dtype=torch.float64),
    )

    def pull_back() -> Record:
        with session.phase("audit: gradient of mean S", units.shard.ragged.num_tokens):
            norm = global_norm(mean_gradient(session, units))
        return Record(shared={"norm": torch.tensor([norm], dtype=torch.float64)})

    record = session.kept(f"gradient-of-mean-S-{split}", units.shard, pull_back)
    return float(record.shared["norm"])
