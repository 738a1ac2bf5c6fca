"""The ranks of a run: their process group, and what happens when one of them fails.

The only room that imports `torch.distributed`. A group is started exactly when a
launcher's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) is present; without
one, every function here works on the local value, so that callers have one path.
"""

from entropy_ddp.distributed.group import (
    LAUNCHER_VARIABLES,
    RANK_TIMEOUT_SECONDS,
    is_launched,
    joined_world,
    process_group,
    single_process_warning,
)
from entropy_ddp.distributed.world import World, interruptibly

__all__ = [
    "LAUNCHER_VARIABLES",
    "RANK_TIMEOUT_SECONDS",
    "World",
    "interruptibly",
    "is_launched",
    "joined_world",
    "process_group",
    "single_process_warning",
]
