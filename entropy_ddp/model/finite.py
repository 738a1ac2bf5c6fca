"""Which token of which sequence makes a gradient NaN or infinite.

Looked for only when a gradient is: the pass is repeated sequence by sequence, and of the
first bad one for ever shorter beginnings.
"""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from entropy_ddp.data.batch import Shard
from entropy_ddp.errors import RunError
from entropy_ddp.model.response_tokens import TokenWeights

# Adds the gradient of sum(a log p + b H) over a shard to `.grad`.
PullBack = Callable[[Shard, TokenWeights], object]
# Elements of a buffer that are looked at together: no copy of the whole.
_BLOCK = 1 << 22


def require_finite_gradient(
    pull_back: PullBack,
    parameters: Mapping[str, nn.Parameter],
    shard: Shard,
    weights: TokenWeights,
    flat: Tensor,
) -> None:
    """Check a gradient of sum(a log p + b H) over a shard.

    Args:
        pull_back: the pass that it was taken with.
        parameters: what it is a gradient by.
        shard: this rank's sequences.
        weights: gives a and b of each token.
        flat: the gradient, [P].

    Raises:
        RunError: it is not finite; names batch, line and response token.
    """
    if all(bool(block.isfinite().all()) for block in flat.split(_BLOCK)):
        return
    place = f"the gradient of batch {shard.batch.split}"
    spans = zip(shard.ragged.starts.tolist(), shard.ragged.ends.tolist())
    for number, (begin, end) in enumerate(spans):
        one = Shard(batch=shard.batch, positions=shard.positions[number : number + 1])
        bad = partial(_bad_parameter, pull_back, parameters, one, weights, begin)
        if begin == end or not bad(begin, end):
            continue
        place += f", line {shard.sequences[number].index + 1}"
        # The shortest beginning that is bad ends with the first bad token.
        good, worst = begin, end
        while worst - good > 1:
            middle = (good + worst) // 2
            good, worst = (good, middle) if bad(begin, middle) else (middle, worst)
        name = bad(worst - 1, worst)
        if name is None:
            raise RunError(f"{place} is NaN or infinite in the sum over its tokens")
        raise RunError(
            f"{place}, response token {worst - begin} is NaN or infinite in {name}; "
            "are its advantage and its sampling log-probability right?"
        )
    raise RunError(f"{place} is NaN or infinite in the sum over its sequences")


def _bad_parameter(
    pull_back: PullBack,
    parameters: Mapping[str, nn.Parameter],
    one: Shard,
    weights: TokenWeights,
    start: int,
    first: int,
    last: int,
) -> str | None:
    """The first parameter whose gradient is not finite, for one sequence.

    Args:
        pull_back: the pass that it is taken with.
        parameters: what it is a gradient by.
        one: the sequence alone.
        weights: of the tokens by their places in the whole shard.
        start: place of the sequence's first token there.
        first, last: first and one past the last place of the tokens that count.
    """

    def shifted(place: Tensor, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        whole = place + start
        a, b = weights(whole, logp, entropy)
        other = ((whole < first) | (whole >= last)).to(a.device)
        return a.masked_fill(other, 0.0), b.masked_fill(other, 0.0)

    try:
        pull_back(one, shifted)
        return next(
            (
                name
                for name, parameter in parameters.items()
                if parameter.grad is not None
                and not bool(parameter.grad.isfinite().all())
            ),
            None,
        )
    finally:
        for parameter in parameters.values():
            parameter.grad = None
