"""One optimizer step whose first-order change of the entropy is to reach what is wanted.

At theta, before the optimizer's step, with the batch's own tokens and a_t = dL / d log p_t
of the trainer's loss L as its backward pass gave them:

    H      mean entropy of the batch's tokens
    grad H 1/T sum_t [ c_t grad log p_t + grad H_t ], entropies to go with the baseline
           `loo`: the gradient of H as an estimator at the policy's own responses
    G      memory G + (1 - memory) grad H
    d      the step that AdamW takes with the gradient g, clipped
    pred   <G, d>
    want   min(cap, rate (floor - H))

Where pred >= want nothing is changed. Else, with w(log p, A; x) a family of weights
(`estimators.holding`), x_0 its neutral parameter and w' its derivative there,

    g'     sum_t a_t w'_t grad log p_t
    s      -<G, gain g'>,  gain = eta (1 - beta1) kappa / (bc1 denom): see `decomposition`
    x      x_0 + (want - pred) / s, no further than the family's limit on the side that
           holds the entropy, and not on the other
    g_new  g + sum_t a_t (w_t - 1) grad log p_t, clipped as the trainer clips

kappa is the clip coefficient of g. Self-influence makes grad H of one batch a biased
judge of that batch's step, by as much as a step changes the entropy: G remembers. Docs'
`maths.md`, section 7, has what that leaves.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from entropy_ddp.data.batch import Batch, Shard
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.estimators.baselines import (
    future_targets,
    leave_one_group_out_prediction,
    position_totals,
)
from entropy_ddp.estimators.holding import FAMILIES
from entropy_ddp.estimators.linear import slope_weights
from entropy_ddp.model.parameters import global_norm, inner_product
from entropy_ddp.model.response_tokens import TokenScores, TokenWeights
from entropy_ddp.probe.attribution import token_places
from entropy_ddp.probe.passes import summed_gradient
from entropy_ddp.probe.session import Session
from entropy_ddp.training.capture import NO_ENTROPY, TrainedBatch
from entropy_ddp.training.untouched import lookups_padded
from entropy_ddp.update.decomposition import AdamState, StepParts, step_parts
from entropy_ddp.update.step import Step, clip_coefficient

# The parameter of each family that holds the entropy most.
STRONGEST: dict[str, float] = {"repo": 1.0, "improbable_failures": 0.0}
# Of a weight: a difference that is rounding.
ROUNDING = 1e-12
# What the parts of a step need to know of it: its gradient is clipped already.
CLIPPED = Step(
    delta=torch.empty(0),
    learning_rate=1.0,
    grad_norm=None,
    clip_coef=1.0,
    num_optimizer_steps=1,
)


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What holding the entropy made of one step.

    Attributes:
        predicted_plain: pred of the trainer's own step, nats.
        predicted: of the step that is taken, nats; the same where nothing is changed.
        parameter: x.
        saturated: whether x stopped at a limit: first order does not reach `want`.
        weights: w of each token of the batch, in its order, [T]; None where nothing is
            changed.
        gradient: the clipped gradient to step with, flat, [P]; None likewise.
        grad_norm: norm of the gradient before clipping.
    """

    predicted_plain: float
    predicted: float
    parameter: float
    saturated: bool
    weights: Tensor | None
    gradient: Tensor | None
    grad_norm: float


def token_entropy(trained: TrainedBatch) -> Tensor:
    """Entropy of each of the batch's tokens, float64, [T], nats.

    Raises:
        InputError: the trainer did not compute them.
    """
    everything = trained.batch.shard(0, 1)
    entropy = trained.token_values(everything, "entropy")
    if bool(entropy.isnan().any()):
        raise InputError(NO_ENTROPY)
    return entropy


def entropy_gradient(
    session: Session, trained: TrainedBatch, entropy: Tensor
) -> Tensor:
    """grad H of the batch, summed over ranks, flat, [P]; one backward pass.

    Args:
        trained: the batch, on all ranks; it is the session's U.
        entropy: `token_entropy` of it, [T], T > 0.

    Raises:
        RunError: a value is not finite.
    """
    batch = trained.batch
    everything = batch.shard(0, 1)
    tokens = TokenScores(logp=trained.token_values(everything, "logp"), entropy=entropy)
    mean = float(entropy.mean())
    centred = _centred_weights(batch, tokens, mean) / batch.num_tokens
    each = torch.full_like(centred, 1 / batch.num_tokens)
    shard = session.shard("U")
    places = token_places(batch, shard)
    weights = _fixed(centred[places], each[places])
    flat, _ = summed_gradient(session, session.passes, shard, weights)
    return flat


def hold(
    session: Session,
    trained: TrainedBatch,
    optimizer: AdamState,
    *,
    slope: Tensor,
    gradient: Tensor,
    grad_norm: float,
    max_grad_norm: float | None,
    want: float,
    family: str,
    padding: Mapping[nn.Embedding, int],
) -> Correction:
    """The step that reaches what is wanted; one backward pass where it is not there yet.

    Where `repo` holds weights at 0 there is another, over the sequences with such tokens.

    Args:
        trained: the batch, on all ranks; it is the session's U.
        optimizer: AdamW's state before the step.
        slope: G, flat, [P].
        gradient: the clipped gradient, flat, [P].
        grad_norm: its norm before clipping.
        max_grad_norm: the norm that the trainer clips to; 0 or None for none.
        want: change of the entropy, nats.
        family: name of a family of weights.
        padding: rows of embeddings that the trainer's gradient leaves out.

    Raises:
        RunError: a number is not finite.
    """
    if not math.isfinite(grad_norm):
        raise RunError(
            f"entropy floor: the gradient of the loss has norm {grad_norm}, expected a "
            "finite one; train without the callback to see where it comes from"
        )
    members = FAMILIES[family]
    clip = clip_coefficient(max_grad_norm, grad_norm)
    predicted = _first_order(session, optimizer, gradient, slope)
    untouched = Correction(
        predicted_plain=predicted,
        predicted=predicted,
        parameter=members.neutral,
        saturated=False,
        weights=None,
        gradient=None,
        grad_norm=grad_norm,
    )
    if predicted >= want:
        return untouched
    tokens = _PolicyTokens.of(trained, padding)
    derivative = members.slope(tokens.logp, tokens.advantage, members.neutral)
    along = _policy_gradient(session, tokens, derivative)
    share = clip * _share(session, optimizer, gradient, slope, along)
    parameter, saturated = _solved(want - predicted, share, family)
    if parameter == members.neutral:
        return replace(untouched, saturated=saturated)
    weights = members.weight(tokens.logp, tokens.advantage, parameter)
    along *= parameter - members.neutral
    # What a weight that is held at its least is away from the straight line.
    bent = weights - 1 - (parameter - members.neutral) * derivative
    if bool((bent.abs() > ROUNDING).any()):
        along += _policy_gradient(session, tokens, bent)
    along.add_(gradient, alpha=1 / clip)
    norm = global_norm(along)
    along *= clip_coefficient(max_grad_norm, norm)
    return Correction(
        predicted_plain=predicted,
        predicted=_first_order(session, optimizer, along, slope),
        parameter=parameter,
        saturated=saturated,
        weights=weights,
        gradient=along,
        grad_norm=norm,
    )


def _first_order(
    session: Session, optimizer: AdamState, gradient: Tensor, slope: Tensor
) -> float:
    """<G, d> of the step with a clipped gradient, nats; without a buffer of the step."""
    slopes, gradients = map(session.passes.layout.views, (slope, gradient))
    return math.fsum(
        inner_product(slopes[name], parts.change(gradients[name]).cpu())
        for name, parts in _parts(session, optimizer, gradient)
    )


def _share(
    session: Session,
    optimizer: AdamState,
    gradient: Tensor,
    slope: Tensor,
    along: Tensor,
) -> float:
    """-<G, gain g'> with the gain of a clipped gradient, nats; g' flat, [P]."""
    slopes, alongs = map(session.passes.layout.views, (slope, along))
    return -math.fsum(
        inner_product(slopes[name], parts.gain.cpu() * alongs[name])
        for name, parts in _parts(session, optimizer, gradient)
    )


def _parts(
    session: Session, optimizer: AdamState, gradient: Tensor
) -> Iterator[tuple[str, StepParts]]:
    parameters, update = session.passes.parameters, session.config.update
    return step_parts(optimizer, parameters, gradient, CLIPPED, update)


def _solved(missing: float, share: float, family: str) -> tuple[float, bool]:
    """The parameter that adds `missing` to first order, and whether it is at a limit.

    Args:
        missing: want - pred > 0, nats.
        share: s, nats per unit of the parameter.
    """
    neutral, strongest = FAMILIES[family].neutral, STRONGEST[family]
    reach = share * (strongest - neutral)
    if reach <= 0:
        return neutral, True
    fraction = missing / reach
    return neutral + min(fraction, 1.0) * (strongest - neutral), fraction > 1


@dataclass(frozen=True, kw_only=True)
class _PolicyTokens:
    """What the weights need of every token of the batch, float64, [T] each.

    Attributes:
        on_logp: a.
        padding: rows of embeddings that the trainer's gradient leaves out.
    """

    batch: Batch
    logp: Tensor
    advantage: Tensor
    on_logp: Tensor
    padding: Mapping[nn.Embedding, int]

    @classmethod
    def of(
        cls, trained: TrainedBatch, padding: Mapping[nn.Embedding, int]
    ) -> "_PolicyTokens":
        batch = trained.batch
        everything = batch.shard(0, 1)
        return cls(
            batch=batch,
            logp=trained.token_values(everything, "logp"),
            advantage=batch.ragged.spread(batch.advantages),
            on_logp=trained.token_values(everything, "on_logp"),
            padding=padding,
        )


def _policy_gradient(session: Session, tokens: _PolicyTokens, factor: Tensor) -> Tensor:
    """sum a_t factor_t grad log p_t over all ranks, flat, [P]; one backward pass.

    Over the sequences alone that have a token whose factor is not 0.
    """
    batch, shard = tokens.batch, session.shard("U")
    values = tokens.on_logp * factor
    needed = batch.ragged.sum(values.abs())[shard.positions] > 0
    part = Shard(batch=batch, positions=shard.positions[needed])
    on_logp = values[token_places(batch, part)]
    weights = _fixed(on_logp, torch.zeros_like(on_logp))
    with lookups_padded(tokens.padding):
        flat, _ = summed_gradient(
            session, session.passes, part, weights, as_trained=True
        )
    return flat


def _fixed(on_logp: Tensor, on_entropy: Tensor) -> TokenWeights:
    """Weights of a shard's tokens that are known before the pass."""

    def weights(token: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        place = token.cpu()
        return on_logp[place], on_entropy[place]

    return weights


def _centred_weights(batch: Batch, tokens: TokenScores, mean: float) -> Tensor:
    """c of every token of the batch, before division by T; float64, [T]."""
    ragged = batch.ragged
    targets = future_targets(tokens.entropy, ragged)
    longest = int(batch.lengths.max())
    prediction = leave_one_group_out_prediction(
        targets,
        ragged.position,
        ragged.spread(batch.groups),
        position_totals(targets, ragged.position, longest),
    )
    return slope_weights(
        tokens, ragged, mean, ("rb", "per_token", "to_go", "loo"), prediction
    ).centred
