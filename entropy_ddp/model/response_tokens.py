"""A causal language model seen as a function of response tokens only.

Only the hidden states at response positions reach the output layer, and those in chunks
of tokens: a [batch, length, vocabulary] tensor never exists.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entropy_ddp.data.microbatch import Microbatch, PromptSharing
from entropy_ddp.model.forward_mode import halves
from entropy_ddp.model.head import (
    LogitsMap,
    Softmax,
    Workspace,
    directional_derivatives,
    distribution_features,
    logits_gradient,
    mapped_tangent,
    row_blocks,
    softmax_of,
)
from entropy_ddp.model.routing import Routing, fingerprints
from entropy_ddp.model.scores import NUM_PROJECTIONS

# Elements of one chunk's [tokens, vocabulary] logits, and the fewest tokens for which
# the product with the output layer runs at full speed.
CHUNK_ELEMENTS = 1 << 23
CHUNK_TOKENS = 112
# A chunk's gradient of a trainable output layer is as large as the layer: fewer chunks.
TRAINABLE_CHUNK_TOKENS = 256

# (flat token places [m], log p [m], H [m]) -> weights a [m] of log p and b [m] of H. Of
# any m tokens, as many as a block of logits holds: not of whole sequences.
TokenWeights = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


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
            self._directions = (directions / width**0.5).to(hidden)
        return hidden @ self._directions

    def chunks(self, count: int, trainable: bool = False) -> Iterator[slice]:
        """Slices of `count` tokens whose logits fit the chunk budget."""
        fewest = TRAINABLE_CHUNK_TOKENS if trainable else CHUNK_TOKENS
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
                values |= _derivatives(softmax, centred, targets[rows], with_features)
            blocks.append(values)
        return blocks

    def forward(
        self, microbatch: Microbatch, weights: TokenWeights, settings: ScoringSettings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The surrogate whose gradient is wanted, and log p [m] and H [m] without one.

        Args:
            microbatch: the tokens.
            weights: gives a and b.
            settings: those of the pass, in place of the module's own: a wrapper around
                the module cannot be had anew for other settings.

        Returns:
            sum(a log p + b H) as a differentiable scalar, log p, H.
        """
        hidden = self.hidden_states(microbatch)
        trainable = [p for p in self.output_layer.parameters() if p.requires_grad]
        how = (microbatch, weights, settings)
        return _WeightedSum.apply(self, how, hidden, *trainable)


def _derivatives(
    softmax: Softmax, tangent: Tensor, targets: Tensor, with_features: bool
) -> dict[str, Tensor]:
    dlogp, dentropy = directional_derivatives(softmax, tangent, targets)
    values = {"dlogp": dlogp, "dentropy": dentropy}
    if with_features:
        values |= distribution_features(softmax, tangent, targets)
    return values


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
        how: tuple[Microbatch, TokenWeights, ScoringSettings],
        hidden: Tensor,
        *trainable: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        microbatch, weights, settings = how
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        logps, entropies, hidden_gradients = [], [], []
        # Wide enough for a sum over many chunks.
        gradients = [
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for p in trainable
        ]
        for chunk in policy.chunks(len(hidden), trainable=bool(trainable)):
            token, targets = microbatch.token[chunk], microbatch.target_ids[chunk]
            surrogate, values, into_hidden, *into_layer = _chunk_gradients(
                policy, hidden[chunk], (token, targets), (weights, settings), trainable
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
        return (
            None,
            None,
            *(saved * scale.to(saved.dtype) for saved in ctx.saved_tensors),
        )


def _chunk_gradients(
    policy: ResponseTokens,
    hidden: Tensor,
    tokens: tuple[Tensor, Tensor],
    how: tuple[TokenWeights, ScoringSettings],
    trainable: tuple[Tensor, ...],
) -> tuple[Any, ...]:
    """sum(a log p + b H) of a chunk, (log p, H), and the sum's gradients.

    Args:
        policy: whose output layer it is.
        hidden: hidden states, [m, width].
        tokens: their places and their targets, each [m].
        how: what gives a and b, and the settings of the pass.
        trainable: parameters of the output layer whose gradients follow that of the
            hidden states.
    """
    (weights, settings), (places, targets) = how, tokens
    with torch.enable_grad():
        piece = hidden.detach().requires_grad_()
        logits = policy.output_layer(piece)
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
        a, b = (w.to(logp) for w in weights(places[rows], logp, entropy))
        total += (a * logp + b * entropy).sum(dtype=torch.float64)
        values.append(torch.stack([logp, entropy]))
        gradient = logits_gradient(softmax, (a, b), targets[rows])
        tempered = policy.logits_map.over(settings.temperature)
        if tempered.cap is not None:
            outputs = workspace.copy("scratch", cotangent[rows])
            gradient *= tempered.derivative_(outputs)
        elif tempered.scale != 1:
            gradient *= tempered.scale
        cotangent[rows] = gradient
    gradients = torch.autograd.grad(logits, [piece, *trainable], cotangent)
    return total, torch.cat(values, dim=1), *gradients
