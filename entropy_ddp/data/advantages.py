"""What advantage each response of a group has.

With r the rewards of one group's G responses:

- `centered`: A = r - mean(r) (Dr. GRPO, arXiv 2503.20783)
- `standardized`: A = (r - mean(r)) / (std(r) + 1e-4), std unbiased (GRPO, arXiv
  2402.03300)

An `advantage` that the batch file gives overrides what its rewards would yield.
Shape legend: N sequences, G responses of one group.
"""

from typing import Literal

import torch
from torch import Tensor

from entropy_ddp.data.batch import Batch, Sequence
from entropy_ddp.errors import InputError

STANDARD_DEVIATION_FLOOR = 1e-4


def compute_advantages(
    batch: Batch, kind: Literal["centered", "standardized"]
) -> Tensor:
    """Advantage A_i of each sequence, given or computed from its group's rewards.

    A group of one response has the centered advantage 0; its unbiased standard
    deviation does not exist.

    Returns:
        The advantages in file order, float64, [N].

    Raises:
        InputError: if `kind` is unknown, a sequence has neither reward nor advantage,
            or a group of one response is to be standardized.
    """
    if kind not in ("centered", "standardized"):
        raise InputError(
            f"batches.advantage: expected centered or standardized, found {kind!r}; "
            "choose one of them"
        )
    groups: list[list[Sequence]] = [[] for _ in range(batch.num_groups)]
    places: list[list[int]] = [[] for _ in range(batch.num_groups)]
    for place, sequence in enumerate(batch.sequences):
        groups[sequence.group].append(sequence)
        places[sequence.group].append(place)
    advantages = torch.zeros(len(batch), dtype=torch.float64)
    for group, where in zip(groups, places):
        advantages[where] = _compute_group_advantages(group, kind)
    return advantages


def _compute_group_advantages(group: list[Sequence], kind: str) -> Tensor:
    given = [sequence.advantage for sequence in group]
    if None not in given:
        return torch.tensor(given, dtype=torch.float64)
    name = f"group {group[0].group_key!r}"
    rewards = [sequence.reward for sequence in group]
    if None in rewards:
        raise InputError(
            f"{name}: expected a reward for each of its {len(group)} responses, or an "
            f"advantage for each, found none in line "
            f"{group[rewards.index(None)].index + 1}; add the rewards"
        )
    if kind == "standardized" and len(group) == 1:
        raise InputError(
            f"{name}: expected at least 2 responses for standardized advantages (one "
            "has no unbiased standard deviation), found 1; use advantage: centered"
        )
    # Exactly 0: the mean of equal rewards may differ from them by a rounding, and the
    # group would pass for one that carries a signal.
    if len(set(rewards)) == 1:
        return torch.zeros(len(group), dtype=torch.float64)
    values = torch.tensor(rewards, dtype=torch.float64)
    centered = values - values.mean()
    if kind == "centered":
        return centered
    return centered / (values.std() + STANDARD_DEVIATION_FLOOR)
