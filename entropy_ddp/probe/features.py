"""What is kept of the features of E's tokens: sums, made block by block.

Baselines and control variates need some forty numbers of every token, ten times what the
slope itself needs. They enter only through sums over tokens, folds and sequences:

    moments    X'WX and X'WY of the ridge, by fold              [f, F, F + 2]
    totals     of the targets Y at every position               [K, 3]
    known      g_i = sum_k log p'_ik x_ik of every sequence     [n, F]
    zero_mean  Z_i of every sequence                            [n, m]
    surprise   sums of -log p - H and of its variance, of the   [2, 2]
               first tokens of responses and of the others

Only for the first sequences of E, on which forward and reverse mode are compared, the
ridge needs x of every token.

Shape legend: n sequences and t tokens of this rank, F predictors, K longest response,
f folds, m variates.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from entropy_ddp.config import Integrand
from entropy_ddp.data.batch import Block, Ragged, Shard
from entropy_ddp.estimators.baselines import (
    NUM_FOLDS,
    NUM_PREDICTORS,
    fold_moments,
    folds_of,
    future_targets,
    position_totals,
    predictors,
)
from entropy_ddp.estimators.control_variates import (
    VARIATES_PER_PREDICTOR,
    num_usable_predictors,
    zero_mean_sums,
)
from entropy_ddp.estimators.entropy import integrand_tokens
from entropy_ddp.model.response_tokens import NUM_PROJECTIONS, DirectionalScores

SAMPLE_FEATURES = ("top_probability", "margin", "log_variance", "hidden")


def known_before(scores: DirectionalScores, ragged: Ragged) -> Tensor:
    """x: what is known before each token is drawn, [t, F]."""
    few = predictors(scores.entropy, scores.features, ragged)
    return torch.cat([few, scores.features["hidden"].double()], dim=1)


@dataclass(kw_only=True)
class FeatureSums:
    """Sums over the blocks that were added, of this rank's tokens; float64.

    Attributes:
        moments, totals, known, zero_mean, surprise: as above; rows of sequences that
            were not added yet are zero.
        sample: features of the tokens of the first sequences, by name, [s]; empty if
            not asked for.
        num_sample_tokens: number of those tokens s.
    """

    moments: Tensor
    totals: Tensor
    known: Tensor
    zero_mean: Tensor
    surprise: Tensor
    sample: dict[str, Tensor] = field(default_factory=dict)
    num_sample_tokens: int = 0

    @classmethod
    def empty(cls, shard: Shard, num_sample_tokens: int) -> "FeatureSums":
        """Nothing added yet.

        Args:
            shard: this rank's sequences of E.
            num_sample_tokens: of how many of its first tokens the features are kept.
        """
        batch, count = shard.batch, len(shard.positions)
        width = NUM_PREDICTORS + NUM_PROJECTIONS
        usable = min(num_usable_predictors(batch.num_groups), NUM_PREDICTORS)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        return cls(
            moments=zeros(NUM_FOLDS, width, width + 2),
            totals=zeros(int(batch.lengths.max()), 3),
            known=zeros(count, width),
            zero_mean=zeros(count, usable * VARIATES_PER_PREDICTOR),
            surprise=zeros(2, 2),
            num_sample_tokens=num_sample_tokens,
        )

    def add(
        self, block: Block, scores: DirectionalScores, integrand: Integrand
    ) -> None:
        """Reduce the features of one block.

        Args:
            block: some of the shard's groups.
            scores: their tokens, with features.
            integrand: what the slope is of.
        """
        ragged, batch = block.ragged, block.shard.batch
        known = known_before(scores, ragged)
        fold = folds_of(batch.group_order[ragged.spread(block.shard.groups)])
        values = integrand_tokens(integrand, scores.logp, scores.entropy)
        target = future_targets(values, ragged)
        self.moments += fold_moments(known, target, scores.dlogp.square(), fold)
        self.totals += position_totals(target, ragged.position, len(self.totals))
        usable = self.zero_mean.shape[1] // VARIATES_PER_PREDICTOR
        self.zero_mean[block.sequences] = zero_mean_sums(
            scores, scores.features, known[:, :usable], ragged
        )
        innovation = -(scores.logp + scores.entropy)
        columns = torch.stack([innovation, scores.features["log_variance"]], dim=1)
        self.surprise.index_add_(0, (ragged.position > 0).long(), columns)
        self._keep_sample(block, scores)
        # Last: it overwrites the predictors.
        known *= scores.dlogp[:, None]
        for column, weighted in enumerate(known.T):
            self.known[block.sequences, column] = ragged.sum(weighted)

    def of_sequences(self) -> dict[str, Tensor]:
        """The arrays over sequences by name, [n, ...]."""
        return {"known": self.known, "zero_mean": self.zero_mean}

    def of_ranks(self) -> dict[str, Tensor]:
        """Those of which the sum over ranks is wanted, by name."""
        return {
            "moments": self.moments,
            "totals": self.totals,
            "surprise": self.surprise,
        }

    def _keep_sample(self, block: Block, scores: DirectionalScores) -> None:
        here = block.tokens < self.num_sample_tokens
        if not bool(here.any()):
            return
        for name in SAMPLE_FEATURES:
            values = scores.features[name]
            if name not in self.sample:
                shape = (self.num_sample_tokens, *values.shape[1:])
                self.sample[name] = values.new_empty(shape)
            self.sample[name][block.tokens[here]] = values[here]
