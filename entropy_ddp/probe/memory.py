"""How much memory a run will need beside what it has, and whether that is free.

At any time a rank holds vectors in parameter space, the activations of one microbatch,
and a few numbers for each token. The vectors are counted from the phases (docs/cost.md,
Memory); what a backward pass saves of a position was measured in the self-check, and
what a forward pass holds of one is a multiple of its widest layer. The estimate is of
the largest of the phases.
"""

import socket
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from entropy_ddp.checkpoint.shards import layers_of, policy_group
from entropy_ddp.data.batch import BLOCK_TOKENS, Shard
from entropy_ddp.data.microbatch import Row, plan_microbatches
from entropy_ddp.errors import InputError
from entropy_ddp.memory import (
    MemoryEstimate,
    free_device_bytes,
    free_host_bytes,
    gigabytes,
    host_bytes,
)
from entropy_ddp.model.forward_mode import ATTENTION_BLOCK_ELEMENTS, CAUSAL_BLOCK_ROWS
from entropy_ddp.model.response_tokens import (
    CHUNK_ELEMENTS,
    CHUNK_TOKENS,
    TRAINABLE_CHUNK_TOKENS,
)
from entropy_ddp.probe.gradient_dot import obstacle
from entropy_ddp.probe.reverse_mode import Audited, audit_sample, other_budget
from entropy_ddp.probe.session import Session

# Of one process, how many ranks are shown that a model may be divided among.
_RANKS_SHOWN = 8
# Of every token of E on its rank, of every token of a block, of every sequence.
_TOKEN_BYTES, _BLOCK_BYTES, _SEQUENCE_BYTES = 64, 1800, 9000
# Of every token of E, where all of them are reversed and the baseline is a fitted one.
_FITTED_BYTES = 500
# Of every token of U, for each block of E that it has a share from: as this rank has it,
# and as all have it.
_SHARE_BYTES = 16
# A chunk's logits, and their tangent; their gradient takes their own place.
_LOGIT_COPIES = 2
# Values of its widest layer that a pass with first derivatives holds of a position at
# once, tangents included, and [rows, keys] arrays of its attention: measured.
_WIDTHS, _ATTENTION_ARRAYS = 16, 6
# Of what is free, what a backward pass that cannot be made again may count on.
_USED = 0.8
# On the CPU: what the heap takes for what a backward pass saves. The C library's finds no
# use for a hole as large as an aligned tensor, and there is one for every tensor that
# was freed in between: measured.
_HEAP = 1.8


def estimate_memory(session: Session, audited: Audited = "sample") -> MemoryEstimate:
    """What the run will need, and what is free, on the rank that is nearest to its limit.

    Args:
        session: an opened run; batches that are not there yet are left out.
        audited: what of E has a backward pass.
    """
    phases = list(_phases(session, audited))
    if session.policy.device.type == "cpu":
        own = {"host_more": max(map(sum, phases)), "device_more": 0}
    else:
        on_device = [vectors + passes for vectors, _, passes in phases]
        own = {"device_more": max(on_device), "host_more": max(p[1] for p in phases)}
        own["device_free"] = free_device_bytes(session.policy.device)
    own["host_more"] += _tokens(session, audited)
    own |= {"host_now": host_bytes(), "host_free": free_host_bytes()}
    ranks = session.world.gather_objects((socket.gethostname(), own))
    shares = _free_for_each([(machine, found["host_free"]) for machine, found in ranks])
    estimates = [
        MemoryEstimate(**found | {"host_free": share})
        for (_, found), share in zip(ranks, shares)
    ]
    return max(estimates, key=_excess)


def bytes_by_shard(session: Session) -> dict[str, int]:
    """Bytes of weights and of the step's vectors on a rank, by `compute.shard`.

    With M the weights, M_c those of them that `base` cuts, M_o those outside of the
    layers, l the largest layer, V the vectors, and R ranks that share a model:

        none    M + V
        base    M - M_c + M_c / R + 2 l + V          (with an adapter)
        full    (M + V) / R + 3 M_o + 2 l            (of full weights)

    A layer is there twice while it is gathered, and what is outside of the layers three
    times, with its tangents: measured. Activations are beside it, the same for all. Of
    one process, what eight would have.
    """
    policy, world, passes = session.policy, session.world, session.passes
    ranks = (
        policy_group(session.config.compute, world)
        if world.world_size > 1
        else _RANKS_SHOWN
    )
    whole = sum(map(_bytes_of, policy.model.parameters()))
    vectors = max(on_device + on_host for on_device, on_host, _ in _vectors(session))
    vectors *= ranks if passes.layers.has_parts else 1
    found = {"none": whole + vectors}
    try:
        layers = layers_of(policy)
    except InputError:
        return found
    sizes = [sum(map(_bytes_of, layer.parameters())) for layer in layers]
    if policy.files.adapter is None:
        gathered = 3 * (whole - sum(sizes)) + 2 * max(sizes)
        name, size = "full", (whole + vectors) // ranks + gathered
    else:
        frozen = (p for layer in layers for p in layer.parameters())
        cut = sum(_bytes_of(p) for p in frozen if not p.requires_grad and p.dim() > 1)
        name, size = "base", whole - cut + cut // ranks + 2 * max(sizes) + vectors
    return found | {f"{name}, {ranks} ranks": size}


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _excess(estimate: MemoryEstimate) -> int:
    """Bytes that are needed beyond what is free, where that is most; below 0 if it fits."""
    on_host = estimate.host_more - estimate.host_free
    if not estimate.device_more:
        return on_host
    return max(on_host, estimate.device_more - estimate.device_free)


def announce_memory(session: Session, audited: Audited) -> None:
    """Estimate, and say before the first pass what is needed, and if it is not free."""
    limit_backward(session, audited)
    session.memory = estimate = estimate_memory(session, audited)
    tell = getattr(session.progress, "tell", None)
    if tell is None:
        return
    tell(f"memory: {estimate.line}")
    is_sharded = session.passes.layers.is_sharded
    if is_sharded:
        sizes = bytes_by_shard(session)
        shown = "; ".join(f"{gigabytes(size)} ({name})" for name, size in sizes.items())
        tell(f"weights and step on a rank, by compute.shard: {shown}")
    if not estimate.fits:
        tell(
            "warning: the run may not fit; lower compute.tokens_per_microbatch, run "
            "fewer ranks on a machine, or set compute.snapshot_device or "
            "precision.buffers"
            + ("" if is_sharded else _smaller(bytes_by_shard(session))),
        )


def limit_backward(session: Session, audited: Audited) -> None:
    """Set how many tokens a microbatch with a backward pass may hold, before the first.

    Only of full weights in parts: all ranks make such a pass together, and where memory
    runs out it cannot be made again with less. On the rank with least room that is

        ( .8 free - vectors - logits - layers that are gathered ) / bytes of a position

    with the bytes that the self-check has measured. A row that is longer is still passed
    over by itself.

    Args:
        session: an opened run.
        audited: what of E has a backward pass.
    """
    passes = session.passes
    if not passes.layers.has_parts:
        return
    verify = session.config.attribution.verify
    buffers = 8 if verify and audited == "gradient" else 6
    on_device, on_host = _with_gradients(session, buffers)
    if passes.device.type == "cpu":
        own = (socket.gethostname(), free_host_bytes())
        shares = _free_for_each(session.world.gather_objects(own))
        free, vectors = shares[session.world.rank], on_device + on_host
    else:
        free, vectors = free_device_bytes(passes.device), on_device
    beside = vectors + _logits(session, backward=True) + passes.layers.gathered_bytes
    room = (_USED * free - beside) / (_heap(session) * passes.saved_per_position)
    least = int(-session.world.max(-room))
    configured = session.config.compute.tokens_per_microbatch
    if least >= configured:
        return
    passes.most_backward = max(1, least)
    tell = getattr(session.progress, "tell", None)
    if tell is not None:
        tell(
            f"memory: backward passes take {passes.most_backward:,} tokens at a time, "
            f"for which there is room, not {configured:,}"
        )


def _free_for_each(ranks: list[tuple[str, int]]) -> list[int]:
    """Bytes that each rank may count on.

    What is free on a machine is its ranks' together; each has looked at its own time.

    Args:
        ranks: machine of each, and what it found free there.
    """
    free: dict[str, list[int]] = {}
    for machine, found in ranks:
        free.setdefault(machine, []).append(found)
    return [min(free[machine]) // len(free[machine]) for machine, _ in ranks]


def _heap(session: Session) -> float:
    """What a byte that a backward pass keeps takes."""
    return _HEAP if session.passes.device.type == "cpu" else 1.0


def _smaller(sizes: dict[str, int]) -> str:
    """What dividing the model would make of it, if that is less."""
    (whole, *others), names = sizes.values(), list(sizes)
    if not others or others[0] >= whole:
        return ""
    setting, _, ranks = names[1].partition(", ")
    return (
        f"; or set compute.shard: {setting}, with which weights and step take "
        f"{gigabytes(others[0])} on each of {ranks}, in place of {gigabytes(whole)}"
    )


def described(estimate: MemoryEstimate) -> dict[str, Any]:
    """The estimate as facts, in bytes."""
    return asdict(estimate) | {"fits": estimate.fits}


def _phases(session: Session, audited: Audited) -> Iterator[tuple[int, int, int]]:
    """Bytes of vectors on the device and on the host, and of a pass, of the phases."""
    buffer, forward = _buffer_bytes(session), _forward(session)
    own, given = _backward(session, _of_update(session)), session.change is not None
    reverse = _backward(session, _of_evaluation(session, audited))
    on_device, on_host = _while_stepped(session)
    yield on_device, on_host, forward
    # Gradients are summed in `.grad`: beside nothing; beside gradient and change; where
    # they come block by block, beside their sum too, and that of the even blocks.
    verify = session.config.attribution.verify
    together = 4 + verify if audited == "gradient" else 3
    for buffers, kept in ((1, 0 if given else own), (together, reverse)):
        yield (*_with_gradients(session, buffers), kept)
    if _has_gradient_dot(session):
        preconditioned = session.config.gradient_dot.direction == "preconditioned"
        whole = _backward(session, _of_evaluation(session, "gradient"))
        vectors = _with_gradients(session, 6 if preconditioned else 5)
        yield (*vectors, max(own, whole))
    if verify and audited == "gradient":
        # The masked step's, beside those of the step before.
        yield on_device, on_host + 4 * buffer, max(forward, own)
        # The four of the run; of what would hold the entropy a half's step, the best
        # gradient, and another one with its step, or a slope.
        yield (*_with_gradients(session, 8), own)


def _vectors(session: Session) -> Iterator[tuple[int, int, int]]:
    """Bytes of vectors on the device and on the host: after the step, and in an audit."""
    yield (*_while_stepped(session), 0)
    yield (*_with_gradients(session, 3), 0)


def _buffer_bytes(session: Session) -> int:
    dtype = session.buffer_dtype
    return session.passes.layout.numel * torch.empty(0, dtype=dtype).element_size()


def _weight_bytes(session: Session) -> int:
    parameters = session.policy.parameters.values()
    return sum(p.numel() * p.element_size() for p in parameters)


def _while_stepped(session: Session) -> tuple[int, int]:
    """Bytes of gradient, change and the way back: on the device, on the host."""
    way_back, optimizer = _weight_bytes(session), session.optimizer
    for state in optimizer.state.values() if optimizer is not None else ():
        way_back += sum(t.numel() * t.element_size() for t in state.values())
    vectors = 2 * _buffer_bytes(session)
    if session.policy.device.type == "cpu":
        return 0, vectors + way_back
    if session.config.compute.snapshot_device == "device":
        return way_back, vectors
    return 0, vectors + way_back


def _with_gradients(session: Session, buffers: int) -> tuple[int, int]:
    """Bytes of so many buffers and of `.grad`: on the device, on the host.

    `.grad` is the only copy of the gradients: DistributedDataParallel has no buckets for
    them (`World.wrap`).
    """
    vectors, gradients = buffers * _buffer_bytes(session), _weight_bytes(session)
    if session.policy.device.type == "cpu":
        return 0, vectors + gradients
    return gradients, vectors


def _has_gradient_dot(session: Session) -> bool:
    enabled = session.config.gradient_dot.enabled
    return enabled is True or (
        enabled == "auto" and obstacle(session.batches, session.planned) is None
    )


def _forward(session: Session) -> int:
    """Bytes of the largest microbatch in a pass with first derivatives."""
    passes, needs = session.passes, [0]
    item = passes.dtype.itemsize
    config = passes.tokens.transformer.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    for batch in session.batches.values():
        for rows in _plan(session, _part(session.shard(batch.split))):
            longest = max(row.length for row in rows)
            positions = len(rows) * longest
            seen = longest if rows[0].is_tree else min(CAUSAL_BLOCK_ROWS, longest)
            block = min(heads * seen * positions, ATTENTION_BLOCK_ELEMENTS)
            elements = _WIDTHS * positions * passes.tokens.widest
            needs.append(item * (elements + _ATTENTION_ARRAYS * block))
    return max(needs) + _logits(session, backward=False) + passes.layers.gathered_bytes


def _backward(session: Session, microbatches: Iterable[list[Row]]) -> int:
    """Bytes that a backward pass keeps of the largest of them, and of its logits."""
    passes = session.passes
    positions = max(map(_positions, microbatches), default=0)
    kept = int(_heap(session) * positions * passes.saved_per_position)
    return kept + _logits(session, backward=True) + passes.layers.gathered_bytes


def _of_update(session: Session) -> Iterable[list[Row]]:
    """The microbatches of U."""
    if "U" not in session.batches:
        return []
    return _plan(session, _part(session.shard("U")), backward=True)


def _of_evaluation(session: Session, audited: Audited) -> Iterable[list[Row]]:
    """The microbatches of what of E has a backward pass."""
    if "E" not in session.batches:
        return []
    batch = session.batches["E"]
    if audited == "gradient":
        return _plan(session, _part(session.shard(batch.split)), backward=True)
    size = audit_sample(batch) if audited == "sample" else len(batch)
    sample = session.first_sequences(size)
    budget = _backward_budget(session, other_budget(session))
    return plan_microbatches(_part(sample), budget)


def _backward_budget(session: Session, configured: int) -> int:
    most = session.passes.most_backward
    return configured if most is None else min(configured, most)


def _plan(
    session: Session, shard: Shard, backward: bool = False
) -> Iterable[list[Row]]:
    passes = session.passes
    budget = session.config.compute.tokens_per_microbatch
    if backward:
        budget = _backward_budget(session, budget)
    return plan_microbatches(shard, budget, passes.sharing, fill=passes.fill)


def _positions(rows: list[Row]) -> int:
    return len(rows) * max(row.length for row in rows)


def _logits(session: Session, backward: bool) -> int:
    """Bytes of a chunk's logits, and of a trainable output layer's gradient."""
    layer = session.passes.tokens.output_layer.weight
    trainable = backward and layer.requires_grad
    fewest = TRAINABLE_CHUNK_TOKENS if trainable else CHUNK_TOKENS
    chunk = max(fewest, CHUNK_ELEMENTS // layer.shape[0])
    logits = _LOGIT_COPIES * chunk * layer.shape[0]
    # The sum over chunks, the chunk's own, and the result.
    gradient = 3 * layer.numel() * trainable
    return (logits + gradient) * layer.element_size()


def _part(shard: Shard) -> Shard:
    """The shard, or as much of a very long one as its longest rows are in."""
    most = 100_000
    if len(shard.positions) <= most:
        return shard
    batch = shard.batch
    longest = (batch.prompt_lengths + batch.lengths)[shard.positions]
    places = longest.topk(most).indices.sort().values
    return Shard(batch=batch, positions=shard.positions[places])


def _tokens(session: Session, audited: Audited) -> int:
    """Bytes of numbers for each token and sequence."""
    total = 0
    for batch in session.batches.values():
        tokens = session.shard(batch.split).ragged.num_tokens
        total += _TOKEN_BYTES * tokens + _BLOCK_BYTES * min(tokens, BLOCK_TOKENS)
        total += _SEQUENCE_BYTES * len(batch)
        fitted = session.config.slope_estimator[1] in ("ridge", "action_value")
        if batch.split == "E" and audited != "sample" and fitted:
            total += _FITTED_BYTES * tokens
        if batch.split == "U" and audited == "gradient":
            blocks = session.config.attribution.blocks
            total += _SHARE_BYTES * blocks * batch.num_tokens
    return total
