"""What the passes give of every response token, as flat token arrays of one rank."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from entropy_ddp.policy.head import FEATURES

# Random projections of the hidden state that predicts a token: what the model itself
# knows before it draws the token, for regressions on it.
NUM_PROJECTIONS = 32


def _unfilled(num_tokens: int) -> Tensor:
    """A flat token array to be filled microbatch by microbatch; NaN until then."""
    return torch.full((num_tokens,), torch.nan, dtype=torch.float64)


@dataclass(kw_only=True)
class TokenScores:
    """Flat token arrays of one rank's shard, float64 on the CPU, each [t], in nats.

    Attributes:
        logp: log-probability of each response token.
        entropy: entropy H of the distribution each token was drawn from.
        num_microbatches: number of microbatches this rank ran.
    """

    logp: Tensor
    entropy: Tensor
    num_microbatches: int = 0

    @classmethod
    def empty(cls, num_tokens: int) -> "TokenScores":
        """Arrays to be filled."""
        return cls(logp=_unfilled(num_tokens), entropy=_unfilled(num_tokens))

    def fill(self, token: Tensor, **values: Tensor) -> None:
        """Put one microbatch's values at their places in the flat arrays."""
        for name, value in values.items():
            array = self.array(name)
            # Not value.to(dtype), which leaves float64 alone within `true_float64`.
            array[token] = torch.empty(value.shape, dtype=array.dtype).copy_(value)

    def array(self, name: str) -> Tensor:
        """The flat token array of this name."""
        return getattr(self, name)


@dataclass(kw_only=True)
class DirectionalScores(TokenScores):
    """Token scores with their derivatives along a direction v.

    Attributes:
        dlogp: derivative of logp along v.
        dentropy: derivative of entropy along v.
        features: what baselines and control variates need beside these, by name: those
            of `head.distribution_features` [t], and `hidden`, random projections of
            the hidden state, float32, [t, 32]. Empty if not asked for.
    """

    dlogp: Tensor
    dentropy: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, num_tokens: int, with_features: bool = False) -> "DirectionalScores":
        """Arrays to be filled."""
        features = {}
        if with_features:
            features = {name: _unfilled(num_tokens) for name in FEATURES}
            hidden = torch.full((num_tokens, NUM_PROJECTIONS), torch.nan)
            features["hidden"] = hidden
        names = ("logp", "entropy", "dlogp", "dentropy")
        return cls(**{n: _unfilled(num_tokens) for n in names}, features=features)

    def array(self, name: str) -> Tensor:
        """The flat token array of this name."""
        return self.features[name] if name in self.features else getattr(self, name)
