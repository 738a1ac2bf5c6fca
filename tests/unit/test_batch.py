"""Are ragged sums what loops give, and do shards split a batch as they promise?"""

import random
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from entropy_ddp.data import batch as batch_module
from entropy_ddp.data.batch import Batch, Ragged, Sequence

LENGTHS = [
    [3, 1, 4],
    [0, 2, 0, 0, 5, 1, 0],  # zero-length first, inside, in a row and last
    [0],
    [0, 0],
    [1],
    [],
]


def make_batch(shape: list[tuple[int, int, int]], split: str = "E") -> Batch:
    """A batch of (group, prompt length, response length); every token id differs."""
    ids = iter(range(10**6))
    return Batch(
        split=split,
        sequences=tuple(
            Sequence(
                index=index,
                group=group,
                group_key=group,
                prompt_ids=torch.tensor([next(ids) for _ in range(prompt)]),
                response_ids=torch.tensor(
                    [next(ids) for _ in range(response)], dtype=torch.int64
                ),
            )
            for index, (group, prompt, response) in enumerate(shape)
        ),
    )


def make_random_batch(seed: int, num_groups: int = 7) -> Batch:
    """Groups of 1 to 4 responses in random order, some responses empty."""
    draw = random.Random(seed)
    shape = [
        (group, draw.randint(1, 9), draw.choice([0, 0, 1, 2, 5, 30]))
        for group in range(num_groups)
        for _ in range(draw.randint(1, 4))
    ]
    draw.shuffle(shape)
    return make_batch(shape)


@pytest.fixture(params=LENGTHS, ids=str)
def lengths(request: pytest.FixtureRequest) -> list[int]:
    return request.param


def make_values(lengths: list[int]) -> tuple[Ragged, torch.Tensor, list[list[float]]]:
    """A layout, a flat array, and the same values as a list per sequence."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
    pieces = [piece.tolist() for piece in values.split(lengths)] if lengths else []
    return Ragged(torch.tensor(lengths, dtype=torch.int64)), values, pieces


def flatten(pieces: list[list[float]]) -> torch.Tensor:
    return torch.tensor([x for piece in pieces for x in piece], dtype=torch.float64)


def test_ragged_says_where_each_token_is(lengths: list[int]) -> None:
    ragged = Ragged(torch.tensor(lengths, dtype=torch.int64))
    expected = [(i, k) for i, length in enumerate(lengths) for k in range(length)]
    assert ragged.num_tokens == sum(lengths)
    assert ragged.sequence_of_token.tolist() == [i for i, _ in expected]
    assert ragged.position.tolist() == [k for _, k in expected]
    assert ragged.starts.tolist() == [sum(lengths[:i]) for i in range(len(lengths))]


def test_ragged_sums_are_those_of_loops(lengths: list[int]) -> None:
    ragged, values, pieces = make_values(lengths)
    total = torch.tensor([sum(piece) for piece in pieces], dtype=torch.float64)
    before = flatten([[sum(p[:k]) for k in range(len(p))] for p in pieces])
    after = flatten([[sum(p[k + 1 :]) for k in range(len(p))] for p in pieces])
    for result, expected in (
        (ragged.sum(values), total),
        (ragged.sum_before(values), before),
        (ragged.sum_after(values), after),
        (ragged.spread(total), flatten([[sum(p)] * len(p) for p in pieces])),
    ):
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_the_parts_of_a_sequence_add_up() -> None:
    ragged, values, _ = make_values([4, 0, 7, 1])
    parts = ragged.sum_before(values) + values + ragged.sum_after(values)
    torch.testing.assert_close(parts, ragged.spread(ragged.sum(values)))


@pytest.mark.parametrize("name", ["sum_before", "sum_after"])
def test_partial_sums_do_not_depend_on_the_neighbours(name: str) -> None:
    alone, values, _ = make_values([5])
    # A neighbour 1e12 times as large would eat the digits in one cumulative sum.
    together = torch.cat([torch.full((3,), 1e12, dtype=torch.float64), values])
    ragged = Ragged(torch.tensor([3, 5]))
    result = getattr(ragged, name)(together)[3:]
    assert torch.equal(result, getattr(alone, name)(values))


def test_batch_counts() -> None:
    batch = make_batch([(0, 2, 3), (1, 1, 0), (0, 2, 4)])
    assert len(batch) == 3
    assert (batch.num_groups, batch.num_tokens) == (2, 7)
    assert batch.lengths.tolist() == [3, 0, 4]
    assert batch.groups.tolist() == [0, 1, 0]
    assert batch.group_sizes.tolist() == [2, 1]
    assert [s.index for s in batch.first(2).sequences] == [0, 1]


def test_with_advantages_changes_nothing_else() -> None:
    batch = make_batch([(0, 2, 3), (0, 1, 1)])
    changed = batch.with_advantages(torch.tensor([0.5, -0.5], dtype=torch.float64))
    assert changed.advantages.tolist() == [0.5, -0.5]
    assert changed.advantages.dtype == torch.float64
    assert [s.index for s in changed.sequences] == [0, 1]
    assert batch.sequences[0].advantage is None
    with pytest.raises(ValueError, match="shorter"):
        batch.with_advantages(torch.zeros(1))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("seed", range(5))
def test_shards_hold_every_sequence_once_and_whole_groups(
    world_size: int, seed: int
) -> None:
    batch = make_random_batch(seed)
    shards = [batch.shard(rank, world_size) for rank in range(world_size)]
    held = [shard.positions.tolist() for shard in shards]
    assert sorted(chain.from_iterable(held)) == list(range(len(batch)))
    assert all(positions == sorted(positions) for positions in held)
    owners: dict[int, set[int]] = {}
    for rank, shard in enumerate(shards):
        for sequence in shard.sequences:
            owners.setdefault(sequence.group, set()).add(rank)
    assert all(len(ranks) == 1 for ranks in owners.values())
    assert len(owners) == batch.num_groups


def test_more_ranks_than_groups_leave_empty_shards() -> None:
    batch = make_batch([(0, 1, 2), (1, 1, 2)])
    sizes = [len(batch.shard(rank, 5).sequences) for rank in range(5)]
    assert sorted(sizes) == [0, 0, 0, 1, 1]
    empty = batch.shard(sizes.index(0), 5)
    assert empty.ragged.num_tokens == 0
    assert empty.ragged.sum(torch.zeros(0)).shape == (0,)
    assert empty.ragged.sum_after(torch.zeros(0)).shape == (0,)


def test_an_empty_batch_has_empty_shards() -> None:
    assert make_batch([]).shard(0, 2).sequences == []


@pytest.mark.parametrize("seed", range(5))
def test_shards_are_balanced_by_tokens(seed: int) -> None:
    batch = make_random_batch(seed, num_groups=60)
    costs = [
        sum(len(s.prompt_ids) + s.num_tokens for s in batch.shard(rank, 4).sequences)
        for rank in range(4)
    ]
    groups: dict[int, int] = {}
    for s in batch.sequences:
        cost = len(s.prompt_ids) + s.num_tokens
        groups[s.group] = groups.get(s.group, 0) + cost
    # The longest rank got its last group when it was the shortest.
    assert max(costs) - min(costs) <= max(groups.values())
    assert max(costs) <= 1.05 * sum(costs) / 4


def test_shard_layout_is_that_of_its_sequences() -> None:
    batch = make_random_batch(3)
    for rank in range(2):
        shard = batch.shard(rank, 2)
        lengths = [sequence.num_tokens for sequence in shard.sequences]
        assert shard.ragged.lengths.tolist() == lengths


def test_shards_are_dealt_out_once() -> None:
    """The same one is asked for in every phase of a run."""
    batch = make_random_batch(0)
    assert batch.shard(1, 3) is batch.shard(1, 3)
    assert batch.shard(1, 3) is not batch.shard(1, 2)
    assert batch.first(len(batch)) is batch


@pytest.mark.parametrize("limit", [0, 1, 7, 20, 10**9])
def test_blocks_cut_a_shard_into_whole_groups(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Every token once, at its place; as many as the limit allows, or one group's."""
    monkeypatch.setattr(batch_module, "BLOCK_TOKENS", limit)
    batch = make_random_batch(3, num_groups=20)
    for rank in range(3):
        shard = batch.shard(rank, 3)
        seen, tokens = [], []
        for block in shard.blocks():
            held = block.shard.groups.unique().tolist()
            for group in held:
                whole = int((shard.groups == group).sum())
                assert int((block.shard.groups == group).sum()) == whole
            assert len(held) == 1 or block.ragged.num_tokens <= limit
            assert torch.equal(block.shard.groups, shard.groups[block.sequences])
            row, k = shard.ragged.sequence_of_token, shard.ragged.position
            spread = block.sequences[block.ragged.sequence_of_token]
            assert torch.equal(row[block.tokens], spread)
            assert torch.equal(k[block.tokens], block.ragged.position)
            seen += held
            tokens += block.tokens.tolist()
        assert seen == sorted(set(shard.groups.tolist()))
        assert sorted(tokens) == list(range(shard.ragged.num_tokens))
        assert [number for number, _ in shard.by_group()] == seen


def test_a_shard_is_cut_into_blocks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every phase of a run goes through them; its groups are looked for once."""
    calls: list[int] = []
    find = batch_module._places_by_group

    def counted(groups: Tensor) -> Any:
        calls.append(len(groups))
        return find(groups)

    monkeypatch.setattr(batch_module, "_places_by_group", counted)
    shard = make_random_batch(3, num_groups=20).shard(0, 2)
    first, again = list(shard.blocks()), list(shard.blocks())
    assert calls == [len(shard.positions)]
    for one, other in zip(first, again, strict=True):
        assert one.shard is other.shard
        assert torch.equal(one.tokens, other.tokens)


def test_sequence_of_single_places() -> None:
    """Empty sequences hold no place."""
    ragged = Ragged(torch.tensor([0, 2, 0, 0, 3, 1, 0]))
    every = torch.arange(ragged.num_tokens)
    assert torch.equal(ragged.sequence_at(every), ragged.sequence_of_token)
    assert ragged.sequence_at(torch.tensor([5, 0, 2])).tolist() == [5, 1, 4]


@pytest.mark.parametrize("seed", range(3))
def test_a_shard_is_divided_by_its_groups(seed: int) -> None:
    """Every sequence and token once, in order; parts may be empty."""
    batch = make_random_batch(seed)
    part_of_group = torch.tensor([0, 2, 0, 3, 3, 2, 0])
    for rank in range(3):
        shard = batch.shard(rank, 3)
        parts = shard.divided(part_of_group, 4)
        assert len(parts) == 4 and len(parts[1].sequences) == 0
        for number, part in enumerate(parts):
            expected = [
                place
                for place, group in enumerate(shard.groups.tolist())
                if part_of_group[group] == number
            ]
            assert part.sequences.tolist() == expected
            assert part.shard.positions.tolist() == shard.positions[expected].tolist()
            tokens = [
                token
                for place in expected
                for token in range(shard.ragged.starts[place], shard.ragged.ends[place])
            ]
            assert part.tokens.tolist() == tokens


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_part_of_a_batch_stays_where_it_is(world_size: int) -> None:
    """The same sequences on every rank, their groups numbered anew."""
    batch = make_random_batch(4)
    chosen = torch.tensor([True, False, True, True, False, False, True])
    part = batch.part(chosen, world_size)
    assert part.num_groups == 4
    assert sorted(set(part.groups.tolist())) == [0, 1, 2, 3]
    numbers = dict(zip([0, 2, 3, 6], range(4), strict=True))
    for rank in range(world_size):
        whole, own = batch.shard(rank, world_size), part.shard(rank, world_size)
        kept = [s for s in whole.sequences if bool(chosen[s.group])]
        assert [s.index for s in own.sequences] == [s.index for s in kept]
        assert own.groups.tolist() == [numbers[s.group] for s in kept]
