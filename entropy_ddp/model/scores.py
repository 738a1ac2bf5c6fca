"""What the passes give of every response token, as flat token arrays of one rank."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from entropy_ddp.model.head import FEATURES

# Random projections of the hidden state that predicts a token: what the model itself
# knows before it draws the token, for regressions on it.
NUM_PROJECTIONS = 32


# What `score` returns of every token at order 1.
DERIVATIVES = ("logp", "entropy", "dlogp", "dentropy")


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
        num_extra_microbatches: how many of them there are because memory ran out.
        routing: of mixtures of experts, one number for the experts of each token,
            int64; None of other models.
    """

    logp: Tensor
    entropy: Tensor
    num_microbatches: int = 0
    num_extra_microbatches: int = 0
    routing: Tensor | None = None

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

    def put_routing(self, token: Tensor, routing: Tensor) -> None:
        """Put the routing of some of the tokens at its places."""
        if self.routing is None:
            self.routing = torch.zeros(len(self.logp), dtype=torch.int64)
        self.routing[token] = routing

    def array(self, name: str) -> Tensor:
        """The flat token array of this name."""
        return getattr(self, name)

    def arrays(self) -> dict[str, Tensor]:
        """The flat token arrays that are there, without features, by name."""
        names = ("logp", "entropy", "dlogp", "dentropy", "routing")
        found = {name: getattr(self, name, None) for name in names}
        return {name: array for name, array in found.items() if array is not None}

    def first(self, count: int) -> "TokenScores":
        """The first tokens; their arrays share memory with these."""
        return TokenScores(logp=self.logp[:count], entropy=self.entropy[:count])


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
        return cls(**{n: _unfilled(num_tokens) for n in DERIVATIVES}, features=features)

    def put(self, tokens: Tensor, scores: "DirectionalScores") -> None:
        """Put the scores of some of the tokens at their places; their features are not.

        Args:
            tokens: places of the scores' tokens among these, [m].
            scores: of those tokens.
        """
        self.fill(tokens, **{name: scores.array(name) for name in DERIVATIVES})
        self.num_microbatches += scores.num_microbatches
        self.num_extra_microbatches += scores.num_extra_microbatches
        if scores.routing is not None:
            self.put_routing(tokens, scores.routing)

    def at(self, tokens: Tensor) -> "DirectionalScores":
        """The scores of some of the tokens [m], without features."""
        arrays = {name: self.array(name)[tokens] for name in DERIVATIVES}
        return DirectionalScores(**arrays)

    def array(self, name: str) -> Tensor:
        """The flat token array of this name."""
        return self.features[name] if name in self.features else getattr(self, name)
