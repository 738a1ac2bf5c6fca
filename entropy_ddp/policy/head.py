"""Log-probability and entropy of tokens from logits, with derivatives in closed form.

For one token with logits z (already divided by the sampling temperature), y the sampled
token, p = softmax(z), l = log p, E and Cov taken under p, and z' the tangent of z:

    log p_y              = z_y - logsumexp(z)
    H                    = -E[l]                                  (nats)
    (log p_y)'           = z'_y - E[z']
    H'                   = -Cov(l, z') = -E[l (z' - E[z'])]
    d log p_y / d z_v    = 1[v = y] - p_v
    d H / d z_v          = -p_v (l_v + H)

A token of probability zero (a logit of minus infinity) contributes nothing to any of
the sums: 0 log 0 = 0.

Shape legend: m tokens of one chunk, V vocabulary.
"""

import torch
from torch import Tensor


def log_softmax_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Log-probability of the targets, entropy, and what the derivatives need.

    Args:
        logits: logits over temperature, in the dtype of the sums, [m, V].
        targets: token ids, [m].

    Returns:
        log p_y [m], H [m], p [m, V] and l [m, V], l with zeros where p is zero.
    """
    log_probabilities = torch.log_softmax(logits, dim=-1)
    logp = log_probabilities.gather(-1, targets[:, None]).squeeze(-1)
    probabilities = log_probabilities.exp()
    log_probabilities.masked_fill_(log_probabilities == -torch.inf, 0.0)
    entropy = -(probabilities * log_probabilities).sum(-1)
    return logp, entropy, probabilities, log_probabilities


def directional_derivatives(
    tangent: Tensor, targets: Tensor, probabilities: Tensor, log_probabilities: Tensor
) -> tuple[Tensor, Tensor]:
    """(log p_y)' [m] and H' [m] along the tangent z' of the logits [m, V].

    Tangents of zero-probability tokens may be anything finite.
    """
    mean = (probabilities * tangent).sum(-1)
    dlogp = tangent.gather(-1, targets[:, None]).squeeze(-1) - mean
    centred = tangent - mean[:, None]
    dentropy = -(probabilities.mul_(log_probabilities) * centred).sum(-1)
    return dlogp, dentropy


def logits_gradient(
    weights: tuple[Tensor, Tensor],
    targets: Tensor,
    entropy: Tensor,
    probabilities: Tensor,
    log_probabilities: Tensor,
) -> Tensor:
    """Gradient [m, V] of sum(a log p_y + b H) with respect to the logits.

    Args:
        weights: a and b, each [m].
        targets: token ids, [m].
        entropy: H, [m].
        probabilities: p, [m, V]; overwritten.
        log_probabilities: l, [m, V]; overwritten.
    """
    logp_weights, entropy_weights = weights
    # -p (a + b (l + H)), then a at the target: one buffer, no temporaries.
    slope = log_probabilities.add_(entropy[:, None]).mul_(entropy_weights[:, None])
    gradient = slope.add_(logp_weights[:, None]).mul_(probabilities).neg_()
    return gradient.scatter_add_(-1, targets[:, None], logp_weights[:, None])
