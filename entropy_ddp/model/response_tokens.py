"""A causal language model seen as a function of response tokens only.

`TokenScores` is what the passes give of every response token, as flat token arrays of one
rank. Only the hidden states at response positions reach the output layer, and those in
chunks of tokens: a [batch, length, vocabulary] tensor never exists.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from entropy_ddp.data.microbatch import Microbatch, PromptSharing
from entropy_ddp.model.forward_mode import halves
from entropy_ddp.model.head import (
    FEATURES,
    LogitsMap,
    Workspace,
    directional_derivatives,
    distribution_features,
    logits_gradient,
    mapped_tangent,
    row_blocks,
    softmax_of,
)
from entropy_ddp.model.routing import Routing, fingerprints

# Random projections of the hidden state that predicts a token: what the model itself
# knows before it draws the token, for regressions on it.
NUM_PROJECTIONS = 32
# Random projections e(v) of the output embedding of every token v: by which tokens alike
# have a like effect on what follows, in those regressions.
NUM_EMBEDDINGS = 8
_EMBEDDING_ROWS = 1 << 13
# Features that are several numbers of each token, and their dtypes.
WIDE_FEATURES = {
    "hidden": (NUM_PROJECTIONS, torch.float32),
    "embedding": (NUM_EMBEDDINGS, torch.float64),
    "dembedding": (NUM_EMBEDDINGS, torch.float64),
}


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
            of `head.distribution_features` [t] ([t, 8]), and `hidden`, random
            projections of the hidden state, float32, [t, 32]. Empty if not asked for.
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
            for name, (width, dtype) in WIDE_FEATURES.items():
                features[name] = torch.full((num_tokens, width), torch.nan, dtype=dtype)
        return cls(**{n: _unfilled(num_tokens) for n in DERIVATIVES}, features=features)

    def put(self, tokens: Tensor, scores: "DirectionalScores") -> None:
        """Put the scores of some of the tokens at their places; their features are not.

        Args:
            tokens: places of the scores' tokens among these, [m].
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


# Elements of one chunk's [tokens, vocabulary] logits, and the fewest tokens for which
# the product with the output layer runs at full speed.
CHUNK_ELEMENTS = 1 << 23
CHUNK_TOKENS = 112
# A chunk's gradient of a trainable output layer is as large as the layer: fewer chunks.
TRAINABLE_CHUNK_TOKENS = 256

# (flat token places [m], log p [m], H [m]) -> weights a [m] of log p and b [m] of H, and
# possibly c [m, 8] of the means E[e] of the projected embeddings. Of any m tokens, as
# many as a block of logits holds: not of whole sequences.
TokenWeights = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """How the passes run; none of these changes a result beyond rounding.

    Attributes:
        temperature: sampling temperature; logits are divided by it. This one is part
            of the definition of the policy.
        entropy_dtype: dtype of the sums over the vocabulary.
        tokens_per_microbatch: budget of padded tokens.
        share_prompts: whether responses to one prompt may share a row.
    """

    temperature: float = 1.0
    entropy_dtype: torch.dtype = torch.float64
    tokens_per_microbatch: int = 4096
    share_prompts: bool = True


class ResponseTokens(nn.Module):
    """A causal language model seen as a function of response tokens only.

    Args:
        causal_lm: a Hugging Face causal language model, with or without an adapter.
        settings: temperature and dtype of the sums.
        sharing: when responses to one prompt share a row; None for never, as long as
            nobody has verified that this model reads such rows correctly.
    """

    def __init__(
        self,
        causal_lm: nn.Module,
        settings: ScoringSettings,
        sharing: PromptSharing | None = None,
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.settings = settings
        self.sharing = sharing
        self._routing = Routing(causal_lm)
        self._directions: Tensor | None = None
        self._embedding: Tensor | None = None
        self.widest = self._widest_layer()
        config = self._unwrapped.config
        self.logits_map = LogitsMap.of(config.get_text_config())

    @property
    def transformer(self) -> nn.Module:
        """The model below the output layer."""
        return self._unwrapped.base_model

    @property
    def output_layer(self) -> nn.Module:
        """The output layer: hidden state to logits."""
        return self._unwrapped.get_output_embeddings()

    def _widest_layer(self) -> int:
        """Largest number of values that a layer below the output makes of a token."""
        tables = {
            id(weight)
            for module in self.transformer.modules()
            for weight in module.parameters(recurse=False)
            if isinstance(module, nn.Embedding)
        }
        widths = (
            max(weight.shape)
            for name, weight in self.transformer.named_parameters()
            # Adapters of an embedding are as long as its table.
            if weight.dim() == 2 and "embedding" not in name
            if id(weight) not in tables
        )
        return max(widths, default=1)

    @property
    def _unwrapped(self) -> nn.Module:
        """The Hugging Face model, adapter layers inside, without PEFT's wrapper."""
        model = self.causal_lm
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def gathered(self, call: Callable[[], Any]) -> Any:
        """What a call gives; FSDP gathers the outer parameters of a root around it."""
        return call()

    def hidden_states(self, microbatch: Microbatch) -> Tensor:
        """Hidden states that predict the response tokens, [m, width]."""
        return self._last_hidden(microbatch)[microbatch.row, microbatch.column]

    @property
    def routes(self) -> bool:
        """Whether the model is a mixture of experts, which routes tokens."""
        return bool(self._routing)

    def hidden_states_and_routing(
        self, microbatch: Microbatch
    ) -> tuple[Tensor, Tensor | None]:
        """The same, and of mixtures of experts one number for each token's experts [m]."""
        if not self._routing:
            return self.hidden_states(microbatch), None
        with self._routing.recorded() as choices:
            hidden = self._last_hidden(microbatch)
        row, column = microbatch.row, microbatch.column
        # Experts see the positions of all rows as one list.
        places = row * microbatch.input_ids.shape[1] + column
        return hidden[row, column], fingerprints(choices, places)

    def _last_hidden(self, microbatch: Microbatch) -> Tensor:
        # Flat rows need no mask: the fast causal kernels take none.
        inputs = {"input_ids": microbatch.input_ids}
        sees = microbatch.sees
        if sees is not None and microbatch.position is not None:
            inputs["position_ids"] = microbatch.position
            inputs["attention_mask"] = self._attention_mask(sees)
        output = self.transformer(**inputs, use_cache=False)
        return output.last_hidden_state

    def _attention_mask(self, sees: Tensor) -> Tensor:
        """A boolean mask as this model's attention wants it."""
        config = self._unwrapped.config
        if config._attn_implementation == "sdpa":
            return sees
        # Eager attention adds the mask to the scores. Not minus infinity, which some
        # models multiply; not the dtype's lowest, which overflows when added to.
        dtype = self._unwrapped.dtype
        lowest = torch.finfo(dtype).min / 2
        return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(
            ~sees, lowest
        )

    def projected(self, hidden: Tensor) -> Tensor:
        """Hidden states in a fixed random subspace, [m, NUM_PROJECTIONS]."""
        if self._directions is None:
            generator = torch.Generator().manual_seed(0)
            width = hidden.shape[1]
            directions = torch.randn(width, NUM_PROJECTIONS, generator=generator)
            # Of unit length on average, the same in every run: seed 0.
            self._directions = (directions / width**0.5).to(hidden)
        return hidden @ self._directions

    @property
    def embedding(self) -> Tensor:
        """e(v): fixed random projections of the output embedding, standardised, [V, 8].

        Of the first parameters it is asked at: those of theta. In the dtype of the sums.
        """
        if self._embedding is None:
            weight = halves(self.output_layer.weight)[0].detach()
            generator = torch.Generator().manual_seed(1)
            directions = torch.randn(
                weight.shape[1],
                NUM_EMBEDDINGS,
                generator=generator,
                dtype=torch.float64,
            ).to(weight.device)
            # Rows at a time: no copy of the layer in another dtype.
            table = torch.cat(
                [rows.double() @ directions for rows in weight.split(_EMBEDDING_ROWS)]
            )
            table -= table.mean(0)
            scale = table.square().mean(0).sqrt()
            table /= torch.where(scale > 0, scale, 1.0)
            self._embedding = table.to(self.settings.entropy_dtype)
        return self._embedding

    def chunks(self, count: int, trainable: bool = False) -> Iterator[slice]:
        """Slices of `count` tokens whose logits fit the chunk budget."""
        fewest = TRAINABLE_CHUNK_TOKENS if trainable else CHUNK_TOKENS
        # [tokens, vocabulary] within the budget, unless that is too few tokens.
        size = max(fewest, CHUNK_ELEMENTS // self.output_layer.weight.shape[0])
        return (slice(i, i + size) for i in range(0, count, size))

    def statistics(
        self, hidden: Tensor, targets: Tensor, with_features: bool = False
    ) -> dict[str, Tensor]:
        """What `score` returns of each token, [m] each, in the dtype of the sums.

        `logp` and `entropy`; where the logits have a tangent also `dlogp` and
        `dentropy`, and if asked for `head.distribution_features`.

        Args:
            hidden: hidden states that predict the tokens, dual at order 1, [m, width].
            targets: token ids, [m].
            with_features: at order 1, also the features.
        """
        blocks = [
            block
            for chunk in self.chunks(len(hidden))
            for block in self._chunk_statistics(
                hidden[chunk], targets[chunk], with_features
            )
        ]
        return {name: torch.cat([b[name] for b in blocks]) for name in blocks[0]}

    def _chunk_statistics(
        self, hidden: Tensor, targets: Tensor, with_features: bool
    ) -> list[dict[str, Tensor]]:
        # The only holder of a chunk's logits: two of them never exist.
        logits, tangent = halves(self.output_layer(hidden))
        workspace = Workspace(self.settings.entropy_dtype)
        blocks = []
        for rows in row_blocks(logits):
            softmax = softmax_of(
                logits[rows],
                targets[rows],
                self.settings.temperature,
                workspace,
                self.logits_map,
            )
            values = {"logp": softmax.logp, "entropy": softmax.entropy}
            if tangent is not None:
                tempered = self.logits_map.over(self.settings.temperature)
                centred = mapped_tangent(
                    logits[rows], tangent[rows], tempered, workspace
                )
                # z' is centred in place: the features need it so.
                values["dlogp"], values["dentropy"] = directional_derivatives(
                    softmax, centred, targets[rows]
                )
                if with_features:
                    values |= distribution_features(
                        softmax, centred, targets[rows], self.embedding
                    )
            blocks.append(values)
        return blocks

    def forward(
        self, microbatch: Microbatch, weights: TokenWeights, settings: ScoringSettings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The surrogate whose gradient is wanted, and log p [m] and H [m] without one.

        Args:
            weights: gives a and b, and possibly c.
            settings: those of the pass, in place of the module's own: a wrapper around
                the module cannot be had anew for other settings.

        Returns:
            sum(a log p + b H + <c, E[e]>) as a differentiable scalar, log p, H.
        """
        hidden = self.hidden_states(microbatch)
        trainable = [p for p in self.output_layer.parameters() if p.requires_grad]
        return _WeightedSum.apply(
            self, microbatch, weights, settings, hidden, *trainable
        )


class _WeightedSum(torch.autograd.Function):
    """sum(a log p + b H + <c, E[e]>) of tokens, from their hidden states.

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
        settings: ScoringSettings,
        hidden: Tensor,
        *trainable: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        # Of each chunk: [m], [m], [m, width].
        logps, entropies, hidden_gradients = [], [], []
        # Wide enough for a sum over many chunks.
        gradients = [
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for p in trainable
        ]
        for chunk in policy.chunks(len(hidden), trainable=bool(trainable)):
            surrogate, values, into_hidden, *into_layer = _chunk_gradients(
                policy,
                hidden[chunk],
                microbatch.token[chunk],
                microbatch.target_ids[chunk],
                weights,
                settings,
                trainable,
            )
            total += surrogate
            logps.append(values[0])
            entropies.append(values[1])
            hidden_gradients.append(into_hidden)
            for gradient, addition in zip(gradients, into_layer):
                gradient += addition
        narrowed = [g.to(p.dtype) for g, p in zip(gradients, trainable)]
        ctx.save_for_backward(torch.cat(hidden_gradients), *narrowed)
        logp, entropy = torch.cat(logps), torch.cat(entropies)
        ctx.mark_non_differentiable(logp, entropy)
        return total, logp, entropy

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = outputs[0]
        gradients = (saved * scale.to(saved.dtype) for saved in ctx.saved_tensors)
        # Policy, microbatch, weights and settings have none.
        return (None, None, None, None, *gradients)


def _chunk_gradients(
    policy: ResponseTokens,
    hidden: Tensor,
    places: Tensor,
    targets: Tensor,
    weights: TokenWeights,
    settings: ScoringSettings,
    trainable: tuple[Tensor, ...],
) -> tuple[Any, ...]:
    """sum(a log p + b H + <c, E[e]>) of a chunk, (log p, H) [2, m], and its gradients.

    Args:
        hidden: hidden states, [m, width].
        places, targets: of the tokens, [m] each.
        weights: gives a and b, and possibly c.
        trainable: parameters of the output layer whose gradients follow that of the
            hidden states.
    """
    # Within an autograd function's forward pass gradients are off.
    with torch.enable_grad():
        piece = hidden.detach().requires_grad_()
        logits = policy.output_layer(piece)  # [m, V]
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    values = []
    # The logits are not read again: their gradient takes their place.
    cotangent = logits.detach()
    workspace = Workspace(settings.entropy_dtype)
    for rows in row_blocks(cotangent):
        softmax = softmax_of(
            cotangent[rows],
            targets[rows],
            settings.temperature,
            workspace,
            policy.logits_map,
        )
        logp, entropy = softmax.logp, softmax.entropy
        a, b, *c = (w.to(logp) for w in weights(places[rows], logp, entropy))
        total += (a * logp + b * entropy).sum(dtype=torch.float64)
        values.append(torch.stack([logp, entropy]))
        # u = <c, e(v)> of every token, [r, V].
        utility = c[0] @ policy.embedding.T if c else None
        if utility is not None:
            means = torch.linalg.vecdot(softmax.weights, utility) / softmax.total
            total += means.sum(dtype=torch.float64)
        gradient = logits_gradient(softmax, (a, b), targets[rows], utility)
        tempered = policy.logits_map.over(settings.temperature)
        # From the mapped logits z back to the values x of the layer: times dz/dx.
        if tempered.cap is not None:
            outputs = workspace.copy("scratch", cotangent[rows])
            gradient *= tempered.derivative_(outputs)
        elif tempered.scale != 1:
            gradient *= tempered.scale
        cotangent[rows] = gradient
    gradients = torch.autograd.grad(logits, [piece, *trainable], cotangent)
    return total, torch.cat(values, dim=1), *gradients
