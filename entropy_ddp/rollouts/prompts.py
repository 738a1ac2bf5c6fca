"""Which prompts rollouts are sampled for.

A prompt file holds JSON lines with `prompt` (text) or `prompt_ids`, and any other keys
(the right answer, say), which reward functions see and which are carried to the rollout
file.
"""

from pathlib import Path
from typing import Any

import torch

from entropy_ddp.errors import InputError
from entropy_ddp.rollouts.jsonlines import make_problem, read_rows
from entropy_ddp.rollouts.rows import KNOWN_KEYS, check_types

# What sampling writes beside a prompt's own keys.
SAMPLED_KEYS = KNOWN_KEYS.keys() - {"prompt", "prompt_ids"} | {"prompt_index"}


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Read and check a prompt file.

    Whether the ids are in the checkpoint's vocabulary is checked when they are sampled
    for.

    Args:
        path: file whose name ends in `.jsonl` or `.jsonl.gz`.

    Returns:
        The rows in file order; row i stands on line i + 1.

    Raises:
        InputError: if anything is wrong with the file, naming `path:line`.
    """
    rows = list(read_rows(path))
    for number, row in enumerate(rows, start=1):
        where = f"{path}:{number}"
        check_types(row, where)
        if row.get("prompt_ids") is None and row.get("prompt") is None:
            raise make_problem(
                where, "`prompt_ids` or `prompt`", "neither", "add one of them"
            )
        taken = sorted(SAMPLED_KEYS & row.keys())
        if taken:
            raise make_problem(
                where,
                "no key that sampling itself writes",
                f"`{taken[0]}`",
                "rename or delete the key",
            )
    return rows


def draw_prompts(
    num_prompts_available: int, num_prompts: int, with_replacement: bool, seed: int
) -> list[int]:
    """Draw prompts uniformly at random.

    Args:
        num_prompts_available: number of rows of the prompt file.
        num_prompts: number of draws.
        with_replacement: whether a prompt may be drawn more than once.
        seed: seed of the draws' own random generator.

    Returns:
        The drawn prompts' 0-based rows, in order of drawing, `num_prompts` of them.

    Raises:
        InputError: if more prompts are to be drawn without replacement than there are.
    """
    generator = torch.Generator().manual_seed(seed)
    if with_replacement:
        drawn = torch.randint(
            num_prompts_available, (num_prompts,), generator=generator
        )
        return drawn.tolist()
    if num_prompts > num_prompts_available:
        raise InputError(
            f"num_prompts: expected at most {num_prompts_available}, the number of "
            f"prompts in the file, found {num_prompts}; draw fewer or set "
            "with_replacement: true"
        )
    return torch.randperm(num_prompts_available, generator=generator)[
        :num_prompts
    ].tolist()
