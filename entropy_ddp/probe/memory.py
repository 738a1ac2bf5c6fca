"""How much memory a run will need beside what it has, and whether that is free.

At any time a rank holds vectors in parameter space, the activations of one microbatch,
and a few numbers for each token. The vectors are counted from the phases (README,
Memory); what a backward pass saves of a position was measured in the self-check; the
rest is small. The estimate is of the largest of the phases.
"""

import socket
from dataclasses import asdict
from typing import Any

import torch

from entropy_ddp.memory import (
    MemoryEstimate,
    free_device_bytes,
    free_host_bytes,
    host_bytes,
)
from entropy_ddp.policy.response_tokens import CHUNK_ELEMENTS, TRAINABLE_CHUNK_TOKENS
from entropy_ddp.probe.gradient_dot import obstacle
from entropy_ddp.probe.session import Session
from entropy_ddp.rollouts.batch import BLOCK_TOKENS, Batch, Shard
from entropy_ddp.rollouts.microbatch import plan_microbatches

# Of every token of E on its rank, of every token of a block, of every sequence.
_TOKEN_BYTES, _BLOCK_BYTES, _SEQUENCE_BYTES = 64, 1500, 6000
# What is made of a logit: itself, its tangent or gradient, and blocks of float64.
_LOGIT_BYTES = 16


def estimate_memory(session: Session) -> MemoryEstimate:
    """What the run will need, and what is free, on the rank that is nearest to its limit.

    Args:
        session: an opened run; batches that are not there yet are left out.
    """
    on_device, on_host = _vectors(session)
    largest = {split: _activations(session, split) for split in session.batches}
    activations = max(largest.values(), default=0)
    if session.policy.device.type == "cpu":
        own = {"host_more": on_host + on_device + activations, "device_more": 0}
    else:
        own = {"host_more": on_host, "device_more": on_device + activations}
        own["device_free"] = free_device_bytes(session.policy.device)
    own["host_more"] += _tokens(session)
    own |= {"host_now": host_bytes(), "host_free": free_host_bytes()}
    ranks = session.world.gather_objects((socket.gethostname(), own))
    machines = [machine for machine, _ in ranks]
    estimates = [
        MemoryEstimate(**found | {"host_free": found["host_free"] // machines.count(m)})
        for m, found in ranks
    ]
    return max(
        estimates,
        key=lambda e: max(e.host_more - e.host_free, e.device_more - e.device_free),
    )


def announce_memory(session: Session) -> None:
    """Estimate, and say before the first pass what is needed, and if it is not free."""
    session.memory = estimate = estimate_memory(session)
    tell = getattr(session.progress, "tell", None)
    if tell is None:
        return
    tell(f"memory: {estimate.line}")
    if not estimate.fits:
        tell(
            "warning: the run may not fit; lower compute.tokens_per_microbatch, run "
            "fewer ranks on a machine, or set compute.snapshot_device or "
            "precision.buffers",
        )


def described(estimate: MemoryEstimate) -> dict[str, Any]:
    """The estimate as facts, in bytes."""
    return asdict(estimate) | {"fits": estimate.fits}


def _vectors(session: Session) -> tuple[int, int]:
    """Bytes of vectors in parameter space at the largest phase: on device, on host."""
    config, parameters = session.config, session.policy.parameters.values()
    elements = session.passes.layout.numel
    weights = sum(p.numel() * p.element_size() for p in parameters)
    buffer = elements * torch.empty(0, dtype=session.buffer_dtype).element_size()
    optimizer = session.optimizer
    moments = 0
    for state in optimizer.state.values() if optimizer is not None else ():
        moments += sum(t.numel() * t.element_size() for t in state.values())
    # Gradient, change and the way back; or gradient, change, one more and `.grad`.
    stepping = 2 * buffer + weights + moments
    backward = 3 * buffer
    enabled = config.gradient_dot.enabled
    if enabled is True or (
        enabled == "auto" and obstacle(session.batches, session.planned) is None
    ):
        preconditioned = config.gradient_dot.direction == "preconditioned"
        backward = (6 if preconditioned else 5) * buffer
    if config.attribution.verify:
        backward = 5 * buffer + weights + moments
    if session.policy.device.type == "cpu":
        return 0, max(stepping, backward + weights)
    kept = config.compute.snapshot_device == "device"
    way_back = weights + moments
    host = max(stepping - (way_back if kept else 0), backward)
    # The gradient or the direction, and the way back.
    return weights + (way_back if kept else 0), host


def _activations(session: Session, split: str) -> int:
    """Bytes of the largest microbatch's activations, and of its logits."""
    batch = session.batches[split]
    whole = session.shard(batch)
    budget = session.config.compute.tokens_per_microbatch
    # Of E the audits' sample has a backward pass; all of it where attributed.
    passes = session.passes
    plan = plan_microbatches(
        _part(batch, whole), budget, passes.sharing, fill=passes.fill
    )
    positions = max((len(r) * max(x.length for x in r) for r in plan), default=0)
    layer = session.passes.tokens.output_layer.weight
    chunk = max(TRAINABLE_CHUNK_TOKENS, CHUNK_ELEMENTS // layer.shape[0])
    logits = chunk * layer.shape[0] * _LOGIT_BYTES
    # Of a trainable output layer the sum over chunks, the chunk's own, and the result.
    gradient = 3 * layer.numel() * layer.element_size() * layer.requires_grad
    return int(positions * session.passes.saved_per_position) + logits + gradient


def _part(batch: Batch, shard: Shard) -> Shard:
    """The shard, or as much of a very long one as its longest rows are in."""
    most = 100_000
    if len(shard.positions) <= most:
        return shard
    longest = (batch.prompt_lengths + batch.lengths)[shard.positions]
    places = longest.topk(most).indices.sort().values
    return Shard(batch=batch, positions=shard.positions[places])


def _tokens(session: Session) -> int:
    """Bytes of numbers for each token and sequence."""
    total = 0
    for batch in session.batches.values():
        tokens = session.shard(batch).ragged.num_tokens
        total += _TOKEN_BYTES * tokens + _BLOCK_BYTES * min(tokens, BLOCK_TOKENS)
        total += _SEQUENCE_BYTES * len(batch)
    return total
