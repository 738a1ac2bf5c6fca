"""Do rewards become the advantages that Dr. GRPO and GRPO define?"""

import statistics

import pytest
import torch

from entropy_ddp.data.advantages import compute_advantages
from entropy_ddp.data.batch import Batch, Sequence
from entropy_ddp.errors import InputError

KINDS = ["centered", "standardized"]


def make_batch(*rows: tuple[int, float | None, float | None]) -> Batch:
    """A batch of (group, reward, advantage)."""
    numbers: dict[int, int] = {}
    return Batch(
        split="U",
        sequences=tuple(
            Sequence(
                index=index,
                group=numbers.setdefault(group, len(numbers)),
                group_key=group,
                prompt_ids=torch.tensor([1]),
                response_ids=torch.tensor([1]),
                reward=reward,
                advantage=advantage,
            )
            for index, (group, reward, advantage) in enumerate(rows)
        ),
    )


# Groups of different size, interleaved.
REWARDS = [(4, 1.0), (7, 0.3), (4, 0.0), (4, -2.5), (7, 0.1), (4, 1.0)]


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_are_those_of_a_loop(kind: str) -> None:
    batch = make_batch(*((group, reward, None) for group, reward in REWARDS))
    expected = []
    for group, reward in REWARDS:
        rewards = [r for g, r in REWARDS if g == group]
        advantage = reward - statistics.fmean(rewards)
        if kind == "standardized":
            advantage /= statistics.stdev(rewards) + 1e-4
        expected.append(advantage)
    result = compute_advantages(batch, kind)
    assert result.dtype == torch.float64
    torch.testing.assert_close(
        result, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-15
    )


@pytest.mark.parametrize("kind", KINDS)
def test_given_advantages_override_rewards(kind: str) -> None:
    batch = make_batch((0, 1.0, 5.0), (1, 1.0, None), (0, 0.0, 6.0), (1, 0.0, None))
    result = compute_advantages(batch, kind)
    assert result[[0, 2]].tolist() == [5.0, 6.0]
    assert result[1] == -result[3] != 0


@pytest.mark.parametrize("kind", KINDS)
def test_given_advantages_need_no_reward_and_no_second_response(kind: str) -> None:
    assert compute_advantages(make_batch((0, None, 5.0)), kind).tolist() == [5.0]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_have_advantage_zero_exactly(kind: str) -> None:
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    assert (rewards - rewards.mean()).abs().max() > 0  # what a formula alone gives
    batch = make_batch(*[(0, 0.1, None)] * 3)
    assert compute_advantages(batch, kind).tolist() == [0.0, 0.0, 0.0]


def test_a_single_response_is_its_own_mean() -> None:
    batch = make_batch((0, 3.0, None), (1, 1.0, None), (1, 0.0, None))
    assert compute_advantages(batch, "centered").tolist() == [0.0, 0.5, -0.5]


def test_a_single_response_cannot_be_standardized() -> None:
    batch = make_batch((5, 1.0, None), (5, 0.0, None), (8, 3.0, None))
    message = "group 8: expected at least 2 responses .*found 1; use advantage: cent"
    with pytest.raises(InputError, match=message):
        compute_advantages(batch, "standardized")


def test_a_missing_reward_is_named() -> None:
    batch = make_batch((5, 1.0, None), (5, None, None))
    message = "group 5: expected a reward for each of its 2 .*none in line 2; add"
    with pytest.raises(InputError, match=message):
        compute_advantages(batch, "centered")


def test_an_unknown_kind_is_an_error() -> None:
    message = "expected centered or standardized, found 'rloo'"
    with pytest.raises(InputError, match=message):
        compute_advantages(make_batch((0, 1.0, None)), "rloo")  # type: ignore[arg-type]
