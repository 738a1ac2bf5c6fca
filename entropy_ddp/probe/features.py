"""What is kept of the features of E's tokens: sums, made block by block.

Baselines and control variates need some forty numbers of every token, ten times what the
slope itself needs. They enter only through sums over tokens, folds and sequences:

    moments    sum F F' and sum F log p' Y, by fold             [f, M, M + 2]
    totals     of the targets Y at every position               [K, 3]
    columns    sum_k F_ik of every sequence                     [n, M]
    zero_mean  Z_i of every sequence                            [n, m]
    surprise   sums of -log p - H and of its variance, of the   [2, 2]
               first tokens of responses and of the others

Only for the first sequences of E, on which forward and reverse mode are compared, fitted
baselines need x and the projected embeddings of every token.

Shape legend: n sequences and t tokens of this rank, M columns F_ik of the regression (9
for each predictor), K longest response, f folds, m variates.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from entropy_ddp.config import Integrand
from entropy_ddp.data.batch import Block, Ragged, Shard
from entropy_ddp.estimators.baselines import (
    NUM_FOLDS,
    NUM_PREDICTORS,
    action_columns,
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
from entropy_ddp.estimators.entropy import Reweighting, integrand_tokens
from entropy_ddp.model.response_tokens import (
    NUM_EMBEDDINGS,
    NUM_PROJECTIONS,
    DirectionalScores,
)

_ACTION_TOKENS = 1 << 13
SAMPLE_FEATURES = (
    "top_probability",
    "margin",
    "log_variance",
    "hidden",
    "embedding",
    "dembedding",
)


def known_before(scores: DirectionalScores, ragged: Ragged) -> Tensor:
    """x: what is known before each token is drawn, [t, F]."""
    few = predictors(scores.entropy, scores.features, ragged)
    return torch.cat([few, scores.features["hidden"].double()], dim=1)


@dataclass(kw_only=True)
class FeatureSums:
    """Sums over the blocks that were added, of this rank's tokens; float64.

    Attributes:
        moments, totals, columns, zero_mean, surprise: as above; rows of sequences that
            were not added yet are zero.
        sample: features of the tokens of the first sequences, by name, [s]; empty if
            not asked for.
        num_sample_tokens: number of those tokens s.
    """

    moments: Tensor
    totals: Tensor
    columns: Tensor
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
        width = (NUM_PREDICTORS + NUM_PROJECTIONS) * (1 + NUM_EMBEDDINGS)
        usable = min(num_usable_predictors(batch.num_groups), NUM_PREDICTORS)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        return cls(
            moments=zeros(NUM_FOLDS, width, width + 2),
            totals=zeros(int(batch.lengths.max()), 3),
            columns=zeros(count, width),
            zero_mean=zeros(count, usable * VARIATES_PER_PREDICTOR),
            surprise=zeros(2, 2),
            num_sample_tokens=num_sample_tokens,
        )

    def add(
        self,
        block: Block,
        scores: DirectionalScores,
        integrand: Integrand,
        reweighting: Reweighting | None = None,
    ) -> None:
        """Reduce the features of one block.

        Args:
            block: some of the shard's groups.
            scores: their tokens, with features.
            integrand: what the slope is of.
            reweighting: of E sampled by another policy.
        """
        ragged, batch = block.ragged, block.shard.batch
        known = known_before(scores, ragged)
        fold = folds_of(batch.group_order[ragged.spread(block.shard.groups)])
        values = integrand_tokens(integrand, scores.logp, scores.entropy)
        target = future_targets(values, ragged, reweighting)
        wanted = target * scores.dlogp[:, None]
        # Some of the tokens at a time: the columns are 2.8 kB of each.
        for first in range(0, len(known), _ACTION_TOKENS):
            here = slice(first, first + _ACTION_TOKENS)
            columns = action_columns(
                known[here],
                scores.dlogp[here],
                {n: scores.features[n][here] for n in ("embedding", "dembedding")},
                None if reweighting is None else reweighting.at(here),
            )
            self.moments += fold_moments(columns, wanted[here], fold[here])
            token = torch.arange(first, first + len(columns))
            place = block.sequences[ragged.sequence_at(token)]
            self.columns.index_add_(0, place, columns)
        self.totals += position_totals(target, ragged.position, len(self.totals))
        usable = self.zero_mean.shape[1] // VARIATES_PER_PREDICTOR
        self.zero_mean[block.sequences] = zero_mean_sums(
            scores, scores.features, known[:, :usable], ragged
        )
        innovation = -(scores.logp + scores.entropy)
        columns = torch.stack([innovation, scores.features["log_variance"]], dim=1)
        self.surprise.index_add_(0, (ragged.position > 0).long(), columns)
        self._keep_sample(block, scores)

    def of_sequences(self) -> dict[str, Tensor]:
        """The arrays over sequences by name, [n, ...]."""
        return {"columns": self.columns, "zero_mean": self.zero_mean}

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
