"""Log-probability and entropy of tokens from logits, with derivatives in closed form.

For one token with logits z (divided by the sampling temperature), y the sampled token,
p = softmax(z), l = log p, E and Cov taken under p, and z' the tangent of z:

    log p_y              = z_y - logsumexp(z)
    H                    = -E[l]                                  (nats)
    (log p_y)'           = z'_y - E[z']
    H'                   = -Cov(l, z') = -E[l (z' - E[z'])]
    d log p_y / d z_v    = 1[v = y] - p_v
    d H / d z_v          = -p_v (l_v + H)
    d E[u] / d z_v       = p_v (u_v - E[u])      (u any numbers of the tokens)

With x = z - max z and s = sum exp x these are sums of exp x times something, each taken
once: H = log s - sum(x exp x) / s has no cancellation, as neither part is negative.

A token of probability zero (a logit of minus infinity) contributes nothing to any of
the sums: 0 log 0 = 0.

Everything here is of a few rows at a time (`row_blocks`), wide enough for one core's
cache: the sums over a large vocabulary then cost a fraction of the output layer.

Shape legend: r rows of one block, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
# Elements of a block on the CPU: 1 MiB of float64.
BLOCK_ELEMENTS = 1 << 17
# exp of anything below is zero in every dtype; finite, so that 0 times it is 0.
_LOWEST = -1e4


@dataclass(frozen=True, kw_only=True)
class LogitsMap:
    """What a model does to each value x of its output layer: z = c tanh(s x / c), or s x.

    Attributes:
        scale: s.
        cap: c; None for no cap.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitsMap":
        """The map that a Hugging Face configuration declares.

        Soft-capping as in Gemma, scales as in Cohere, Falcon-H1 and Granite. Whether
        the model does this, and nothing else, is for the self-check to find out.
        """
        values = {name: getattr(config, name, None) for name in _MAP_SETTINGS}
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and value
        }
        scale = 1.0
        for name in ("logit_scale", "lm_head_multiplier"):
            scale *= numbers.get(name, 1.0)
        caps = (numbers.get(name) for name in _CAPS)
        return cls(
            scale=scale / numbers.get("logits_scaling", 1.0),
            cap=next((cap for cap in caps if cap), None),
        )

    def over(self, temperature: float) -> "LogitsMap":
        """The same map followed by a division by the temperature."""
        cap = None if self.cap is None else self.cap / temperature
        return LogitsMap(scale=self.scale / temperature, cap=cap)

    def apply_(self, outputs: Tensor) -> Tensor:
        """z in place of the values of the output layer, [r, V]."""
        if self.scale != 1:
            outputs.mul_(self.scale)
        return (
            outputs
            if self.cap is None
            else outputs.div_(self.cap).tanh_().mul_(self.cap)
        )

    def derivative_(self, outputs: Tensor) -> Tensor:
        """dz/dx = s (1 - tanh(s x / c)^2) of a capped map, in place of x, [r, V]."""
        assert self.cap is not None
        slope = outputs.mul_(self.scale / self.cap).tanh_().square_().neg_().add_(1)
        return slope.mul_(self.scale)


_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MAP_SETTINGS = (*_CAPS, "logit_scale", "lm_head_multiplier", "logits_scaling")


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """The distributions of r tokens, unnormalised, and what was drawn from them.

    Attributes:
        shifted: x = z - max z, not below -1e4, [r, V].
        weights: exp x, [r, V].
        scratch: memory that anyone may write to, [r, V].
        total: s = sum exp x, [r].
        mean: E[x], [r].
        logp: log-probability of the targets, [r].
        entropy: H, [r].
    """

    shifted: Tensor
    weights: Tensor
    scratch: Tensor
    total: Tensor
    mean: Tensor
    logp: Tensor
    entropy: Tensor


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows of [m, V]; on a GPU all rows at once."""
    count, width = logits.shape
    size = max(1, BLOCK_ELEMENTS // width)
    if logits.device.type != "cpu":
        size = max(1, count)
    return (slice(i, i + size) for i in range(0, count, size))


class Workspace:
    """Memory for the blocks of one chunk, used again for each of them.

    Fresh megabytes for every operation of every block cost more, in page faults, than
    the operations.

    Args:
        dtype: dtype of the sums over the vocabulary.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor) -> Tensor:
        """Uninitialised, of the shape and on the device of a block [r, V]."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < len(like):
            buffer = torch.empty(like.shape, dtype=self.dtype, device=like.device)
            self._buffers[name] = buffer
        return buffer[: len(like)]

    def copy(self, name: str, values: Tensor) -> Tensor:
        """A copy of a block, in the dtype of the sums."""
        return self.take(name, values).copy_(values)


def softmax_of(
    logits: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    workspace: Workspace | None = None,
    logits_map: LogitsMap = LogitsMap(),
) -> Softmax:
    """The distributions of a block of rows; the logits are left alone.

    Args:
        logits: values of the output layer of any floating-point type, neither mapped
            nor over temperature, [r, V].
        targets: token ids, [r].
        temperature: what they are divided by.
        workspace: where the result's [r, V] tensors live, until the next block.
        logits_map: what the model makes of them.
    """
    workspace = workspace or Workspace()
    shifted = logits_map.over(temperature).apply_(workspace.copy("shifted", logits))
    shifted -= shifted.amax(-1, keepdim=True)
    # Before the clamp: log p of an impossible token is minus infinity.
    target = shifted.gather(-1, targets[:, None]).squeeze(-1)
    weights = torch.exp(shifted, out=workspace.take("weights", logits))
    shifted.clamp_(min=_LOWEST)
    total = weights.sum(-1)
    mean = torch.linalg.vecdot(weights, shifted) / total
    logarithm = total.log()
    return Softmax(
        shifted=shifted,
        weights=weights,
        scratch=workspace.take("scratch", logits),
        total=total,
        mean=mean,
        logp=target - logarithm,
        entropy=logarithm - mean,
    )


def mapped_tangent(
    logits: Tensor, tangent: Tensor, logits_map: LogitsMap, workspace: Workspace
) -> Tensor:
    """Tangent [r, V] of the mapped logits, in the workspace."""
    wide = workspace.copy("tangent", tangent)
    if logits_map.cap is not None:
        return wide.mul_(logits_map.derivative_(workspace.copy("scratch", logits)))
    return wide if logits_map.scale == 1 else wide.mul_(logits_map.scale)


def directional_derivatives(
    softmax: Softmax, tangent: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """(log p_y)' [r] and H' [r] along the tangent z' of the logits.

    Args:
        softmax: the distributions.
        tangent: z' in the dtype of the sums, [r, V]; overwritten by z' - E[z'].
            Tangents of zero-probability tokens may be anything finite.
        targets: token ids, [r].
    """
    weights, total = softmax.weights, softmax.total
    tangent -= (torch.linalg.vecdot(weights, tangent) / total)[:, None]
    dlogp = tangent.gather(-1, targets[:, None]).squeeze(-1)
    weighted = torch.mul(weights, softmax.shifted, out=softmax.scratch)
    dentropy = -torch.linalg.vecdot(weighted, tangent) / total
    return dlogp, dentropy


def distribution_features(
    softmax: Softmax, centred_tangent: Tensor, targets: Tensor, embedding: Tensor
) -> dict[str, Tensor]:
    """What baselines and control variates need of each distribution, [r] each.

    Known before the token: `top_probability`; `margin`, the difference of the two
    largest probabilities; `log_variance` = Var(l); `collision` = E[p]; and, with
    (log p_v)' = z'_v - E[z'], `dcollision` = E[p (log p)'] and `dtop`, the top token's
    p (log p)'. `is_top`: 1 if the target is the most probable token. With e(v) a few
    numbers of every token, `embedding` = e(y) and `dembedding` = E[e (log p)'], the
    derivative of E[e], [r, A] each.

    Args:
        softmax: the distributions.
        centred_tangent: z' - E[z'], [r, V].
        targets: token ids, [r].
        embedding: e(v), in the dtype of the sums, [V, A].
    """
    weights, total, scratch = softmax.weights, softmax.total, softmax.scratch
    top, top_ids = weights.topk(min(2, weights.shape[1]), dim=-1)
    top = top / total[:, None]
    # Differences and not E[l^2] - H^2, which would lose digits when H is large.
    torch.sub(softmax.shifted, softmax.mean[:, None], out=scratch).square_()
    log_variance = torch.linalg.vecdot(weights, scratch) / total
    squares = torch.square(weights, out=scratch)
    collision = squares.sum(-1) / total.square()
    dcollision = torch.linalg.vecdot(squares, centred_tangent) / total.square()
    top_derivative = centred_tangent.gather(-1, top_ids[:, :1]).squeeze(-1)
    # The squares are used up: exp x (log p)' takes their place.
    derivative = torch.mul(weights, centred_tangent, out=scratch)
    return {
        "top_probability": top[:, 0],
        "margin": top[:, 0] - top[:, -1],
        "log_variance": log_variance,
        "collision": collision,
        "dcollision": dcollision,
        "dtop": top[:, 0] * top_derivative,
        "is_top": (targets == top_ids[:, 0]).to(total),
        "embedding": embedding[targets],
        "dembedding": derivative @ embedding / total[:, None],
    }


def logits_gradient(
    softmax: Softmax,
    weights: tuple[Tensor, Tensor],
    targets: Tensor,
    values: Tensor | None = None,
) -> Tensor:
    """Gradient [r, V] of sum(a log p_y + b H + E[u]) with respect to the logits z.

    Args:
        softmax: the distributions; its [r, V] tensors are overwritten.
        weights: a and b, each [r].
        targets: token ids, [r].
        values: u, numbers of every token, [r, V]; None for none.
    """
    logp_weights, entropy_weights = weights
    # -p (a + b (l + H)), then a at the target: one buffer, no temporaries.
    slope = softmax.shifted.sub_(softmax.mean[:, None]).mul_(entropy_weights[:, None])
    probabilities = softmax.weights.div_(softmax.total[:, None])
    slope = slope.add_(logp_weights[:, None])
    if values is not None:
        # dE[u]/dz_v = p_v (u_v - E[u]).
        slope -= values - torch.linalg.vecdot(probabilities, values)[:, None]
    gradient = slope.mul_(probabilities).neg_()
    return gradient.scatter_add_(-1, targets[:, None], logp_weights[:, None])
