"""The policy-gradient loss as a weight of every token's log-probability.

Every loss has the form L = -sum_i q_i sum_k (f(log p_{i,k}) - beta KL_{i,k}) with, per
sequence i in group b of G_b responses (N sequences, N_b groups, lengths T_i, advantages
A_i):

    dr_grpo   q_i = 1 / (N_b G_b L_b)       f = A log p    averaged over groups
    dr_grpo   q_i = 1 / (N L_b)             f = A log p    averaged over responses
    grpo      q_i = 1 / (N T_i)             f = A log p
    dapo      q_i = 1 / sum_j T_j           f = A log p
    nll       q_i = 1 / sum_j T_j           f = log p

With the clipped ratio, f is the PPO surrogate min(rho A, clip(rho, 1 - eps_low,
1 + eps_high) A), rho = p / p_sampler, whose derivative by log p is rho A where the
unclipped branch is the smaller one, and zero elsewhere.

KL is an estimate of the divergence from a reference policy, r = log p_ref - log p:

    k3            exp(r) - r - 1             derivative by log p: 1 - exp(r)
    k3_weighted   rho (exp(r) - r - 1)       derivative by log p: -rho r

where on policy rho has the value 1 and the derivative 1 by log p. The expectation of the
latter's derivative is the gradient of the divergence.
"""

import torch
from torch import Tensor

from entropy_ddp.config import Update
from entropy_ddp.data.batch import Batch, Shard
from entropy_ddp.errors import InputError
from entropy_ddp.model.response_tokens import TokenWeights


def sequence_coefficients(batch: Batch, update: Update) -> Tensor:
    """The factor q_i of each sequence of the whole batch, float64, [N].

    A sequence without tokens has no log-probability to weigh; its factor is finite.
    """
    lengths = batch.lengths.clamp(min=1).double()
    if update.loss == "grpo":
        return 1 / (len(batch) * lengths)
    if update.loss in ("dapo", "nll"):
        return torch.full_like(lengths, 1 / batch.num_tokens)
    if update.length_norm == "group_max":
        longest = torch.ones(batch.num_groups, dtype=torch.float64)
        longest.scatter_reduce_(0, batch.groups, lengths, "amax")
        divisor = longest[batch.groups]
    else:
        divisor = torch.full_like(lengths, update.length_norm)
    if update.average_over == "responses":
        return 1 / (len(batch) * divisor)
    return 1 / (batch.num_groups * batch.group_sizes[batch.groups] * divisor)


def loss_weights(
    shard: Shard, update: Update, reference: Tensor | None = None
) -> TokenWeights:
    """dL / d log p of every token of this rank's shard, as `pull_back` wants it.

    Args:
        shard: this rank's sequences of U.
        reference: log p of the shard's tokens under the reference policy, [t]; needed
            if the loss has a KL term.

    Raises:
        InputError: `ratio: clipped` and a sequence has no sampling log-probs.
    """
    coefficients = sequence_coefficients(shard.batch, update)[shard.positions]
    ragged = shard.ragged
    if update.loss == "nll":
        advantages = torch.ones_like(coefficients)
    else:
        advantages = shard.batch.advantages[shard.positions]
    sampling = None
    if update.ratio == "clipped":
        require_sampling_logprobs(shard.batch, "update.ratio: clipped")
        sampling = shard.sampling_logprobs
    assert reference is not None or not update.kl_coefficient

    def weights(token: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        place = token.cpu()
        sequence = ragged.sequence_at(place)
        advantage = advantages[sequence]
        own = logp.double().cpu()
        slope, ratio = advantage, torch.ones_like(advantage)
        if sampling is not None:
            # rho = p / p_sampler
            ratio = (own - sampling[place]).exp()
            # Where the clipped branch is the smaller one, the surrogate is constant.
            clipped = torch.where(
                advantage > 0,
                ratio > 1 + update.epsilon_high,
                ratio < 1 - update.epsilon_low,
            )
            slope = (ratio * advantage).masked_fill(clipped, 0.0)
        if reference is not None:
            divergence = _divergence_slope(reference[place] - own, ratio, update)
            # The objective is f - beta KL.
            slope = slope - update.kl_coefficient * divergence
        # Minus: the loss falls where the objective rises.
        on_logp = (-coefficients[sequence] * slope).to(logp.device)
        return on_logp, torch.zeros_like(on_logp)

    return weights


def _divergence_slope(excess: Tensor, ratio: Tensor, update: Update) -> Tensor:
    """Derivative of the KL estimate by log p, of tokens with r = `excess`, [m]."""
    if update.kl_estimator == "k3_weighted":
        return -ratio * excess
    return -excess.expm1()


def require_sampling_logprobs(batch: Batch, key: str) -> None:
    """Check that every sequence has the sampler's log-probabilities.

    Args:
        key: the setting that needs them, as a message names it.

    Raises:
        InputError: one has none, naming its line.
    """
    pairs = zip(batch.column("index"), batch.column("has_logprobs"))
    for index, is_recorded in pairs:
        if not is_recorded:
            raise InputError(
                f"{key} needs sampling_logprobs in every row of {batch.split}; "
                f"line {index + 1} has none"
            )
