"""An opened policy is divided among the ranks, as `compute.shard` says.

`base`: of a policy with an adapter the frozen matrices of every layer are held in parts.
Embedding, output layer, norms, biases and the adapter stay whole on every rank, so that
the step, its buffers and their sums are those of a policy that is not divided.

`full`: of a policy whose weights are all trained, every rank has a part of every
parameter. The step is taken on the parts; buffers, optimizer state and the way back are
of the parts, too.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from entropy_ddp.checkpoint.mapped import settle_buffers, settle_parameters
from entropy_ddp.checkpoint.policy import Policy, require_finite_weights
from entropy_ddp.checkpoint.stored import Part
from entropy_ddp.config import Compute
from entropy_ddp.distributed import World
from entropy_ddp.distributed.sharding import (
    ShardedParameters,
    WholeLayers,
    group_size,
    shard_base,
    shard_full,
    without_parts,
)
from entropy_ddp.errors import InputError
from entropy_ddp.model.forward_mode import weight_norms
from entropy_ddp.model.normalisation import normalisations
from entropy_ddp.model.precision import precision_context
from entropy_ddp.model.response_tokens import ResponseTokens


def shard_policy(
    policy: Policy, tokens: ResponseTokens, compute: Compute, world: World
) -> tuple[Policy, WholeLayers]:
    """Divide the policy's layers among the ranks; the model is changed in place.

    Args:
        tokens: the policy's model as a function of response tokens.

    Returns:
        The policy with the parameters that this rank has, and how layers are gathered.

    Raises:
        InputError: there is no group of ranks, or this policy cannot be divided so.
    """
    if compute.shard == "none":
        return policy, WholeLayers()
    size = _group_size(compute, world)
    layers: WholeLayers
    if compute.shard == "base":
        _require_adapter(policy)
        settle = partial(_settle, policy)
        layers = shard_base(layers_of(policy), world, policy.device, size, settle)
        _settle_rest(policy)
    else:
        _require_full_weights(policy)
        policy, layers = divided(policy, tokens, layers_of(policy), world, size)
    if policy.mapped:
        require_finite_weights(policy.model)
    return policy, layers


def divided(
    policy: Policy,
    tokens: ResponseTokens,
    layers: list[nn.Module],
    world: World,
    group: int,
) -> tuple[Policy, ShardedParameters]:
    """The policy with a part of every parameter on each of so many ranks."""
    # Nobody may hold whole parameters while they are cut one after another.
    policy.parameters.clear()
    settle = partial(_settle, policy)
    sharded = shard_full(layers, tokens, world, policy.device, group, settle)
    _settle_rest(policy)
    for modules in sharded.unsharded():
        sharded.normalisations |= normalisations(modules)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=policy.device)
    with precision_context(policy.dtype):
        parts = sharded.find_parts(lambda: tokens.transformer(input_ids=ids))
    return replace(policy, parameters=parts), sharded


def _settle(policy: Policy, parameters: Iterable[nn.Parameter]) -> None:
    """Read these parameters from the files that they are in."""
    names = {id(p): name for name, p in policy.model.named_parameters()}
    found = [p for p in parameters if names.get(id(p)) in policy.mapped]
    for parameter in found:
        if names[id(parameter)] in policy.unread:
            parameter.data = policy.unread[names[id(parameter)]].read()
        settle_parameters([parameter], policy.dtype, policy.device)


def _settle_rest(policy: Policy) -> None:
    """What stays whole, and the adapter, on this rank's device."""
    if not policy.mapped:
        return
    _settle(policy, without_parts(policy.model.parameters()))
    settle_parameters(policy.parameters.values(), None, policy.device)
    settle_buffers(policy.model, policy.dtype, policy.device)


def parts_of(layers: WholeLayers, policy: Policy) -> dict[str, Part] | None:
    """What this rank has of each parameter of the checkpoint; None for all of it."""
    if not isinstance(layers, ShardedParameters):
        return None
    return {name: Part(*layers.region(name)) for name in policy.parameters}


def policy_group(compute: Compute, world: World) -> int:
    """Number of ranks that share a model between them, or would.

    Raises:
        InputError: the ranks cannot be divided so.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size))
    return group_size(compute.shard_group, world, ranks_here)


def _group_size(compute: Compute, world: World) -> int:
    if world.store is None:
        raise InputError(
            f"compute.shard: {compute.shard}: expected several ranks to divide the model "
            "among, found one process; start it with torchrun --nproc_per_node=N -m "
            "entropy_ddp, or set compute.shard: none"
        )
    return policy_group(compute, world)


def _require_adapter(policy: Policy) -> None:
    files = policy.files
    if files.adapter is None:
        raise InputError(
            f"compute.shard: base: expected an adapter, whose base model is divided, "
            f"found full weights in {files.base}; set compute.shard: full"
        )
    settings: Any = policy.model
    config = settings.peft_config[files.adapter_name]
    if weight_norms(policy.model):
        raise _unsupported("a DoRA adapter, which needs the norms of whole weights")
    if config.modules_to_save:
        names = ", ".join(config.modules_to_save)
        raise _unsupported(f"an adapter that trains whole modules ({names})")


def _require_full_weights(policy: Policy) -> None:
    if policy.files.adapter is not None:
        raise InputError(
            "compute.shard: full: expected weights that are all trained, found the "
            f"adapter {policy.files.adapter}; set compute.shard: base"
        )


def _unsupported(found: str) -> InputError:
    return InputError(
        f"compute.shard: base: expected a LoRA adapter on the layers' projections, found "
        f"{found}; set compute.shard: none"
    )


def layers_of(policy: Policy) -> list[nn.Module]:
    """The layers of the model, in their order.

    Raises:
        InputError: the model does not keep them in one list.
    """
    model: Any = policy.model
    held = model.get_base_model() if hasattr(model, "get_base_model") else model
    transformer = held.base_model
    count = transformer.config.get_text_config().num_hidden_layers
    found = [
        module
        for module in transformer.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    sizes = [sum(p.numel() for p in layers.parameters()) for layers in found]
    if not found:
        raise InputError(
            f"compute.shard: expected a list of {count} layers in "
            f"{type(transformer).__name__}, found none; set compute.shard: none"
        )
    return list(found[sizes.index(max(sizes))])
