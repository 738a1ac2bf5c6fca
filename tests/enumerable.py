"""What is the exact answer? A policy so small that all its responses can be listed.

Every response ends with the token END or at the greatest length, so a table of all of
them with their probabilities is short, expectations are sums, and the entropy

    H(theta) = sum_s p_s(theta) A_s(theta) / sum_s p_s(theta) D_s

(A_s, D_s as in `entropy_ddp.estimators.entropy`; prompts are equally likely) is known
with its derivatives along v, by autograd of this very sum.

A `Table` holds the token arrays that scoring passes return. A sampled batch is a
selection of rows of the table of all responses, made without a model; the functions at
the end put the estimators together on a batch as the probe does.

Shape legend: S prefixes, R responses of the table, N sequences and t tokens of a batch,
B batches, n groups of G responses, V vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor
from torch.func import jvp

from entropy_ddp.config import ImportanceMode, Integrand, Normalize
from entropy_ddp.data.batch import Ragged
from entropy_ddp.estimators.baselines import (
    action_columns,
    coefficients_of,
    fitted_part,
    fold_moments,
    folds_of,
    future_targets,
    leave_one_group_out_prediction,
    position_totals,
    predictors,
)
from entropy_ddp.estimators.control_variates import zero_mean_sums
from entropy_ddp.estimators.curvature import CurvatureEstimate, curvature
from entropy_ddp.estimators.entropy import (
    EntropyChange,
    Ratio,
    Reweighting,
    all_entropy_changes,
    as_ratio,
    integrand_tokens,
    per_decision_ratio,
    prefix_log_weights,
    prefix_sums,
)
from entropy_ddp.estimators.linear import (
    Baseline,
    Score,
    Slope,
    applicable_estimators,
    sequence_terms,
    slope_from_terms,
    slope_weights,
    terms_less_prediction,
)
from entropy_ddp.estimators.midpoint import midpoint_columns, midpoint_slope
from entropy_ddp.estimators.standard_errors import Draws
from entropy_ddp.model.head import (
    FEATURES,
    directional_derivatives,
    distribution_features,
    softmax_of,
)
from entropy_ddp.model.response_tokens import NUM_EMBEDDINGS, DirectionalScores

END = 0
NUM_INPUTS = 6
NUM_HIDDEN = 3  # columns of the projection of a prefix that the ridge may use

# Rows of `Table.arrays`; e(y), its derivative e' and the hidden projections follow.
ARRAYS = (
    "logp",
    "entropy",
    "dlogp",
    "dentropy",
    "d2logp",
    "d2entropy",
    "logp_after",
    "entropy_after",
    "logp_middle",
    "entropy_middle",
    "dlogp_middle",
    "dentropy_middle",
    *FEATURES,
)
WIDE = {"embedding": 0, "dembedding": NUM_EMBEDDINGS}
"""First row after `ARRAYS` of features that are several numbers of each token."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Token arrays of some responses, as scoring at theta and theta' returns them.

    Attributes:
        ragged: layout of the token arrays.
        arrays: the rows `ARRAYS`, then those of `WIDE`, then projections of the hidden
            state, [.., t].
    """

    ragged: Ragged
    arrays: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[ARRAYS.index(name)]

    @property
    def tokens(self) -> DirectionalScores:
        """Values and first derivatives, [t] each."""
        names = ("logp", "entropy", "dlogp", "dentropy")
        return DirectionalScores(**{name: self[name] for name in names})

    @property
    def features(self) -> dict[str, Tensor]:
        """What `distribution_features` gives, [t] each, [t, 8] of `WIDE`."""
        wide = {
            name: self.arrays[len(ARRAYS) + first :][:NUM_EMBEDDINGS].T
            for name, first in WIDE.items()
        }
        return {name: self[name] for name in FEATURES} | wide

    @property
    def middle(self) -> DirectionalScores:
        """Values and first derivatives in the middle of the step, [t] each."""
        names = ("logp", "entropy", "dlogp", "dentropy")
        return DirectionalScores(**{name: self[name + "_middle"] for name in names})

    @property
    def hidden(self) -> Tensor:
        """A fixed function of the prefix of each token, [t, NUM_HIDDEN]."""
        return self.arrays[len(ARRAYS) + NUM_EMBEDDINGS * len(WIDE) :].T

    @property
    def known(self) -> Tensor:
        """x: what is known before each token, [t, F]."""
        return torch.cat([self.predictors, self.hidden], dim=1)

    @property
    def predictors(self) -> Tensor:
        """What is known before each token without `hidden`, [t, 7]."""
        return predictors(self["entropy"], self.features, self.ragged)

    def zero_mean(self) -> Tensor:
        """Z_i of the control variates, [N, m]."""
        return zero_mean_sums(self.tokens, self.features, self.predictors, self.ragged)

    def integrand(self, kind: Integrand, suffix: str = "") -> Tensor:
        """H_i, or -l_i, of each sequence; `suffix` "_after" for theta', [N]."""
        values = integrand_tokens(kind, self["logp" + suffix], self["entropy" + suffix])
        return self.ragged.sum(values)

    def ratio(self, normalize: Normalize, kind: Integrand, suffix: str = "") -> Ratio:
        """The entropy estimator, unweighted."""
        return as_ratio(normalize, self.integrand(kind, suffix), self.ragged.lengths)

    def select(self, index: Tensor) -> "Table":
        """The responses with these row numbers, in this order, [N]."""
        ragged = Ragged(self.ragged.lengths[index])
        token = ragged.spread(self.ragged.starts[index]) + ragged.position
        return Table(ragged=ragged, arrays=self.arrays.index_select(1, token))


class Policy:
    """Two layers from a prefix's inputs to logits, times a factor of the prompt.

    Attributes:
        vocabulary, length, num_prompts: sizes.
        prompt: prompt of each response, [R]; all responses of prompt 0 come first.
        ragged: layout of all responses.
        state: prefix of each of their tokens, [t].
        target: the token itself, [t].
        embedding: e(v), some numbers of every token, [V, 8].
    """

    def __init__(
        self, *, vocabulary: int = 5, length: int = 3, num_prompts: int = 1, seed: int
    ) -> None:
        self.vocabulary, self.length = vocabulary, length
        self.num_prompts = num_prompts
        prefixes = [
            ids
            for size in range(length)
            for ids in product(range(END + 1, vocabulary), repeat=size)
        ]
        number = {ids: i for i, ids in enumerate(prefixes)}
        responses = [
            (*ids, token)
            for ids in prefixes
            for token in range(vocabulary)
            if token == END or len(ids) == length - 1
        ]
        rows = [
            (prompt * len(prefixes) + number[ids[:k]], token)
            for prompt in range(num_prompts)
            for ids in responses
            for k, token in enumerate(ids)
        ]
        self.state, self.target = torch.tensor(rows).T
        self.ragged = Ragged(
            torch.tensor([len(ids) for ids in responses] * num_prompts)
        )
        self.prompt = torch.arange(num_prompts).repeat_interleave(len(responses))
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        shared = normal(num_prompts, 1, NUM_INPUTS)
        inputs = 0.7 * shared + normal(num_prompts, len(prefixes), NUM_INPUTS)
        self._inputs = inputs.flatten(0, 1)
        self._prompt_of_state = torch.arange(num_prompts).repeat_interleave(
            len(prefixes)
        )
        shapes = ((NUM_INPUTS, 8), (8, vocabulary), (num_prompts,))
        scales = (0.5, 0.6, 0.2)
        self._theta = [s * normal(*shape) for s, shape in zip(scales, shapes)]
        self._direction = [s * normal(*shape) for s, shape in zip(scales, shapes)]
        self.embedding = normal(vocabulary, NUM_EMBEDDINGS)

    def logits(self, eta: Tensor) -> Tensor:
        """Logits at theta + eta v, [S, V]."""
        first, second, factor = (
            p + eta * v for p, v in zip(self._theta, self._direction)
        )
        scale = factor.exp()[self._prompt_of_state, None]
        return scale * (torch.tanh(self._inputs @ first) @ second)

    def token_scores(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """log p and H of each token of all responses at theta + eta v, [t] each."""
        log_pi = torch.log_softmax(self.logits(eta), dim=-1)
        entropy = -(log_pi.exp() * log_pi).sum(-1)
        return log_pi[self.state, self.target], entropy[self.state]

    def probability(self, eta: Tensor) -> Tensor:
        """Probability of each prompt with each response at theta + eta v, [R]."""
        logp, _ = self.token_scores(eta)
        return self.ragged.sum(logp).exp() / self.num_prompts

    @cached_property
    def probabilities(self) -> Tensor:
        """The same at theta."""
        return self.probability(at(0.0))

    def entropy(
        self, eta: Tensor, normalize: Normalize, integrand: Integrand
    ) -> Tensor:
        """H(theta + eta v), of one sequence where `normalize` is `sum`; a scalar."""
        logp, entropy = self.token_scores(eta)
        probability = self.probability(eta)
        values = self.ragged.sum(integrand_tokens(integrand, logp, entropy))
        lengths = self.ragged.lengths.double()
        if normalize == "per_sequence_token_mean":
            values = values / lengths
        total = (probability * values).sum()
        if normalize == "per_token":
            return total / (probability * lengths).sum()
        return total

    def derivative(
        self,
        order: int,
        normalize: Normalize,
        integrand: Integrand = "rb",
        place: float = 0.0,
    ) -> float:
        """The order-th derivative of H in eta at a place, by autograd of the sum."""
        eta = at(place).requires_grad_()
        value = self.entropy(eta, normalize, integrand)
        for _ in range(order):
            (value,) = torch.autograd.grad(value, eta, create_graph=True)
        return float(value.detach())

    def change(
        self, eta: float, normalize: Normalize, integrand: Integrand = "rb"
    ) -> float:
        """H(theta + eta v) - H(theta)."""
        after, before = (
            float(self.entropy(at(x), normalize, integrand)) for x in (eta, 0.0)
        )
        return after - before

    def table(self, eta_after: float = 0.0) -> Table:
        """All responses; theta' = theta + eta_after v."""
        one = at(1.0)

        def first(eta: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            return jvp(self.token_scores, (eta,), (one,))

        (values, derivatives), (_, second) = jvp(first, (at(0.0),), (one,))
        after = self.token_scores(at(eta_after))
        middle, dmiddle = first(at(eta_after / 2))
        features = self._features()
        rows = [*values, *derivatives, *second, *after, *middle, *dmiddle]
        rows += [features[name] for name in FEATURES]
        arrays = torch.cat(
            [
                torch.stack(rows),
                *(features[name].T for name in WIDE),
                self.hidden_of_states[self.state].T,
            ]
        )
        return Table(ragged=self.ragged, arrays=arrays.detach())

    @property
    def hidden_of_states(self) -> Tensor:
        """What the baselines may use of the state of each prefix, [S, NUM_HIDDEN]."""
        return self._inputs[:, :NUM_HIDDEN]

    def _features(self) -> dict[str, Tensor]:
        one = at(1.0)
        logits, tangent = jvp(self.logits, (at(0.0),), (one,))
        softmax = softmax_of(logits[self.state], self.target)
        centred = tangent[self.state]
        directional_derivatives(softmax, centred, self.target)
        return distribution_features(softmax, centred, self.target, self.embedding)

    def sample(
        self, num_batches: int, num_groups: int, responses: int, seed: int
    ) -> Tensor:
        """Row numbers of batches: each group a prompt, then its responses, [B, n G]."""
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(
            self.num_prompts, (num_batches, num_groups, 1), generator=generator
        )
        uniform = torch.rand(
            num_batches, num_groups, responses, generator=generator, dtype=torch.float64
        )
        upper = self.probabilities.cumsum(0) * self.num_prompts
        index = torch.searchsorted(upper, prompt + uniform)
        return index.clamp(max=len(upper) - 1).flatten(1)

    def ordered_batches(self, num_groups: int, responses: int) -> tuple[Tensor, Tensor]:
        """Every batch there is, and its probability, [B, n G] and [B]."""
        conditional = self.probabilities * self.num_prompts
        groups, weights = [], []
        for prompt in range(self.num_prompts):
            rows = (self.prompt == prompt).nonzero().squeeze(1)
            index = torch.cartesian_prod(*[rows] * responses).view(-1, responses)
            groups.append(index)
            weights.append(conditional[index].prod(1) / self.num_prompts)
        group, weight = torch.cat(groups), torch.cat(weights)
        choice = torch.cartesian_prod(*[torch.arange(len(group))] * num_groups)
        choice = choice.view(-1, num_groups)
        return group[choice].flatten(1), weight[choice].prod(1)


def at(eta: float) -> Tensor:
    """eta as a scalar tensor, float64."""
    return torch.tensor(eta, dtype=torch.float64)


def group_numbers(num_groups: int, responses: int) -> Tensor:
    """Group of each sequence of a batch, [n G]."""
    return torch.arange(num_groups).repeat_interleave(responses)


def draws_of(num_groups: int, responses: int) -> Draws:
    """Groups that are independent draws, of this many responses each."""
    return Draws(groups=group_numbers(num_groups, responses))


# The estimators on one batch


def predictions(
    batch: Table,
    draws: Draws,
    integrand: Integrand,
    used: slice = slice(None),
    reweighting: Reweighting | None = None,
) -> dict[Baseline, Tensor]:
    """What each baseline that predicts takes from the terms of sequences, [N, 2] each.

    Args:
        used: which of the columns of `Table.known` the fitted ones are given.
        reweighting: of a batch that another policy sampled.
    """
    ragged, dlogp = batch.ragged, batch["dlogp"]
    values = integrand_tokens(integrand, batch["logp"], batch["entropy"])
    target = future_targets(values, ragged, reweighting)
    group = ragged.spread(draws.groups)
    known = batch.known[:, used]
    columns = action_columns(known, dlogp, batch.features, reweighting)
    moments = fold_moments(columns, dlogp[:, None] * target, folds_of(group))
    sums = columns.new_zeros(len(ragged.lengths), columns.shape[1])
    sums.index_add_(0, ragged.sequence_of_token, columns)
    totals = position_totals(target, ragged.position, int(ragged.lengths.max()))
    loo = leave_one_group_out_prediction(target, ragged.position, group, totals)
    fitted = {
        baseline: fitted_part(sums, coefficients, folds_of(draws.groups))
        for baseline, coefficients in coefficients_of(
            moments, len(draws.groups)
        ).items()
    }
    score = dlogp if reweighting is None else reweighting.through * dlogp
    taken = [ragged.sum(score * predicted) for predicted in loo.T]
    return {"loo": torch.stack(taken, dim=1), **fitted}


def slopes(
    batch: Table,
    draws: Draws,
    normalize: Normalize,
    integrand: Integrand = "rb",
    predicted: dict[Baseline, Tensor] | None = None,
    reweighting: Reweighting | None = None,
) -> dict[tuple[Score, Baseline], Slope]:
    """The slope by every estimator."""
    original = batch.ratio(normalize, integrand)
    if reweighting is not None:
        weights = reweighting.before.log()
        sums = prefix_sums(batch.ragged, weights, batch["entropy"], 0.0)
        original = per_decision_ratio(normalize, sums, 0.0)
    if predicted is None:
        predicted = predictions(batch, draws, integrand, reweighting=reweighting)
    found = {}
    for score, baseline in applicable_estimators(normalize, reweighting is not None):
        taken = predicted.get(baseline)
        without = baseline if taken is None else "hk"
        weights = slope_weights(
            batch.tokens,
            batch.ragged,
            original.value,
            (integrand, normalize, score, without),
            reweighting=reweighting,
        )
        terms = sequence_terms(batch.tokens, batch.ragged, weights, integrand)
        if taken is not None:
            terms = terms_less_prediction(terms, taken, original.value, normalize)
        found[score, baseline] = slope_from_terms(
            terms, original, draws, (score, baseline)
        )
    return found


def middle_slope(batch: Table, draws: Draws, normalize: Normalize) -> Slope:
    """The slope in the middle of the step."""
    mean_entropy = batch.ratio(normalize, "rb").value
    log_ratio = batch["logp_middle"] - batch["logp"]
    columns = midpoint_columns(batch.middle, log_ratio, batch.ragged, mean_entropy)
    return midpoint_slope(columns, mean_entropy, normalize, draws)


def changes(
    batch: Table, draws: Draws, normalize: Normalize, integrand: Integrand = "rb"
) -> dict[ImportanceMode, EntropyChange]:
    """Delta H from theta to theta' by every mode."""
    ratios = [batch.ratio(normalize, integrand, s) for s in ("", "_after")]
    log_ratio = batch["logp_after"] - batch["logp"]
    per_decision = None
    if integrand == "rb" and normalize != "per_sequence_token_mean":
        log_weights = prefix_log_weights(batch.ragged, log_ratio)
        shift = float(log_weights.max())
        sums = prefix_sums(batch.ragged, log_weights, batch["entropy_after"], shift)
        per_decision = per_decision_ratio(normalize, sums, shift)
    return all_entropy_changes(
        *ratios, batch.ragged.sum(log_ratio), 2.0, per_decision, draws
    )


def second_order(
    batch: Table, normalize: Normalize, integrand: Integrand = "rb"
) -> dict[str, Tensor]:
    """Per-sequence derivatives along v."""
    first, second = (
        {name: batch.ragged.sum(batch[d + name]) for name in ("logp", "entropy")}
        for d in ("d", "d2")
    )
    numerators = [
        as_ratio(
            normalize,
            integrand_tokens(integrand, sums["logp"], sums["entropy"]),
            batch.ragged.lengths,
        ).numerator
        for sums in (first, second)
    ]
    return {
        "dlogp": first["logp"],
        "d2logp": second["logp"],
        "dnumerator": numerators[0],
        "d2numerator": numerators[1],
    }


def curvature_of(
    batch: Table, draws: Draws, normalize: Normalize, integrand: Integrand = "rb"
) -> CurvatureEstimate:
    """The second derivative on a batch."""
    derivatives = second_order(batch, normalize, integrand)
    return curvature(batch.ratio(normalize, integrand), draws, **derivatives)
