"""An opened policy is divided among the ranks, as `compute.shard` says.

`base`: of a policy with an adapter the frozen matrices of every layer are held in parts.
Embedding, output layer, norms, biases and the adapter stay whole on every rank, so that
the step, its buffers and their sums are those of a policy that is not divided.
"""

import os
from typing import Any

from torch import nn

from entropy_ddp.checkpoint.policy import Policy
from entropy_ddp.config import Compute
from entropy_ddp.distributed import World
from entropy_ddp.distributed.sharding import WholeLayers, group_size, shard_base
from entropy_ddp.errors import InputError
from entropy_ddp.model.forward_mode import weight_norms


def shard_policy(policy: Policy, compute: Compute, world: World) -> WholeLayers:
    """Divide the policy's layers among the ranks; the model is changed in place.

    Raises:
        InputError: there is no group of ranks, or this policy cannot be divided so.
    """
    if compute.shard == "none":
        return WholeLayers()
    size = _group_size(compute, world)
    _require_adapter(policy)
    return shard_base(_layers(policy), world, policy.device, size)


def _group_size(compute: Compute, world: World) -> int:
    if world.store is None:
        raise InputError(
            f"compute.shard: {compute.shard}: expected several ranks to divide the model "
            "among, found one process; start it with torchrun --nproc_per_node=N -m "
            "entropy_ddp, or set compute.shard: none"
        )
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size))
    return group_size(compute.shard_group, world, ranks_here)


def _require_adapter(policy: Policy) -> None:
    files = policy.files
    if files.adapter is None:
        raise InputError(
            f"compute.shard: base: expected an adapter, whose base model is divided, "
            f"found full weights in {files.base}; set compute.shard: none"
        )
    settings: Any = policy.model
    config = settings.peft_config[files.adapter_name]
    if weight_norms(policy.model):
        raise _unsupported("a DoRA adapter, which needs the norms of whole weights")
    if config.modules_to_save:
        names = ", ".join(config.modules_to_save)
        raise _unsupported(f"an adapter that trains whole modules ({names})")


def _unsupported(found: str) -> InputError:
    return InputError(
        f"compute.shard: base: expected a LoRA adapter on the layers' projections, found "
        f"{found}; set compute.shard: none"
    )


def _layers(policy: Policy) -> list[nn.Module]:
    """The layers of the model, in their order.

    Raises:
        InputError: the model does not keep them in one list.
    """
    model: Any = policy.model
    transformer = model.get_base_model().base_model
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
