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

# Token arrays that `score` returns at order 1 beside the derivatives.
FEATURES = (
    "top_probability",
    "margin",
    "log_variance",
    "collision",
    "dcollision",
    "dtop",
    "is_top",
)


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

    Tangents of zero-probability tokens may be anything finite. The probabilities are
    overwritten.
    """
    mean = (probabilities * tangent).sum(-1)
    dlogp = tangent.gather(-1, targets[:, None]).squeeze(-1) - mean
    centred = tangent - mean[:, None]
    dentropy = -(probabilities.mul_(log_probabilities) * centred).sum(-1)
    return dlogp, dentropy


def distribution_features(
    tangent: Tensor,
    targets: Tensor,
    entropy: Tensor,
    probabilities: Tensor,
    log_probabilities: Tensor,
) -> dict[str, Tensor]:
    """What baselines and control variates need of each distribution, [m] each.

    Known before the token: `top_probability`; `margin`, the difference of the two
    largest probabilities; `log_variance` = Var(l); `collision` = E[p]; and, with
    (log p_v)' = z'_v - E[z'], `dcollision` = E[p (log p)'] and `dtop`, the top token's
    p (log p)'. `is_top`: 1 if the target is the most probable token.

    Args:
        tangent: z', [m, V].
        targets: token ids, [m].
        entropy: H, [m].
        probabilities: p, [m, V].
        log_probabilities: l, [m, V], zero where p is zero.
    """
    top, top_ids = probabilities.topk(min(2, probabilities.shape[1]), dim=-1)
    mean = (probabilities * tangent).sum(-1)
    # Differences and not E[l^2] - H^2, which would lose digits when H is large.
    deviation = log_probabilities + entropy[:, None]
    squares = probabilities.square()
    collision = squares.sum(-1)
    top_tangent = tangent.gather(-1, top_ids[:, :1]).squeeze(-1)
    return {
        "top_probability": top[:, 0],
        "margin": top[:, 0] - top[:, -1],
        "log_variance": (probabilities * deviation.square_()).sum(-1),
        "collision": collision,
        "dcollision": (squares * tangent).sum(-1) - collision * mean,
        "dtop": top[:, 0] * (top_tangent - mean),
        "is_top": (targets == top_ids[:, 0]).to(entropy),
    }


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
