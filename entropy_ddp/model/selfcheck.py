"""What is verified of every model when it is opened.

Three errors of differentiating somebody else's model are silent: an output layer that
is more than one linear map, an operation that drops the tangent, and one that detaches
a value from both modes alike. Each is looked for on two short rows of arbitrary tokens:

- output layer: log p from chunked hidden states against the model's own logits;
- duality: forward mode against reverse mode along a random direction;
- central difference: forward mode against values at theta +- epsilon v.

Whether responses may share their prompt's row is found out in the same way: one made-up
group is scored flat and as a tree. A model that fails is read flat, which is as exact.

The backward pass of the duality check also measures what one keeps of every position:
it depends on the model, and the estimate of a run's memory needs it.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from entropy_ddp.data.batch import Batch, Sequence, Shard
from entropy_ddp.data.microbatch import PromptSharing, plan_microbatches
from entropy_ddp.errors import InputError, raise_if_out_of_memory
from entropy_ddp.model.parameters import inner_product, shifted
from entropy_ddp.model.precision import precision_context
from entropy_ddp.model.response_tokens import TokenScores
from entropy_ddp.model.scoring import Passes

# Relative tolerances: output layer, duality, central difference. Values of a float32
# model carry errors of 1e-7, which a central difference divides by its step.
TOLERANCES = {
    torch.float64: (1e-9, 1e-9, 1e-5),
    torch.float32: (1e-4, 1e-3, 5e-2),
    torch.bfloat16: (5e-2, 1e-1, None),
}
# Of the central difference.
STEP = {torch.float64: 1e-5, torch.float32: 3e-3}
# What attention from token to token costs beyond its multiplications, measured.
PAIR_OVERHEAD = 1.5
_CAUSES = {
    "output layer": "the model changes its logits after the output layer (soft-capping "
    "or scaling), which is not supported",
    "duality": "an operation of this model loses its tangent; try compute.attention: "
    "eager",
    "central difference": "an operation of this model is detached from its gradient "
    "(DoRA's weight norm, say), so that derivatives miss a part of the change",
}


@dataclass(frozen=True)
class SelfCheck:
    """One check: a relative error and its tolerance."""

    name: str
    error: float
    tolerance: float


def check_model(passes: Passes, vocabulary_size: int) -> list[SelfCheck]:
    """Verify the passes on this model.

    Returns:
        The checks made, all within tolerance.

    Raises:
        InputError: the model cannot be measured correctly; says which check failed.
    """
    shard = _made_up_rows(passes, vocabulary_size)
    layer, duality, difference = TOLERANCES[passes.dtype]
    direction = _random_direction(passes)
    scores = passes.score(shard, direction)
    checks = [SelfCheck("output layer", _layer_error(passes, shard, scores), layer)]
    slope = float((scores.dlogp + scores.dentropy).sum())
    scale = float(scores.dlogp.abs().sum() + scores.dentropy.abs().sum())
    reverse = _reverse_mode_slope(passes, shard, direction)
    checks.append(SelfCheck("duality", _relative(slope - reverse, scale), duality))
    if difference is not None:
        central = _central_difference(passes, shard, direction)
        error = _relative(slope - central, scale)
        checks.append(SelfCheck("central difference", error, difference))
    for check in checks:
        # Written so that NaN fails.
        if not check.error <= check.tolerance:
            raise InputError(
                f"self-check `{check.name}` of {type(passes.tokens.causal_lm).__name__}"
                f" failed: relative error {check.error:.3e}, expected at most "
                f"{check.tolerance:.0e}; {_CAUSES[check.name]}"
            )
    return checks


@dataclass(frozen=True)
class SharingCheck:
    """Whether this model may read several responses behind one prompt.

    Attributes:
        sharing: when to; None for never.
        reason: why never.
    """

    sharing: PromptSharing | None
    reason: str = ""


def check_sharing(passes: Passes, vocabulary_size: int) -> SharingCheck:
    """Score one made-up group with its prompt shared and not, values and derivatives.

    Attention with a limited reach (a sliding window) is the same in both only for rows
    within its reach; the made-up rows may be shorter, so the limit is read from the
    model's configuration.
    """
    transformer = passes.tokens.transformer
    accepted = inspect.signature(transformer.forward).parameters
    missing = [n for n in ("position_ids", "attention_mask") if n not in accepted]
    if missing:
        return SharingCheck(None, f"the model takes no {' and no '.join(missing)}")
    shard = _made_up_rows(passes, vocabulary_size, shared=True)
    direction = _random_direction(passes)
    flat = passes.score(shard, direction)
    before = passes.tokens.sharing
    # Free attention: everything that can share a row does.
    passes.tokens.sharing = PromptSharing(0.0)
    try:
        tree = passes.score(shard, direction)
    except (RuntimeError, TypeError, ValueError) as refusal:
        raise_if_out_of_memory(refusal)
        return SharingCheck(None, f"the model refuses the mask: {refusal}")
    finally:
        passes.tokens.sharing = before
    _, tolerance, _ = TOLERANCES[passes.dtype]
    for name in ("logp", "entropy", "dlogp", "dentropy"):
        values, others = flat.array(name), tree.array(name)
        scale = float(values.abs().max())
        error = _relative(float((values - others).abs().max()), scale)
        if not error <= tolerance:
            return SharingCheck(
                None,
                f"{name} of responses behind one prompt differs by {error:.1e}: the "
                "model carries a state from token to token, or ignores the mask",
            )
    return SharingCheck(_sharing_of(transformer))


def _sharing_of(transformer: torch.nn.Module) -> PromptSharing:
    config = transformer.config.get_text_config()
    experts = getattr(config, "num_experts_per_tok", None)
    embeddings = {
        id(module.weight)
        for module in transformer.modules()
        if isinstance(module, torch.nn.Embedding)
    }
    multiplied = 0.0
    for parameter in transformer.parameters():
        if id(parameter) in embeddings:
            continue
        # Fused experts [experts, in, out], of which each token passes a few.
        routed = experts / len(parameter) if experts and parameter.dim() == 3 else 1.0
        multiplied += routed * parameter.numel()
    # Multiplications for one pair of tokens: Q K^T and P V in every layer.
    pairs = 2 * config.num_hidden_layers * config.hidden_size
    reaches = (
        getattr(config, name, None)
        for name in ("sliding_window", "attention_chunk_size")
    )
    return PromptSharing(
        pair_cost=PAIR_OVERHEAD * pairs / multiplied,
        longest_path=min((reach for reach in reaches if reach), default=None),
    )


def _relative(difference: float, scale: float) -> float:
    """|difference| over the scale of the terms; both vanish for an adapter of zeros."""
    return abs(difference) / scale if scale else abs(difference)


def _made_up_rows(passes: Passes, vocabulary_size: int, shared: bool = False) -> Shard:
    """Two rows of arbitrary tokens; `shared`: three responses to one prompt."""
    generator = torch.Generator().manual_seed(0)
    # The embedding of a padding token has no gradient in reverse mode.
    usable = torch.ones(vocabulary_size)
    for module in passes.tokens.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            usable[module.padding_idx] = 0

    def ids(count: int) -> Tensor:
        return usable.multinomial(count, replacement=True, generator=generator)

    lengths = (7, 4, 1) if shared else (7, 4)
    prompts = [ids(3)] * 3 if shared else [ids(2), ids(3)]
    sequences = tuple(
        Sequence(
            index=index,
            group=0 if shared else index,
            group_key=0 if shared else index,
            prompt_ids=prompt,
            response_ids=ids(length),
        )
        for index, (prompt, length) in enumerate(zip(prompts, lengths))
    )
    return Batch(split="self-check", sequences=sequences).shard(0, 1)


def _random_direction(passes: Passes) -> dict[str, Tensor]:
    """A random direction of about the size of every parameter."""
    generator = torch.Generator().manual_seed(1)
    direction = {}
    for name, parameter in passes.parameters.items():
        noise = torch.randn(parameter.shape, generator=generator)
        size = parameter.detach().double().square().mean().sqrt().clamp(min=1e-2)
        direction[name] = noise.to(parameter) * size.to(parameter)
    return direction


def _layer_error(passes: Passes, shard: Shard, scores: TokenScores) -> float:
    worst = 0.0
    starts = shard.ragged.starts.tolist()
    temperature = passes.tokens.settings.temperature
    for start, sequence in zip(starts, shard.sequences):
        ids = torch.cat([sequence.prompt_ids, sequence.response_ids])
        run = partial(passes.tokens.causal_lm, input_ids=ids[None].to(passes.device))
        with torch.no_grad(), precision_context(passes.dtype):
            logits = passes.layers.within(run)
        logp = (logits.logits[0].double() / temperature).log_softmax(-1).cpu()
        # Position j predicts token j + 1; the last of a prompt begins the response.
        first = len(sequence.prompt_ids) - 1
        own = logp[first:-1].gather(1, sequence.response_ids[:, None])[:, 0]
        difference = scores.logp[start : start + sequence.num_tokens] - own
        worst = max(worst, float((difference / own.abs().clamp(min=1)).abs().max()))
    return worst


def _reverse_mode_slope(
    passes: Passes, shard: Shard, direction: dict[str, Tensor]
) -> float:
    ones = torch.ones(shard.ragged.num_tokens, dtype=torch.float64)
    (rows,) = plan_microbatches(shard, 1 << 20)
    count, longest = len(rows), max(row.length for row in rows)
    wide = passes.with_settings(tokens_per_microbatch=1 << 20, share_prompts=False)
    # Parameter by parameter: a flat float64 buffer could be larger than the model.
    try:
        with saved_for_backward(count, longest) as sizes:
            wide.pull_back(
                shard, lambda token, *_: (ones[token.cpu()], ones[token.cpu()])
            )
        passes.saved_per_position = sum(sizes.values()) / (count * longest)
        product = sum(
            inner_product(parameter.grad, direction[name])
            for name, parameter in passes.parameters.items()
            if parameter.grad is not None
        )
        # Every rank has passed over the same rows.
        return passes.layers.total(product) / passes.layers.num_summed
    finally:
        for parameter in passes.parameters.values():
            parameter.grad = None


def _central_difference(
    passes: Passes, shard: Shard, direction: dict[str, Tensor]
) -> float:
    step = STEP[passes.dtype]
    sums = []
    for sign in (step, -step):
        with shifted(passes.parameters, direction, sign):
            scores = passes.score(shard)
        sums.append(float((scores.logp + scores.entropy).sum()))
    return (sums[0] - sums[1]) / (2 * step)


@contextmanager
def saved_for_backward(rows: int, length: int) -> Iterator[dict[int, int]]:
    """Bytes of each block that forward passes over such rows save, by its address.

    Of memory that grows with the positions: weights are left out. The addresses are only
    distinct while everything that is saved is held: until the backward pass.

    Args:
        rows, length: shape of the microbatch.
    """
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        whole = tensor._base if tensor._base is not None else tensor
        shape = tuple(tensor.shape)
        grows = shape[:1] == (rows * length,) or (rows in shape and length in shape)
        if grows and not isinstance(whole, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes
