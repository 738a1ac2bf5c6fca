"""What cannot be divided among ranks is refused by name, before anything is divided."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_checkpoint

from entropy_ddp.checkpoint.find import find_checkpoint
from entropy_ddp.checkpoint.policy import load_policy
from entropy_ddp.checkpoint.shards import shard_policy
from entropy_ddp.config import Checkpoint, Compute, Precision
from entropy_ddp.distributed import World
from entropy_ddp.distributed.sharding import group_size
from entropy_ddp.errors import InputError


def shard(root: Path, world: World, shard: str = "base", **options: Any) -> None:
    saved = save_checkpoint(root, "llama", **options)
    files = find_checkpoint(Checkpoint.model_validate(saved.section))
    policy = load_policy(files, Precision(), "sdpa", torch.device("cpu"))
    compute = Compute.model_validate({"shard": shard})
    shard_policy(policy, compute, world)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"full": True},
            "expected an adapter, whose base model is divided, found full",
        ),
        ({"use_dora": True}, "found a DoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, r"trains whole modules \(lm_head\)"),
    ],
)
def test_what_a_divided_base_cannot_hold(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    ranks = World(world_size=2, store=object())
    with pytest.raises(InputError, match=f"{message}.*set compute.shard: none"):
        shard(tmp_path, ranks, **options)


def test_one_process_divides_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected several ranks.*torchrun"):
        shard(tmp_path, World())


def test_groups_of_ranks_are_of_equal_size() -> None:
    world = World(world_size=6)
    assert [group_size(asked, world, 3) for asked in ("all", "node", 2)] == [6, 3, 2]
    with pytest.raises(InputError, match="found 6 ranks and groups of 4"):
        group_size(4, world, 3)
