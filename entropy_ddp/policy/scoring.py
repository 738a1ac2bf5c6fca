"""The two ways in which everything here needs the model: `score` and `pull_back`.

`score` is a teacher-forced forward pass that gives, for every response token, its
log-probability and the entropy of the distribution it was drawn from, and at order 1
also their derivatives along a direction in parameter space (forward mode, nothing is
stored). `pull_back` adds the gradient of sum(a log p + b H) over all response tokens
into one flat buffer (reverse mode, one backward per microbatch).

Only the hidden states at response positions reach the output layer, and those in chunks
of tokens: a [batch, length, vocabulary] tensor never exists.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from entropy_ddp.errors import RunError
from entropy_ddp.policy.forward_mode import dual_parameters, halves
from entropy_ddp.policy.head import (
    FEATURES,
    directional_derivatives,
    distribution_features,
    log_softmax_statistics,
    logits_gradient,
)
from entropy_ddp.policy.parameters import ParameterLayout
from entropy_ddp.policy.precision import precision_context
from entropy_ddp.rollouts.batch import Shard
from entropy_ddp.rollouts.microbatch import Microbatch, make_microbatches

# Elements of one chunk's [tokens, vocabulary] block: 64 MiB of float64 at most.
CHUNK_ELEMENTS = 1 << 23

# Random projections of the hidden state that predicts a token: what the model itself
# knows before it draws the token, for regressions on it.
NUM_PROJECTIONS = 32

# (flat token places [m], log p [m], H [m]) -> weights a [m] of log p and b [m] of H.
TokenWeights = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


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


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """How the passes run; none of these changes a result beyond rounding.

    Attributes:
        temperature: sampling temperature; logits are divided by it. This one is part
            of the definition of the policy.
        entropy_dtype: dtype of the sums over the vocabulary.
        tokens_per_microbatch: budget of padded tokens.
    """

    temperature: float = 1.0
    entropy_dtype: torch.dtype = torch.float64
    tokens_per_microbatch: int = 4096


class ResponseTokens(nn.Module):
    """A causal language model seen as a function of response tokens only.

    Args:
        causal_lm: a Hugging Face causal language model, with or without an adapter.
        settings: temperature and dtype of the sums.
    """

    def __init__(self, causal_lm: nn.Module, settings: ScoringSettings) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.settings = settings

    @property
    def transformer(self) -> nn.Module:
        """The model below the output layer."""
        return self._unwrapped.base_model

    @property
    def output_layer(self) -> nn.Module:
        """The output layer: hidden state to logits."""
        return self._unwrapped.get_output_embeddings()

    @property
    def _unwrapped(self) -> nn.Module:
        """The Hugging Face model, adapter layers inside, without PEFT's wrapper."""
        model = self.causal_lm
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def hidden_states(self, microbatch: Microbatch) -> Tensor:
        """Hidden states that predict the response tokens, [m, width]."""
        output = self.transformer(input_ids=microbatch.input_ids, use_cache=False)
        return output.last_hidden_state[microbatch.row, microbatch.column]

    def projected(self, hidden: Tensor) -> Tensor:
        """Hidden states in a fixed random subspace, [m, NUM_PROJECTIONS]."""
        generator = torch.Generator().manual_seed(0)
        shape = (hidden.shape[1], NUM_PROJECTIONS)
        directions = torch.randn(shape, generator=generator) / hidden.shape[1] ** 0.5
        return hidden @ directions.to(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over temperature in the model's dtype, [m, V]."""
        return self.output_layer(hidden) / self.settings.temperature

    def chunks(self, hidden: Tensor) -> Iterable[slice]:
        """Slices of the m tokens whose logits fit the chunk budget."""
        weight = self.output_layer.weight
        size = max(1, CHUNK_ELEMENTS // weight.shape[0])
        return (slice(i, i + size) for i in range(0, len(hidden), size))

    def forward(
        self, microbatch: Microbatch, weights: TokenWeights
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The surrogate whose gradient is wanted, and log p [m] and H [m] without one.

        Returns:
            sum(a log p + b H) as a differentiable scalar, log p, H.
        """
        hidden = self.hidden_states(microbatch)
        trainable = [p for p in self.output_layer.parameters() if p.requires_grad]
        return _WeightedSum.apply(self, microbatch, weights, hidden, *trainable)


class _WeightedSum(torch.autograd.Function):
    """sum(a log p + b H) of tokens, from their hidden states.

    The gradient with respect to hidden states and output layer is taken during the
    forward pass, chunk by chunk, as the weights are known there: the logits are
    computed once and never stored.
    """

    @staticmethod
    def forward(
        ctx: Any,
        policy: ResponseTokens,
        microbatch: Microbatch,
        weights: TokenWeights,
        hidden: Tensor,
        *trainable: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        logps, entropies, hidden_gradients = [], [], []
        gradients = [torch.zeros_like(parameter) for parameter in trainable]
        for chunk in policy.chunks(hidden):
            targets = microbatch.target_ids[chunk]
            with torch.enable_grad():
                piece = hidden[chunk].detach().requires_grad_()
                logits = policy.logits(piece)
            values, cotangent = _chunk_cotangent(
                logits.detach().to(policy.settings.entropy_dtype),
                targets,
                partial(weights, microbatch.token[chunk]),
            )
            surrogate, logp, entropy = values
            total += surrogate
            logps.append(logp)
            entropies.append(entropy)
            into_hidden, *into_layer = torch.autograd.grad(
                logits, [piece, *trainable], cotangent.to(logits.dtype)
            )
            hidden_gradients.append(into_hidden)
            for gradient, addition in zip(gradients, into_layer):
                gradient += addition
        ctx.save_for_backward(torch.cat(hidden_gradients), *gradients)
        logp, entropy = torch.cat(logps), torch.cat(entropies)
        ctx.mark_non_differentiable(logp, entropy)
        return total, logp, entropy

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = outputs[0]
        return (
            None,
            None,
            None,
            *(saved * scale.to(saved.dtype) for saved in ctx.saved_tensors),
        )


def _chunk_cotangent(
    logits: Tensor,
    targets: Tensor,
    weights: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(sum(a log p + b H), log p, H) and its gradient with respect to the logits."""
    logp, entropy, probabilities, log_probabilities = log_softmax_statistics(
        logits, targets
    )
    a, b = (w.to(logits) for w in weights(logp, entropy))
    total = (a * logp + b * entropy).sum(dtype=torch.float64)
    gradient = logits_gradient(
        (a, b), targets, entropy, probabilities, log_probabilities
    )
    return (total, logp, entropy), gradient


@dataclass(kw_only=True)
class Passes:
    """Both passes over one rank's shards, and the count of what they cost.

    Attributes:
        tokens: the policy as a function of response tokens.
        wrapped: the same module inside DistributedDataParallel, or itself when there
            is no process group.
        parameters: the trainable parameters by name.
        dtype: the model's dtype.
        device: the model's device.
        advance: called with the number of tokens after every microbatch.
        performed: number of microbatches run so far, by kind of pass.
    """

    tokens: ResponseTokens
    wrapped: nn.Module
    parameters: Mapping[str, nn.Parameter]
    dtype: torch.dtype
    device: torch.device
    advance: Callable[[int], None] = lambda count: None
    performed: dict[str, int] = field(default_factory=dict)

    @overload
    def score(self, shard: Shard) -> TokenScores: ...

    @overload
    def score(
        self,
        shard: Shard,
        direction: Mapping[str, Tensor],
        *,
        with_features: bool = False,
    ) -> DirectionalScores: ...

    def score(
        self,
        shard: Shard,
        direction: Mapping[str, Tensor] | None = None,
        *,
        with_features: bool = False,
    ) -> TokenScores:
        """Log p and H of every response token, with a direction also their derivatives.

        Args:
            shard: this rank's sequences; may be empty.
            direction: tangent of each trainable parameter by name (order 1), or None
                (order 0).
            with_features: at order 1, also what baselines and control variates need.

        Raises:
            RunError: a value is not finite, or the model returned no tangent.
        """
        num_tokens = shard.ragged.num_tokens
        scores = TokenScores.empty(num_tokens)
        duals: AbstractContextManager[None] = nullcontext()
        if direction is not None:
            scores = DirectionalScores.empty(num_tokens, with_features)
            duals = dual_parameters(self.tokens, self.parameters, direction)
        with torch.no_grad(), precision_context(self.dtype), duals:
            for microbatch in self._microbatches(shard):
                self._score_microbatch(microbatch, scores)
                scores.num_microbatches += 1
                self.advance(len(microbatch.token))
        order = 0 if direction is None else 1
        self._count(f"score order {order}", scores.num_microbatches)
        _require_finite(scores, shard)
        return scores

    def pull_back(self, shard: Shard, weights: TokenWeights) -> TokenScores:
        """Add the gradient of sum(a log p + b H) to the parameters' `.grad`.

        Args:
            shard: this rank's sequences; may be empty.
            weights: gives a and b of each token; called once per chunk.

        Returns:
            The log p and H that the pass computed on its way.

        Raises:
            RunError: a value is not finite.
        """
        scores = TokenScores.empty(shard.ragged.num_tokens)
        no_sync = getattr(self.wrapped, "no_sync", nullcontext)
        with precision_context(self.dtype), no_sync():
            for microbatch in self._microbatches(shard):
                total, logp, entropy = self.wrapped(microbatch, weights)
                total.backward()
                scores.fill(microbatch.token.cpu(), logp=logp, entropy=entropy)
                scores.num_microbatches += 1
                self.advance(len(microbatch.token))
        self._count("pull_back", scores.num_microbatches)
        _require_finite(scores, shard)
        return scores

    def with_budget(self, tokens_per_microbatch: int) -> "Passes":
        """The same passes with another budget; 1 means one sequence at a time."""
        settings = replace(
            self.tokens.settings, tokens_per_microbatch=tokens_per_microbatch
        )
        return replace(self, tokens=ResponseTokens(self.tokens.causal_lm, settings))

    @property
    def layout(self) -> ParameterLayout:
        """Layout of flat buffers over the trainable parameters."""
        return ParameterLayout.of(self.parameters)

    def gradient(
        self, shard: Shard, weights: TokenWeights, dtype: torch.dtype
    ) -> tuple[Tensor, TokenScores]:
        """This rank's gradient of sum(a log p + b H) as a flat CPU buffer [P].

        A parameter that no token of the shard depends on has gradient zero. The
        parameters' `.grad` are None before and after.

        Raises:
            RunError: a value is not finite.
        """
        try:
            scores = self.pull_back(shard, weights)
            flat = torch.zeros(self.layout.numel, dtype=dtype)
            for name, view in self.layout.views(flat).items():
                gradient = self.parameters[name].grad
                if gradient is not None:
                    view.copy_(gradient)
        finally:
            for parameter in self.parameters.values():
                parameter.grad = None
        return flat, scores

    def _microbatches(self, shard: Shard) -> Iterable[Microbatch]:
        budget = self.tokens.settings.tokens_per_microbatch
        return (m.to(self.device) for m in make_microbatches(shard, budget))

    def _score_microbatch(self, microbatch: Microbatch, scores: TokenScores) -> None:
        hidden = self.tokens.hidden_states(microbatch)
        directional = isinstance(scores, DirectionalScores)
        with_features = isinstance(scores, DirectionalScores) and scores.features
        if directional and halves(hidden)[1] is None:
            raise RunError(
                "the model returned no tangent: every trainable parameter is bypassed "
                "(adapter merged or disabled), or the forward pass runs under "
                "inference_mode or reentrant gradient checkpointing"
            )
        if with_features:
            projected = self.tokens.projected(halves(hidden)[0])
            scores.fill(microbatch.token.cpu(), hidden=projected)
        for chunk in self.tokens.chunks(hidden):
            targets = microbatch.target_ids[chunk]
            logits, tangent = halves(self.tokens.logits(hidden[chunk]))
            logits = logits.to(self.tokens.settings.entropy_dtype)
            logp, entropy, *softmax = log_softmax_statistics(logits, targets)
            values = {"logp": logp, "entropy": entropy}
            if directional:
                assert tangent is not None
                tangent = tangent.to(logits.dtype)
                if with_features:
                    values |= distribution_features(tangent, targets, entropy, *softmax)
                derivatives = directional_derivatives(tangent, targets, *softmax)
                values.update(zip(("dlogp", "dentropy"), derivatives))
            scores.fill(microbatch.token[chunk].cpu(), **values)

    def _count(self, kind: str, microbatches: int) -> None:
        self.performed[kind] = self.performed.get(kind, 0) + microbatches


def _require_finite(scores: TokenScores, shard: Shard) -> None:
    names = ["logp", "entropy"]
    names += ["dlogp", "dentropy"] if isinstance(scores, DirectionalScores) else []
    for name in names:
        values = scores.array(name)
        if bool(values.isfinite().all()):
            continue
        token = int((~values.isfinite()).nonzero()[0])
        sequence = shard.sequences[int(shard.ragged.sequence_of_token[token])]
        position = int(shard.ragged.position[token]) + 1
        raise RunError(
            f"{name} of batch {shard.batch.split}, line {sequence.index + 1}, response "
            f"token {position} is {float(values[token])}: the model gives this token "
            "probability 0 or its weights are not finite"
        )
